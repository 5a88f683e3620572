import json

import pytest

from dsmoe_ray.errors import RequestError
from dsmoe_ray.serving.openai_api.errors import ApiError
from dsmoe_ray.serving.openai_api.requests import Planner, derive_request_seed
from dsmoe_ray.serving.openai_api.served_model import load_served_model
from dsmoe_ray.serving.openai_api.types import ChatBody, CompletionBody, parse_body
from tests.fakes.tiny_artifact import write_tiny_artifact


def plan(planner, request_id="id", **fields):
    values = {"prompt": "def"} | fields
    return planner.plan_completion(parse_body(json.dumps(values).encode(), CompletionBody), request_id)


def plan_chat(planner, **fields):
    values = {"messages": [{"role": "user", "content": "hi"}]} | fields
    return planner.plan_chat(parse_body(json.dumps(values).encode(), ChatBody), "id")


def request_of(call):
    [prompt] = call.prompts
    return prompt.request


def test_defaults_are_those_of_the_api(planner):
    request = request_of(plan(planner))
    assert request.max_tokens == 16 and request.sampling.temperature == 1 and request.routing is None
    assert request.prompt_logprobs is None and request.sampling.logprobs is None


def test_the_model_may_have_defaults_of_its_own(tmp_path):
    generation = {"temperature": 0.5, "top_k": 7, "repetition_penalty": 1.2, "max_length": 5}
    path = write_tiny_artifact(tmp_path / "model", generation_config=generation)
    planner = Planner(load_served_model(path), max_prompts=4)
    sampling = request_of(plan(planner)).sampling
    assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (0.5, 7, 1.2)
    sampling = request_of(plan(planner, temperature=0, top_k=-1)).sampling
    assert (sampling.temperature, sampling.top_k) == (0, None)


def test_a_chat_may_fill_the_longest_sequence(planner):
    request = request_of(plan_chat(planner))
    assert len(request.prompt_ids) + request.max_tokens == 64
    assert request_of(plan_chat(planner, max_completion_tokens=3)).max_tokens == 3
    assert request_of(plan_chat(planner, max_tokens=3)).max_tokens == 3


def test_numbers_without_end_fit_the_wire(planner):
    request = request_of(plan(planner, max_tokens=10**30, top_k=10**30))
    assert request.max_tokens == 64 and request.sampling.top_k == 300
    with pytest.raises(RequestError) as caught:
        plan(planner, seed=2**64)
    assert caught.value.param == "seed"


def test_a_seed_is_the_same_for_all_prompts_and_a_derived_one_is_not(planner):
    assert [one.request.sampling.seed for one in plan(planner, prompt=["a", "a"], seed=5).prompts] == [5, 5]
    seeds = [one.request.sampling.seed for one in plan(planner, prompt=["a", "a"]).prompts]
    assert seeds == [derive_request_seed("id", 0), derive_request_seed("id", 1)] and len(set(seeds)) == 2
    assert request_of(plan(planner, "other")).sampling.seed != seeds[0]


def test_a_derived_seed_is_the_same_in_every_release():
    assert derive_request_seed("a request", 3) == 8499715190153668838


def test_an_echo_of_one_token_generates_it_whatever_it_is(planner, model):
    call = plan(planner, echo=True, logprobs=1, max_tokens=1, stop_token_ids=[9])
    request = request_of(call)
    assert request.ignore_eos and request.stop_token_ids == () and request.prompt_logprobs == 1
    assert call.told_ends == {9, *model.tokenizer.end_ids} and call.prompts[0].text == "def"
    longer = plan(planner, echo=True, logprobs=1, max_tokens=2)
    assert not longer.told_ends and not request_of(longer).ignore_eos


@pytest.mark.parametrize("prompt", [None, 3, [], {}, ["a", 3], [[1], "a"], [1, "a"], [True], [[1], [None]]], ids=str)
def test_what_is_no_prompt_is_refused(planner, prompt):
    with pytest.raises(ApiError) as caught:
        plan(planner, prompt=prompt)
    assert caught.value.param == "prompt"


def test_a_prompt_that_leaves_no_room_is_told_as_clients_expect(planner):
    for prompt in ([4] * 64, "a" * 64, "word " * 100_000):
        with pytest.raises(ApiError) as caught:
            plan(planner, prompt=prompt)
        assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    plan(planner, prompt=[4] * 63)
    plan(planner, prompt=[4] * 64, max_tokens=0, echo=True)
    with pytest.raises(ApiError) as caught:
        plan_chat(planner, messages=[{"role": "user", "content": "x" * 64}])
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


def test_too_many_texts_in_one_call_are_refused(planner):
    with pytest.raises(ApiError, match="at most 1024"):
        Planner(planner._model, max_prompts=128).plan_completion(CompletionBody(prompt=["a"] * 128, n=9), "id")


def test_the_most_tokens_of_a_call_are_known(planner, model):
    call = plan(planner, prompt=[[1, 2, 3], [4] * 60], n=2, max_tokens=10)
    assert call.count_tokens(model) == 2 * (13 + 64) and call.num_choices == 4 and call.num_prompt_tokens == 63


@pytest.mark.parametrize("bias", [{"x": 1}, {"-1": 1}, {"9" * 30: 1}, {"300": 1}, {"1": 101}], ids=str)
def test_a_bias_that_cannot_be_is_refused(planner, bias):
    with pytest.raises(RequestError) as caught:
        plan(planner, logit_bias=bias)
    assert caught.value.param == "logit_bias"
