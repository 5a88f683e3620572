"""Texts that are written while they are read: one, several in turn, some that nobody reads to the end."""

import itertools

import pytest
import torch

from dsmoe_ray.errors import DsmoeError, EngineFullError, UserError
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.engine import Engine
from dsmoe_ray.inference.generation import Generator
from dsmoe_ray.inference.loading import build_runner
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.inference.sampling_config import SamplingConfig
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer
from tests.fakes.scripted_runner import ScriptedRunner, say
from tests.fakes.tiny_artifact import make_config, make_tokenizer

CONFIG = make_config()
TOKENIZER = make_tokenizer(CONFIG)


def ids(text):
    return [int(token) for token in TOKENIZER.encode(text)]


def generator_that_says(texts, **config):
    """Return a generator whose model answers prompts with given texts and then ends them."""
    config = EngineConfig(**{"block_size": 4, "max_num_seqs": 4, "max_batched_tokens": 12} | config)
    scripts = {tuple(ids(prompt)): [*ids(text), TOKENIZER.end_of_text_id] for prompt, text in texts.items()}
    runner = ScriptedRunner(CONFIG, say(CONFIG.vocab_size, scripts), block_size=4, num_blocks=40)
    return Generator(Engine(runner, TOKENIZER, config)), runner


@pytest.fixture(scope="module")
def with_model():
    """A generator on a real model."""
    model = Transformer(CONFIG)
    initialize(model, CONFIG, seed=1)
    config = EngineConfig()
    return Generator(Engine(build_runner(model.requires_grad_(False), config), TOKENIZER, config))


def assert_nothing_is_left(generator):
    status = generator.engine.status
    assert not generator.engine.has_work and status.num_free_blocks == status.num_blocks
    assert generator._outputs == {}


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ("", 4, "the prompt is empty"),
        ("left", 0, "max_tokens must be at least 1; found 0"),
        ("\udcff", 4, "the prompt is not valid Unicode"),
        ("?!" * 16, 4, "the prompt has 32 tokens; this model takes at most 31"),
    ],
    ids=["empty", "no tokens wanted", "half a surrogate pair", "too long"],
)
def test_a_prompt_that_cannot_be_served_is_refused_before_anything_runs(prompt, max_tokens, message):
    generator, runner = generator_that_says({})
    with pytest.raises(UserError, match=message):
        generator.generate(prompt, max_tokens=max_tokens)
    assert runner.batches == []
    assert_nothing_is_left(generator)


def test_text_is_computed_as_it_is_read():
    generator, runner = generator_that_says({"def": " add(left, right)"})
    generation = generator.generate("def", max_tokens=20)
    assert runner.batches == [] and generation.num_prompt_tokens == len(ids("def"))
    pieces = iter(generation)
    first = next(pieces)
    assert first and " add(left, right)".startswith(first)
    assert generation.num_tokens == len(runner.batches) == 1
    assert first + "".join(pieces) == " add(left, right)"
    assert generation.token_ids == ids(" add(left, right)")
    assert generation.finish_reason == "stop"
    assert generation.prefill_s > 0 and generation.decode_s > 0
    assert generation.tokens_per_s == (generation.num_tokens - 1) / generation.decode_s
    assert_nothing_is_left(generator)


def test_before_there_are_two_tokens_there_is_no_speed():
    generator, _ = generator_that_says({"def": " add"})
    generation = generator.generate("def", max_tokens=1)
    assert "".join(generation) and generation.num_tokens == 1
    assert generation.tokens_per_s == 0.0 and generation.finish_reason == "length"


def test_texts_that_are_read_in_turn_are_computed_together():
    texts = {"def": " add(left, right)", "return": " left + right\n", "left": " = na\xefve"}
    generator, runner = generator_that_says(texts)
    generations = {prompt: iter(generator.generate(prompt, max_tokens=30)) for prompt in texts}
    found = dict.fromkeys(texts, "")
    for pieces in itertools.zip_longest(*generations.values(), fillvalue=""):
        for prompt, piece in zip(texts, pieces, strict=True):
            found[prompt] += piece
    assert found == texts
    # The longest text and the token that ends it, a step each.
    assert len(runner.batches) == 1 + max(len(ids(text)) for text in texts.values())
    assert_nothing_is_left(generator)


def test_a_text_that_is_not_read_to_its_end_frees_its_place():
    generator, _ = generator_that_says({"def": " add(left, right)", "return": " left"})
    generation = generator.generate("def", max_tokens=20)
    for _ in generation:
        assert generator.engine.has_work
        break
    assert_nothing_is_left(generator)
    assert generation.num_tokens == 1 and generation.finish_reason is None
    assert "".join(generator.generate("return", max_tokens=20)) == " left"


