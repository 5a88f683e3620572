"""Requests through the engine: what is refused, when a sequence ends, what comes out, what is left behind."""

import functools
import math

import pytest
import torch

from dsmoe_ray.errors import DsmoeError, EngineFullError, RequestError
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.engine import Engine
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.inference.sampling_config import SampledToken, SamplingConfig
from dsmoe_ray.inference.sequence import ScheduledStep
from dsmoe_ray.inference.text_stream import TextStream
from tests.fakes.scripted_runner import ScriptedRunner, say
from tests.fakes.tiny_artifact import make_config, make_tokenizer

CONFIG = make_config()
VOCAB, MAX_SEQ_LEN = CONFIG.vocab_size, CONFIG.max_seq_len
PROMPT = (5, 6, 7)


@functools.cache
def tokenizer():
    return make_tokenizer(CONFIG)


def ids(text):
    return [int(token) for token in tokenizer().encode(text)]


END = tokenizer().end_of_text_id


def make_engine(next_logits=None, *, num_blocks=40, **config):
    """Return an engine whose model says ``next_logits``; by default every token is as likely as any other."""
    config = EngineConfig(**{"block_size": 4, "max_num_seqs": 4, "max_batched_tokens": 12} | config)
    next_logits = next_logits or (lambda tokens: torch.zeros(VOCAB))
    runner = ScriptedRunner(CONFIG, next_logits, block_size=config.block_size, num_blocks=num_blocks)
    return Engine(runner, tokenizer(), config), runner


def engine_that_says(*said, prompt=PROMPT, **config):
    return make_engine(say(VOCAB, {prompt: said}), **config)[0]


def request(prompt=PROMPT, *, max_tokens=8, sampling=None, **fields):
    sampling = SamplingConfig(**(sampling or {}))
    return GenerationRequest(prompt_ids=prompt, max_tokens=max_tokens, sampling=sampling, **fields)


def drain(engine):
    """Step until nobody is left; return the outputs of each sequence by (request id, sequence index)."""
    outputs = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.sequence_idx), []).append(output)
    return outputs


def run(engine, one):
    """Run one request of one sequence alone."""
    engine.add("one", one)
    return drain(engine)["one", 0]


def tokens_of(outputs):
    return [output.token.token_id for output in outputs if output.token is not None]


def text_of(outputs):
    return "".join(output.text for output in outputs)


def end_of(outputs):
    assert all(output.finish_reason is None for output in outputs[:-1])
    return outputs[-1].finish_reason, outputs[-1].stop_reason


def assert_idle(engine):
    status = engine.status
    assert not engine.has_work and engine.step() == []
    assert (status.num_running, status.num_waiting, status.num_free_blocks) == (0, 0, status.num_blocks)


@pytest.mark.parametrize(
    ("impossible", "param", "message"),
    [
        ({"prompt": (5, 300)}, "prompt_ids", "token id 300; this model's ids are 0 to 299"),
        ({"prompt": (5,) * 32}, "prompt_ids", "the prompt has 32 tokens; this model takes at most 31"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "token id -1"),
        ({"routing": resolve_routing("dense", CONFIG)[:1]}, "routing", "rules for 1 layers; this model has 2"),
        ({"prompt": (5,) * 9, "max_tokens": 23}, "max_tokens", "the KV cache holds 28"),
        ({"n": 9}, "n", "at most 8 can wait"),
    ],
    ids=["foreign token", "too long", "foreign stop token", "wrong layers", "more than the KV cache", "n > queue"],
)
def test_a_request_that_cannot_be_served_fails_alone_before_anything_runs(impossible, param, message):
    engine, _ = make_engine(num_blocks=7, max_waiting=8)
    engine.add("good", request(max_tokens=2))
    with pytest.raises(RequestError, match=message) as caught:
        engine.add("bad", request(**impossible))
    assert caught.value.param == param
    assert drain(engine).keys() == {("good", 0)}
    assert_idle(engine)


