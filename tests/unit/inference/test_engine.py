"""Requests to the engine: what is refused, when generation ends, what comes out."""

import functools
import itertools

import pytest
import torch

from dsmoe_ray.data.tokenizer import TextTokenizer, train_tokenizer
from dsmoe_ray.errors import UserError
from dsmoe_ray.inference.engine import Engine
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.inference.sampling_config import SamplingConfig
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer

MAX_SEQ_LEN = 24


@functools.cache
def tokenizer() -> TextTokenizer:
    return train_tokenizer(["the cat sat on the mat. " * 4], vocab_size=270)


@functools.cache
def make_engine(engine_class: type[Engine] = Engine) -> Engine:
    router = {"kind": "linear", "gate_scale": 4.0, "inference": {"mode": "top_k", "top_k": 2}}
    config = ModelConfig.model_validate(
        {
            "vocab_size": 272,
            "d_model": 16,
            "num_layers": 2,
            "max_seq_len": MAX_SEQ_LEN,
            "attention": {"kind": "moa", "num_experts": 2, "num_kv_heads": 1, "head_dim": 8},
            "ffn": {"kind": "moe", "num_experts": 4, "d_ff": 8, "router": router},
            # Large weights, so that tokens differ in likelihood and experts in what they do.
            "init_std": 0.3,
        }
    )
    model = Transformer(config)
    initialize(model, config, seed=1)
    return engine_class(model.requires_grad_(False), tokenizer())


class ScriptedEngine(Engine):
    """Says given tokens, whatever the prompt."""

    script: tuple[int, ...] = ()

    def _forward(self, new_ids, rules, cache):
        logits_V = torch.zeros(272)
        logits_V[next(self._script)] = 1.0
        return logits_V

    def say(self, *token_ids, **request):
        self._script = iter(token_ids)
        return self.generate("the cat", **request)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ("", 4, "the prompt is empty"),
        ("cat", 0, "max_tokens must be at least 1; found 0"),
        ("\udcff", 4, "the prompt is not valid Unicode"),
        ("?!" * 12, 4, "the prompt has 24 tokens; this model takes at most 23"),
    ],
    ids=["empty", "no tokens wanted", "half a surrogate pair", "too long"],
)
def test_a_request_that_cannot_be_served_is_refused_before_anything_runs(prompt, max_tokens, message):
    with pytest.raises(UserError, match=message):
        make_engine().generate(prompt, max_tokens=max_tokens)


def test_token_ids_that_the_model_lacks_are_refused():
    with pytest.raises(UserError, match="has the token id 272; this model's ids are 0 to 271"):
        make_engine().generate_tokens([5, 272], max_tokens=1)


def test_the_longest_possible_prompt_gets_one_token():
    generation = make_engine().generate("?" * (MAX_SEQ_LEN - 1), max_tokens=100)
    "".join(generation)
    assert generation.num_tokens == 1


def test_generation_ends_with_the_token_budget_or_the_longest_sequence():
    engine = make_engine()
    short, long = (list(engine.generate_tokens([5, 6, 7], max_tokens=count)) for count in (4, 1000))
    assert len(short) == 4 and len(long) == MAX_SEQ_LEN - 3
    assert long[:4] == short


def test_the_end_of_text_token_ends_the_text_and_is_not_in_it():
    engine = make_engine(ScriptedEngine)
    words = [int(token) for token in tokenizer().encode(" sat on")]
    generation = engine.say(*words, tokenizer().end_of_text_id, *words, max_tokens=9)
    assert "".join(generation) == " sat on"
    assert generation.num_tokens == len(words)


def test_the_text_is_that_of_the_tokens_and_is_counted():
    engine, prompt = make_engine(), "the cat"
    sampling = SamplingConfig(temperature=1.0, seed=4)
    ids = [int(token) for token in tokenizer().encode(prompt)]
    tokens = list(engine.generate_tokens(ids, max_tokens=12, sampling=sampling))
    generation = engine.generate(prompt, max_tokens=12, sampling=sampling)
    assert prompt + "".join(generation) == tokenizer().decode([*ids, *tokens])
    assert (generation.num_prompt_tokens, generation.num_tokens) == (len(ids), len(tokens))
    assert generation.tokens_per_s > 0 and generation.prefill_s > 0


def test_text_is_computed_as_it_is_read():
    engine = make_engine(ScriptedEngine)
    generation = engine.say(*tokenizer().encode("the mat sat."), max_tokens=20)
    pieces = iter(generation)
    first = next(pieces)
    assert "the mat sat.".startswith(first) and generation.num_tokens == 1


def test_a_model_runs_with_its_deployed_routing_unless_told_otherwise():
    engine = make_engine()
    found = {}
    for spec in ("deployed", "top_k=2", "top_k=1", "dense"):
        rules = resolve_routing(spec, engine.model.config)
        found[spec] = list(engine.generate_tokens([5, 6, 7], max_tokens=20, routing=rules))
    assert list(engine.generate_tokens([5, 6, 7], max_tokens=20)) == found["deployed"] == found["top_k=2"]
    assert found["top_k=1"] != found["deployed"] != found["dense"]


@pytest.mark.parametrize("routing", ["dense", "top_k=2", "threshold=0.9"])
def test_a_sequence_continued_elsewhere_goes_on_with_the_same_tokens(routing):
    engine = make_engine()
    request = {
        "routing": resolve_routing(routing, engine.model.config),
        "sampling": SamplingConfig(temperature=0.8, top_p=0.9, seed=11),
    }
    whole = list(engine.generate_tokens([5, 6, 7], max_tokens=16, **request))
    assert len(set(whole)) > 4
    for so_far in range(1, 16, 5):
        rest = engine.generate_tokens([5, 6, 7, *whole[:so_far]], max_tokens=16 - so_far, **request)
        assert list(rest) == whole[so_far:]


def test_the_seed_decides_the_text():
    texts = {}
    for seed, _ in itertools.product(range(4), range(2)):
        sampling = SamplingConfig(temperature=1.0, seed=seed)
        text = "".join(make_engine().generate("the", max_tokens=10, sampling=sampling))
        assert texts.setdefault(seed, text) == text
    assert len(set(texts.values())) == 4