def test_a_text_that_is_never_read_leaves_once_nobody_can_read_it():
    generator, runner = generator_that_says({"def": " add", "return": " left"}, max_waiting=1)
    generation = generator.generate("def", max_tokens=20)
    del generation
    # With the first one there, there would be no room.
    assert "".join(generator.generate("return", max_tokens=20)) == " left"
    assert all(len(batch) == 1 for batch in runner.batches)
    assert_nothing_is_left(generator)


@pytest.mark.parametrize("num_read", [0, 1, 2])
@pytest.mark.parametrize("of", ["generator", "engine"])
def test_a_reader_whose_request_is_cancelled_comes_to_an_end(num_read, of):
    generator, _ = generator_that_says({"def": " add(left, right)"})
    other = generator.submit(make_request("return"))
    request_id = generator.submit(make_request("def", n=2))
    outputs = generator.read(request_id, num_sequences=2)
    for _ in range(num_read):
        assert next(outputs).request_id == request_id
    (generator if of == "generator" else generator.engine).cancel(request_id)
    rest = list(outputs)
    # What was computed and not read: the second sequence's token.
    assert len(rest) == (of == "engine" and num_read == 1)
    assert list(generator.read(request_id)) == []
    assert len(list(generator.read(other))) == 4
    assert_nothing_is_left(generator)


def test_stop_strings_end_the_text():
    generator, _ = generator_that_says({"def": " add(left, right)"})
    generation = generator.generate("def", max_tokens=20, stop=[", ri"])
    assert "".join(generation) == " add(left" and generation.finish_reason == "stop"


def test_a_broken_model_is_told_to_the_reader():
    generator, runner = generator_that_says({})
    runner.next_logits = lambda tokens: torch.full((CONFIG.vocab_size,), float("nan"))
    generation = generator.generate("def", max_tokens=20)
    with pytest.raises(DsmoeError, match="are not finite; its weights cannot be used"):
        list(generation)
    assert generation.finish_reason == "error"
    assert_nothing_is_left(generator)


def make_request(prompt="def", **fields):
    return GenerationRequest(**{"prompt_ids": ids(prompt), "max_tokens": 4, "ignore_eos": True} | fields)


def test_requests_run_together_and_come_back_in_their_order():
    generator, runner = generator_that_says({"def": " add(left, right)", "return": " left + right"})
    first, second = generator.run([make_request("def", max_tokens=6), make_request("return", n=2)])
    assert [output.token.token_id for output in first] == ids(" add(left, right)")[:6]
    assert {output.sequence_idx for output in second} == {0, 1} and len(second) == 8
    assert len(runner.batches) == 6
    assert_nothing_is_left(generator)


@pytest.mark.parametrize(
    ("last", "error"),
    [({"prompt_ids": [5, 300]}, UserError), ({"n": 3}, EngineFullError)],
    ids=["one that cannot be served", "one too many"],
)
def test_of_requests_that_do_not_all_run_nothing_is_left(last, error):
    generator, runner = generator_that_says({}, max_waiting=4)
    with pytest.raises(error):
        generator.run([make_request(), make_request(n=1), make_request(**last)])
    assert runner.batches == []
    assert_nothing_is_left(generator)


def test_when_the_runner_fails_requests_that_run_together_leave():
    generator, runner = generator_that_says({})
    runner.fail_once(MemoryError("no memory for the step"))
    with pytest.raises(MemoryError):
        generator.run([make_request(), make_request()])
    assert_nothing_is_left(generator)


def test_a_model_runs_with_its_deployed_routing_unless_told_otherwise(with_model):
    def tokens(routing=None):
        generation = with_model.generate("def", max_tokens=20, routing=routing)
        list(generation)
        return generation.token_ids

    found = {spec: tokens(resolve_routing(spec, CONFIG)) for spec in ("deployed", "top_k=2", "top_k=1", "dense")}
    assert tokens() == found["deployed"] == found["top_k=2"]
    assert found["top_k=1"] != found["deployed"] != found["dense"]


def test_the_seed_decides_the_text(with_model):
    texts = {}
    for seed, _ in itertools.product(range(4), range(2)):
        sampling = SamplingConfig(temperature=1.0, seed=seed)
        text = "".join(with_model.generate("left", max_tokens=10, sampling=sampling))
        assert texts.setdefault(seed, text) == text
    assert len(set(texts.values())) == 4


def test_the_text_is_that_of_the_tokens(with_model):
    generation = with_model.generate("def", max_tokens=20, sampling=SamplingConfig(temperature=1.0, seed=4))
    text = "".join(generation)
    assert "def" + text == TOKENIZER.decode([*ids("def"), *generation.token_ids])