def test_a_full_queue_refuses_and_takes_more_when_it_has_moved_on():
    engine, _ = make_engine(max_waiting=3)
    engine.add("first", request(n=2, max_tokens=1))
    with pytest.raises(EngineFullError, match="2 sequences wait, 2 came and 3 are allowed"):
        engine.add("second", request(n=2))
    assert engine.status.num_waiting == 2
    engine.step()
    engine.add("second", request(n=2))


def test_an_id_is_taken_until_the_last_sequence_of_its_request_has_ended():
    engine, _ = make_engine()
    sampling = {"temperature": 1.0, "seed": 3}
    engine.add("a", request(n=2, max_tokens=20, sampling=sampling, stop_token_ids=range(0, VOCAB, 4)))
    ended = []
    while engine.has_work:
        with pytest.raises(RequestError, match="a request 'a' is running already") as caught:
            engine.add("a", request())
        assert caught.value.param == "id"
        ended.append([output.sequence_idx for output in engine.step() if output.finish_reason])
    assert list(filter(None, ended)) == [[0], [1]], "another order would show less"
    engine.add("a", request())
    assert engine.status.num_waiting == 1


def test_a_sequence_ends_with_its_tokens_or_at_the_longest_sequence():
    said = list(range(10, 60))
    engine = engine_that_says(*said)
    short, long = (run(engine, request(max_tokens=count)) for count in (4, 1000))
    assert tokens_of(short) == said[:4] and end_of(short) == ("length", None)
    assert tokens_of(long) == said[: MAX_SEQ_LEN - 3] and end_of(long) == ("length", None)


def test_the_longest_possible_prompt_gets_one_token():
    engine, runner = make_engine(two_likely, block_size=2, max_batched_tokens=10)
    outputs = run(engine, request(prompt=(9,) * (MAX_SEQ_LEN - 1), max_tokens=100))
    assert len(tokens_of(outputs)) == 1 and end_of(outputs) == ("length", None)
    assert runner.batches == [[10], [10], [10], [1]], "a prompt longer than a step comes in chunks"


def test_the_end_of_text_token_ends_the_text_and_is_not_in_it():
    words = ids("left right")
    outputs = run(engine_that_says(*words, END, *words), request(max_tokens=20))
    assert (text_of(outputs), tokens_of(outputs), end_of(outputs)) == ("left right", words, ("stop", END))
    assert outputs[-1].token is None


def test_ignore_eos_takes_the_end_of_text_token_as_any_other():
    words = ids("left right")
    outputs = run(engine_that_says(*words, END, *words), request(max_tokens=2 * len(words) + 1, ignore_eos=True))
    assert tokens_of(outputs) == [*words, END, *words] and end_of(outputs) == ("length", None)
    assert text_of(outputs) == "left rightleft right"


def test_a_stop_token_ends_the_text_and_is_not_in_it():
    outputs = run(engine_that_says(20, 21, 22), request(stop_token_ids=[22], ignore_eos=True))
    assert tokens_of(outputs) == [20, 21] and end_of(outputs) == ("stop", 22)


@pytest.mark.parametrize("include", [False, True], ids=["left out", "included"])
def test_a_stop_string_ends_the_text_and_nothing_of_it_leaks(include):
    said = ids("left = right + return")
    outputs = run(
        engine_that_says(*said), request(max_tokens=40, stop=["right +", "zz"], include_stop_in_output=include)
    )
    assert end_of(outputs) == ("stop", "right +")
    assert text_of(outputs) == ("left = right +" if include else "left = ")
    for output in outputs[:-1]:
        assert not set(output.text) & set("rigt+") - set("left = "), "a beginning of the stop string was given out"


def test_what_was_held_back_for_a_stop_string_comes_at_the_end():
    said = ids("left rig")
    outputs = run(engine_that_says(*said), request(max_tokens=len(said), stop=["right"]))
    assert text_of(outputs) == "left rig" and outputs[-1].text.endswith("rig")


