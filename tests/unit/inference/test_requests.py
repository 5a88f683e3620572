"""Requests to the engine: what is refused and why, seeds of sequences, continuation elsewhere."""

import dataclasses
import pickle

import numpy as np
import pytest

from dsmoe_ray.errors import RequestError
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.inference.sampling_config import SamplingConfig
from dsmoe_ray.model.config import ModelConfig, RoutingConfig
from dsmoe_ray.model.layer_routing import LayerRouting


def make_config(**changes):
    values = {
        "vocab_size": 50,
        "d_model": 16,
        "num_layers": 2,
        "max_seq_len": 10,
        "attention": {"kind": "gqa", "num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
        "ffn": {"kind": "moe", "num_experts": 4, "d_ff": 8},
    }
    return ModelConfig.model_validate({**values, **changes})


def make_request(**fields):
    return GenerationRequest(**{"prompt_ids": [1, 2, 3], "max_tokens": 4, **fields})


def top_k(k):
    return LayerRouting(ffn=RoutingConfig(mode="top_k", top_k=k))


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt_ids": []}, "prompt_ids", "the prompt is empty"),
        ({"prompt_ids": ["a"]}, "prompt_ids", "prompt_ids must be a list of token ids"),
        ({"prompt_ids": [1.0]}, "prompt_ids", "prompt_ids must be a list of token ids"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1; found 0"),
        ({"max_tokens": -1, "prompt_logprobs": 1}, "max_tokens", "max_tokens must be at least 0; found -1"),
        ({"n": 0}, "n", "n must be 1 to 128; found 0"),
        ({"n": 129}, "n", "n must be 1 to 128; found 129"),
        ({"n": 2, "generated_ids": [4]}, "n", "continues one sequence; found n=2"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "prompt_logprobs must be 0 to 20"),
        ({"stop": "end"}, "stop", "stop must be a list of strings"),
        ({"stop": [3]}, "stop", "stop must be a list of strings"),
        ({"stop": None}, "stop", "stop must be a list of strings; found None"),
        ({"stop": 3}, "stop", "stop must be a list of strings; found 3"),
        ({"sampling": None}, "sampling", "sampling must be a SamplingConfig; found None"),
        ({"sampling": {"seed": 3}}, "sampling", "sampling must be a SamplingConfig"),
        ({"routing": [1]}, "routing", "routing must be a list of LayerRouting, one a layer; found"),
        ({"routing": 1}, "routing", "routing must be a list of LayerRouting, one a layer; found 1"),
        ({"routing": "dense"}, "routing", "routing must be a list of LayerRouting, one a layer; found 'dense'"),
        ({"routing": top_k(2)}, "routing", "routing must be a list of LayerRouting, one a layer"),
        ({"routing": [LayerRouting(ffn="dense")]}, "routing", "routing of layer 0 must hold routing rules"),
        ({"stop": [""]}, "stop", "1 to 1000 characters; found 0"),
        ({"stop": ["x" * 1001]}, "stop", "1 to 1000 characters; found 1001"),
        ({"stop": ["x"] * 33}, "stop", "stop has 33 strings; at most 32"),
        ({"stop_token_ids": [None]}, "stop_token_ids", "stop_token_ids must be a list of token ids"),
        ({"generated_ids": [1, 2, 3, 4]}, "generated_ids", "nothing is left to generate"),
    ],
    ids=str,
)
def test_what_no_model_can_serve_is_refused_when_the_request_is_made(fields, param, message):
    with pytest.raises(RequestError, match=message) as raised:
        make_request(**fields)
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt_ids": [1, 50]}, "prompt_ids", "the prompt has the token id 50; this model's ids are 0 to 49"),
        ({"prompt_ids": [-1, 2]}, "prompt_ids", "token id -1"),
        ({"generated_ids": [99]}, "generated_ids", "generated_ids has the token id 99"),
        ({"stop_token_ids": [50]}, "stop_token_ids", "stop_token_ids has the token id 50"),
        ({"sampling": SamplingConfig(logit_bias={77: 1})}, "logit_bias", "logit_bias has the token id 77"),
        ({"prompt_ids": [1] * 10}, "prompt_ids", "has 10 tokens; this model takes at most 9, which leaves one"),
        ({"prompt_ids": [1] * 8, "generated_ids": [1, 1]}, "prompt_ids", "8 tokens and 2 were generated already"),
        (
            {"prompt_ids": [1] * 11, "max_tokens": 0, "prompt_logprobs": 0},
            "prompt_ids",
            "takes at most 10, its longest",
        ),
        ({"routing": [top_k(2)]}, "routing", "routing has rules for 1 layers; this model has 2"),
        ({"routing": [top_k(2), top_k(5)]}, "routing", "layer 1, ffn: top_k must be at most num_experts; got top_k=5"),
        (
            {"routing": [LayerRouting(attention=top_k(1).ffn)] * 2},
            "routing",
            "layer 0, attention: this model has no exp",
        ),
    ],
    ids=str,
)
def test_what_this_model_cannot_serve_is_refused_by_it(fields, param, message):
    request = make_request(**fields)
    with pytest.raises(RequestError, match=message) as raised:
        request.check_against(make_config())
    assert raised.value.param == param


