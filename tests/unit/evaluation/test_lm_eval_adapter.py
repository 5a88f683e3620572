"""What the harness asks and what it gets, with a model that says what the test wants."""

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra evaluation is not installed")

from dsmoe_ray.errors import DsmoeError, RequestError, UserError
from dsmoe_ray.evaluation.lm_eval_adapter import EngineModel
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.engine import Engine
from dsmoe_ray.inference.generation import Generator
from dsmoe_ray.inference.routing import resolve_routing
from tests.fakes.scripted_runner import ScriptedRunner, say
from tests.fakes.tiny_artifact import make_config, make_tokenizer

CONFIG = make_config()
TOKENIZER = make_tokenizer(CONFIG)


def ids(text):
    return [int(token) for token in TOKENIZER.encode(text)]


def make_model(next_logits, *, routing=None, **config):
    """Return the adapter and the runner under it."""
    config = EngineConfig(**{"block_size": 4, "max_num_seqs": 4, "max_batched_tokens": 12} | config)
    runner = ScriptedRunner(CONFIG, next_logits, block_size=4, num_blocks=40)
    return EngineModel(Generator(Engine(runner, TOKENIZER, config)), routing=routing), runner


def ask(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def uniform(tokens):
    return torch.zeros(CONFIG.vocab_size)


def test_a_continuation_is_scored_and_the_context_is_not():
    text = ids("def add") + ids(" left")
    model, _ = make_model(say(CONFIG.vocab_size, {tuple(text[:1]): text[1:]}))
    [(total, is_greedy), (other, is_other_greedy)] = model.loglikelihood(
        ask(("def add", " left"), ("def add", " right")), disable_tqdm=True
    )
    each = 1 - math.log(math.e + CONFIG.vocab_size - 1)
    assert total == pytest.approx(each * len(ids(" left")), abs=1e-5) and is_greedy
    assert other < total and not is_other_greedy


def test_a_text_longer_than_the_model_is_scored_in_windows_each_token_once():
    model, runner = make_model(uniform)
    num_tokens = 80
    text = "?" * num_tokens
    assert len(ids(text)) == num_tokens and model.max_length == CONFIG.max_seq_len - 1 == 31
    [total] = model.loglikelihood_rolling(ask((text,)), disable_tqdm=True)
    assert total == pytest.approx(-num_tokens * math.log(CONFIG.vocab_size), rel=1e-6)
    assert model.loglikelihood_rolling(ask(("",)), disable_tqdm=True) == [0]
    # The last window has 18 tokens to score and all the context that there is room for.
    assert sum(map(sum, runner.batches)) == 3 * 32


def test_more_requests_than_may_wait_are_computed_in_turns():
    model, _ = make_model(uniform, max_waiting=3)
    scores = model.loglikelihood(ask(*[("def", " left")] * 10), disable_tqdm=True)
    assert len(scores) == 10 and len(set(scores)) == 1


def test_texts_go_on_until_a_stop_or_their_length():
    said = ids(" left = right + return")
    model, _ = make_model(say(CONFIG.vocab_size, {tuple(ids("def")): said}))
    texts = model.generate_until(
        ask(
            ("def", {"until": [" + ", ""], "max_gen_toks": 25, "do_sample": False}),
            ("def", {"until": "zz", "max_gen_toks": len(said)}),
        )
    )
    assert texts == [" left = right", " left = right + return"]


def test_a_context_without_room_loses_its_beginning():
    seen = []
    model, _ = make_model(lambda tokens: seen.append(tokens) or uniform(tokens))
    model.generate_until(ask(("?!" * 40, {"max_gen_toks": 5})))
    assert seen[0] == ids("?!" * 40)[-26:]


def test_a_task_that_samples_gets_the_same_text_again_and_other_requests_others():
    model, _ = make_model(uniform)
    requests = ask(*[("def", {"max_gen_toks": 10, "do_sample": True, "temperature": 1.0})] * 3)
    texts = model.generate_until(requests)
    assert len(set(texts)) == 3 and model.generate_until(requests) == texts


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ({"num_beams": 4}, UserError, "generation with num_beams; the engine knows temperature"),
        ({"max_gen_toks": 31}, RequestError, "31 tokens, which leaves no room"),
    ],
    ids=["beams", "too long"],
)
def test_what_the_engine_cannot_do_is_refused(wanted, error, message):
    model, _ = make_model(uniform)
    with pytest.raises(error, match=message):
        model.generate_until(ask(("def", wanted)))


def test_a_broken_model_is_told():
    model, _ = make_model(lambda tokens: torch.full((CONFIG.vocab_size,), math.nan))
    with pytest.raises(DsmoeError, match="not finite"):
        model.loglikelihood(ask(("def", " left")), disable_tqdm=True)


def test_rules_given_are_rules_used():
    rules = resolve_routing("dense", CONFIG)
    model, runner = make_model(uniform, routing=rules)
    seen = []
    run = runner.run
    runner.run = lambda batch: seen.append(batch.rules) or run(batch)
    model.loglikelihood(ask(("def", " left")), disable_tqdm=True)
    model.generate_until(ask(("def", {"max_gen_toks": 1})))
    assert set(seen) == {(tuple(rules),)}