def test_text_comes_in_whole_characters_that_add_up():
    text = "na\xefve \U0001f600 = \u6f22\u5b57\n"
    said = ids(text)
    assert len(ids("\U0001f600")) == 4, "the test wants a character of several tokens"
    outputs = run(engine_that_says(*said, END), request(max_tokens=40))
    assert text_of(outputs) == text and len(outputs) == len(said) + 1
    assert all("\N{REPLACEMENT CHARACTER}" not in output.text for output in outputs)
    half = run(engine_that_says(*ids("\U0001f600")[:2]), request(max_tokens=2))
    assert half[0].text == "" and set(half[1].text) == {"\N{REPLACEMENT CHARACTER}"}


def test_the_sequences_of_a_request_have_seeds_of_their_own_and_the_first_the_requests():
    engine, _ = make_engine()
    sampling = {"temperature": 1.0, "seed": 7}
    engine.add("crowd", request(n=3, sampling=sampling, ignore_eos=True))
    crowd = drain(engine)
    assert crowd.keys() == {("crowd", 0), ("crowd", 1), ("crowd", 2)}
    assert len({tuple(tokens_of(outputs)) for outputs in crowd.values()}) == 3
    assert tokens_of(run(engine, request(sampling=sampling, ignore_eos=True))) == tokens_of(crowd["crowd", 0])


def two_likely(tokens):
    """Logits by which token 11 has probability 1/2, token 12 has 1/4, and all others share the rest."""
    logits_V = torch.full((VOCAB,), math.log(0.25 / (VOCAB - 2)))
    logits_V[11], logits_V[12] = math.log(0.5), math.log(0.25)
    return logits_V


def test_log_probabilities_come_with_each_token_and_are_the_models_own():
    engine, _ = make_engine(two_likely)
    bias = {"logit_bias": {12: 5.0}}
    for output in run(engine, request(max_tokens=3, sampling={"logprobs": 2, **bias})):
        assert output.token.token_id == 12
        # Logits are float32: some 1e-7 relative.
        assert output.token.logprob == pytest.approx(math.log(0.25), abs=1e-6)
        assert [token for token, _ in output.token.top_logprobs] == [11, 12]
        assert [value for _, value in output.token.top_logprobs] == pytest.approx(
            [math.log(0.5), math.log(0.25)], abs=1e-6
        )
    assert run(engine, request(max_tokens=1))[0].token == SampledToken(11)


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("max_batched_tokens", [8, 40], ids=["in chunks", "at once"])
def test_prompt_log_probabilities_come_once_with_the_first_output(max_tokens, max_batched_tokens):
    engine, runner = make_engine(two_likely, max_batched_tokens=max_batched_tokens)
    prompt = [11, 12] * 5
    outputs = run(engine, request(prompt, max_tokens=max_tokens, prompt_logprobs=1))
    found = outputs[0].prompt_logprobs
    assert [scored.token_id for scored in found] == prompt[1:]
    expected = [math.log(0.25 if token == 12 else 0.5) for token in prompt[1:]]
    assert [scored.logprob for scored in found] == pytest.approx(expected, abs=1e-6)
    assert all(scored.top_logprobs[0][0] == 11 for scored in found)
    assert all(output.prompt_logprobs is None for output in outputs[1:])
    assert tokens_of(outputs) == [11] * max_tokens and end_of(outputs) == ("length", None)
    assert (runner.batches[0] == [10]) == (max_batched_tokens == 40)
    assert_idle(engine)


def test_prompt_log_probabilities_are_computed_though_the_prompt_is_in_the_prefix_cache():
    engine, _ = make_engine(two_likely)
    first = run(engine, request([11, 12] * 6, max_tokens=2, prompt_logprobs=0))
    again = run(engine, request([11, 12] * 6, max_tokens=2, prompt_logprobs=0))
    assert again == first and len(first[0].prompt_logprobs) == 11
    assert engine.status.num_prefix_hit_tokens == 0