def test_a_token_id_too_long_to_be_written_out_is_refused_like_any_other():
    with pytest.raises(RequestError, match="the prompt has the token id a number of 16610 bits") as raised:
        make_request(prompt_ids=[10**5000]).check_against(make_config())
    assert raised.value.param == "prompt_ids"


def test_more_alternatives_than_there_are_tokens_are_refused():
    small = make_config(vocab_size=4)
    for param, fields in (
        ("logprobs", {"sampling": SamplingConfig(logprobs=5)}),
        ("prompt_logprobs", {"prompt_logprobs": 5}),
    ):
        with pytest.raises(RequestError, match=f"{param}=5, but this model has only 4 tokens") as raised:
            make_request(**fields).check_against(small)
        assert raised.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt_ids": np.arange(9)},
        {"prompt_ids": [1] * 10, "max_tokens": 0, "prompt_logprobs": 0},
        {"prompt_ids": [1] * 5, "generated_ids": [1] * 3, "max_tokens": 1000},
        {"routing": resolve_routing("top_k=4", make_config())},
        {"n": 128, "stop": ["\n", "end"], "stop_token_ids": [0, 49]},
    ],
    ids=str,
)
def test_what_can_be_served_is_accepted(fields):
    make_request(**fields).check_against(make_config())


def test_a_sequence_ends_with_its_tokens_or_at_the_models_longest():
    assert make_request().compute_max_len(make_config()) == 7
    assert make_request(max_tokens=100).compute_max_len(make_config()) == 10


def test_a_request_without_a_seed_gets_one_and_keeps_it():
    first, second = make_request(), make_request()
    assert first.sampling.seed != second.sampling.seed
    copied = pickle.loads(pickle.dumps(first))
    assert copied == first and copied.seed_of(0) == first.sampling.seed
    assert dataclasses.replace(first, max_tokens=9).sampling.seed == first.sampling.seed


def test_the_first_of_many_sequences_is_the_one_that_would_come_alone():
    request = make_request(n=4, sampling=SamplingConfig(temperature=1.0, seed=11))
    assert request.seed_of(0) == make_request(sampling=request.sampling).seed_of(0) == 11
    assert len({request.seed_of(index) for index in range(4)}) == 4


def test_a_sequence_continued_elsewhere_keeps_its_seed_its_prompt_and_its_budget():
    request = make_request(n=3, sampling=SamplingConfig(temperature=1.0, seed=11), stop=["end"], prompt_logprobs=2)
    rest = request.continue_sequence(2, [7, 8])
    assert (rest.n, rest.seed_of(0)) == (1, request.seed_of(2))
    assert (rest.prompt_ids, rest.generated_ids, rest.max_tokens) == ((1, 2, 3), (7, 8), 4)
    assert rest.prompt_logprobs is None and rest.stop == ("end",)
    assert rest.compute_max_len(make_config()) == request.compute_max_len(make_config())
    again = rest.continue_sequence(0, [7, 8, 9])
    assert (again.seed_of(0), again.generated_ids) == (request.seed_of(2), (7, 8, 9))
    assert request.continue_sequence(1, []).prompt_logprobs == 2
    with pytest.raises(RequestError, match="nothing is left to generate"):
        request.continue_sequence(0, [7, 8, 9, 10])