def test_a_prompt_of_the_longest_sequence_can_be_scored():
    engine, _ = make_engine()
    [output] = run(engine, request([11] * MAX_SEQ_LEN, max_tokens=0, prompt_logprobs=0))
    assert len(output.prompt_logprobs) == MAX_SEQ_LEN - 1 and output.token is None


def test_penalties_see_the_prompt_and_the_tokens_so_far():
    engine, _ = make_engine(two_likely)
    assert tokens_of(run(engine, request([40], max_tokens=3))) == [11, 11, 11]
    # Each of the likely tokens once, then the lowest of the others that was not said: log 2 apart, 3 from the rest.
    penalty = {"presence_penalty": 2.0, "frequency_penalty": 2.0}
    assert tokens_of(run(engine, request([40], max_tokens=3, sampling=penalty))) == [11, 12, 11]
    # Logits are below zero here, so the penalty multiplies them; the prompt counts too.
    repetition = {"repetition_penalty": 100.0}
    assert tokens_of(run(engine, request([11, 0], max_tokens=3, sampling=repetition))) == [12, 1, 2]


def test_a_request_without_rules_of_its_own_runs_as_the_model_is_deployed():
    engine, runner = make_engine()
    seen = []
    original = runner.run
    runner.run = lambda batch: seen.append((batch.rules, batch.rule_idxs_B.tolist())) or original(batch)
    dense = resolve_routing("dense", CONFIG)
    for request_id, routing in (("a", None), ("b", dense), ("c", resolve_routing("top_k=2", CONFIG))):
        engine.add(request_id, request(max_tokens=1, routing=routing))
    engine.step()
    assert seen == [((tuple(resolve_routing("deployed", CONFIG)), tuple(dense)), [0, 1, 0])]
    engine.add("d", request(max_tokens=1, routing=resolve_routing("dense", CONFIG)))
    engine.step()
    assert seen[1][0][0] is seen[0][0][1], "a runner knows rules by their identity"


def test_a_row_that_is_not_finite_fails_only_its_sequence():
    engine, _ = make_engine(lambda tokens: torch.full((VOCAB,), math.nan) if 66 in tokens else two_likely(tokens))
    engine.add("good", request(max_tokens=3))
    engine.add("bad", request((5, 66), max_tokens=3))
    engine.add("bad echo", request((5, 66, 7), max_tokens=3, prompt_logprobs=0))
    engine.add("good echo", request((5, 6, 7, 8), max_tokens=3, prompt_logprobs=0))
    outputs = drain(engine)
    for name, position in (("bad", 2), ("bad echo", 2)):
        [output] = outputs[name, 0]
        assert output.finish_reason == "error" and output.token is None
        assert isinstance(output.error, DsmoeError)
        assert f"logits at position {position} are not finite" in str(output.error)
    assert tokens_of(outputs["good", 0]) == tokens_of(outputs["good echo", 0]) == [11] * 3
    assert_idle(engine)


def test_a_runner_that_raises_loses_nothing_and_is_asked_again():
    def outputs_with(*failures):
        engine, runner = make_engine()
        outputs = {}
        for name, prompt in (("a", (1, 2, 3)), ("b", range(5, 18)), ("c", range(5, 18))):
            fields = {"sampling": {"temperature": 1.0, "seed": 5, "logprobs": 0}, "ignore_eos": True}
            engine.add(name, request(prompt, prompt_logprobs=0 if name == "a" else None, **fields))
        for step in range(100):
            if step in failures:
                runner.fail_once(MemoryError("no memory for the step"))
                with pytest.raises(MemoryError, match="no memory for the step"):
                    engine.step()
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
        assert_idle(engine)
        return outputs, engine.status

    expected, undisturbed = outputs_with()
    found, status = outputs_with(0, 1, 2, 5)
    assert found == expected and {len(tokens_of(one)) for one in found.values()} == {8}
    assert status == undisturbed


def test_a_step_whose_sampling_raises_counts_for_nothing_and_is_tried_again(monkeypatch):
    def outputs_with(*failures):
        engine, _ = make_engine(two_likely)
        engine.add("echo", request(range(5, 25), max_tokens=3, prompt_logprobs=0))
        engine.add("plain", request(max_tokens=3))
        outputs = []
        for step in range(8):
            if step in failures:
                with monkeypatch.context() as patch:
                    patch.setattr("dsmoe_ray.inference.engine.sample_batch", raise_memory_error)
                    with pytest.raises(MemoryError):
                        engine.step()
            outputs += engine.step()
        assert_idle(engine)
        return outputs, engine.status

    def raise_memory_error(*_):
        raise MemoryError("no memory to sample")

    expected = outputs_with()
    assert len(expected[0]) == 6 and outputs_with(1, 2, 3) == expected


def test_a_sequence_whose_token_cannot_be_told_fails_alone(monkeypatch, caplog):
    push = TextStream.push

    def fail_at_66(self, token_id):
        if token_id == 66:
            raise KeyError("no text for 66")
        return push(self, token_id)

    monkeypatch.setattr(TextStream, "push", fail_at_66)
    engine, _ = make_engine(say(VOCAB, {(5, 6): [20, 66, 21], PROMPT: [30, 31, 32]}))
    engine.add("bad", request((5, 6), max_tokens=3))
    engine.add("good", request(max_tokens=3))
    outputs = drain(engine)
    assert tokens_of(outputs["good", 0]) == [30, 31, 32] and tokens_of(outputs["bad", 0]) == [20]
    assert end_of(outputs["bad", 0]) == ("error", None)
    assert str(outputs["bad", 0][-1].error) == "the output cannot be told, KeyError: 'no text for 66'"
    assert "request 'bad', sequence 0" in caplog.text
    assert_idle(engine)


def test_an_engine_that_has_work_and_schedules_none_of_it_says_so(monkeypatch):
    engine, _ = make_engine()
    engine.add("a", request())
    monkeypatch.setattr(engine._scheduler, "schedule", ScheduledStep)
    with pytest.raises(AssertionError, match="1 sequences are here and none can be scheduled"):
        engine.step()


def test_a_request_that_the_queue_has_no_room_for_costs_nothing(monkeypatch):
    engine, _ = make_engine(max_waiting=3)
    engine.add("first", request())
    monkeypatch.setattr(engine, "_make_sequence", None)
    with pytest.raises(EngineFullError):
        engine.add("second", request(n=3))
    assert engine.has_request("first") and not engine.has_request("second")


@pytest.mark.parametrize("num_steps", [0, 1, 3], ids=["waiting", "in the prompt", "decoding"])
def test_a_cancelled_request_frees_everything_at_once_and_has_no_more_output(num_steps):
    engine, runner = make_engine(prefix_cache=False)
    engine.add("gone", request(range(5, 25), n=2, max_tokens=9))
    engine.add("stays", request(max_tokens=9, ignore_eos=True))
    outputs = [output for _ in range(num_steps) for output in engine.step()]
    assert engine.cancel("gone") and not engine.cancel("gone") and not engine.cancel("never there")
    assert engine.status.num_running + engine.status.num_waiting == 1
    if num_steps == 1:
        assert engine.status.num_free_blocks == engine.status.num_blocks
    outputs += [output for of_sequence in drain(engine).values() for output in of_sequence]
    assert len(tokens_of([output for output in outputs if output.request_id == "stays"])) == 9
    assert all(len(batch) == 1 for batch in runner.batches[num_steps:])
    assert_idle(engine)


CONTINUED = {
    "greedy": {},
    "sampled": {"sampling": {"temperature": 1.0, "seed": 11, "logprobs": 1}},
    "penalized": {"sampling": {"temperature": 0.7, "seed": 2, "frequency_penalty": 1.5, "repetition_penalty": 1.3}},
    "with stop": {"sampling": {"temperature": 1.0, "seed": 12}, "stop": ["\u6f22", "q", "zz"]},
    "of three": {"n": 3, "sampling": {"temperature": 1.0, "seed": 13}},
}


def pseudo_model(tokens):
    """Logits that depend on the last tokens, as a model's do."""
    generator = torch.Generator().manual_seed(sum(tokens[-3:]) % 97)
    return torch.randn(VOCAB, generator=generator) * 2


@pytest.mark.parametrize("fields", CONTINUED.values(), ids=CONTINUED)
def test_a_sequence_continued_elsewhere_goes_on_with_the_same_tokens_and_text(fields):
    whole_request = request(ids("def add(\u6f22")[:-1], max_tokens=24, ignore_eos=True, **fields)
    here, _ = make_engine(pseudo_model)
    here.add("whole", whole_request)
    for (_, idx), outputs in drain(here).items():
        generated = tokens_of(outputs)
        assert len(set(generated)) > 4
        for num_sent in range(0, len(outputs) - 1, 5):
            elsewhere, _ = make_engine(pseudo_model, max_num_seqs=2, max_batched_tokens=6)
            rest = run(elsewhere, whole_request.continue_sequence(idx, generated[:num_sent]))
            assert [output.token for output in rest] == [output.token for output in outputs[num_sent:]]
            assert [output.text for output in rest] == [output.text for output in outputs[num_sent:]]
            assert end_of(rest) == end_of(outputs)


@pytest.mark.parametrize("ended", [{"stop": ["right"]}, {"stop_token_ids": ids(" right")[-1:]}], ids=["stop", "token"])
def test_a_sequence_that_has_ended_elsewhere_is_not_continued(ended):
    engine, _ = make_engine()
    with pytest.raises(RequestError, match="nothing is left to generate"):
        engine.add("a", request(max_tokens=40, generated_ids=ids("left right"), **ended))
    assert_idle(engine)


def test_status_counts_what_was_done_and_what_is_held():
    engine, runner = make_engine()
    before = engine.status
    assert (before.num_blocks, before.num_free_blocks, before.kv_cache_bytes) == (40, 40, runner.kv_cache_bytes)
    engine.add("a", request(range(5, 14), max_tokens=3, ignore_eos=True))
    engine.add("b", request(range(5, 14), n=2, max_tokens=3, ignore_eos=True))
    assert (engine.status.num_waiting, engine.status.num_running) == (3, 0)
    engine.step()
    # Nine tokens of the first; of the others eight are found and one is computed.
    status = engine.status
    assert (status.num_waiting, status.num_running) == (0, 3)
    assert (status.num_computed_tokens, status.num_prefix_hit_tokens, status.num_generated_tokens) == (11, 16, 3)
    assert status.num_free_blocks == 40 - 2 - 3 and status.num_cached_blocks == 2
    drain(engine)
    status = engine.status
    assert (status.num_steps, status.num_computed_tokens, status.num_generated_tokens) == (3, 11 + 2 * 3, 9)
    assert status.num_preemptions == 0 and status.num_free_blocks == 40


def test_a_sequence_that_is_preempted_and_computed_again_says_the_same():
    fields = {
        "max_tokens": 20,
        "sampling": {"temperature": 1.0, "seed": 3, "presence_penalty": 1.0},
        "ignore_eos": True,
    }
    roomy, _ = make_engine(pseudo_model)
    tight, _ = make_engine(pseudo_model, num_blocks=9)
    for engine in (roomy, tight):
        for name in range(4):
            engine.add(name, request((5, 6, name), prompt_logprobs=0, **fields))
    assert drain(tight) == drain(roomy)
    assert tight.status.num_preemptions > 0 == roomy.status.num_preemptions
