"""Requests with a real model: each alone, many at once, and the log probabilities that a plain forward pass gives."""

import functools
from dataclasses import dataclass

import torch

from dsmoe_ray.data.tokenizer import train_tokenizer
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.engine import Engine
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.model.config import RoutingConfig, RoutingMode
from dsmoe_ray.model.layer_routing import deployed_routing
from tests.fakes.runner_kinds import make_model, make_runner

BLOCK_SIZE = 16
CLOSE = {"rtol": 0.0, "atol": 1e-4}
"""Logits agree to a few 1e-5, see ``tests/contract/test_model_runners.py``; log probabilities to twice that."""


@functools.cache
def the_model():
    return make_model(attention="moa", activation="swiglu", router="linear")


@functools.cache
def the_tokenizer():
    return train_tokenizer(["def add(left, right): return left + right\n" * 4], vocab_size=270)


def make_engine(kind, **config):
    """Return an engine over a runner of ``runner_kinds`` with the tiny model."""
    config = EngineConfig(**{"max_num_seqs": 4, "max_batched_tokens": 24, "num_blocks": 64} | config)
    runner = make_runner(kind, the_model(), num_blocks=config.num_blocks)
    return Engine(runner, the_tokenizer(), config)


def make_request(prompt, *, routing="deployed", **fields):
    """Return a request for the tiny model."""
    rules = None if routing == "deployed" else resolve_routing(routing, the_model().config)
    return GenerationRequest(prompt_ids=prompt, routing=rules, **fields)


@dataclass
class Crowd:
    """Requests in an engine that arrive and are cancelled at given steps, and the outputs of each sequence."""

    engine: Engine

    def run(self, arrivals, cancellations=()):
        """Step until nobody is left; return outputs by (request id, sequence index), those of cancelled ones too.

        Args:
            arrivals: ``(step, request)``; the position in this list is the request's id.
            cancellations: ``(step, request id)``.
        """
        outputs, step = {}, 0
        while self.engine.has_work or step <= max(at for at, _ in arrivals):
            for request_id, (at, request) in enumerate(arrivals):
                if at == step:
                    self.engine.add(request_id, request)
            for at, request_id in cancellations:
                if at == step:
                    self.engine.cancel(request_id)
            for output in self.engine.step():
                outputs.setdefault((output.request_id, output.sequence_idx), []).append(output)
            step += 1
        return outputs


@functools.lru_cache(maxsize=4)
def _lonely_engine(kind):
    return make_engine(kind, max_num_seqs=1, max_batched_tokens=100, prefix_cache=False)


def run_alone(kind, request, sequence_idx):
    """Return the outputs that one sequence of a request has in an engine of its own, whole prompts at once."""
    crowd = Crowd(_lonely_engine(kind))
    outputs = crowd.run([(0, request.continue_sequence(sequence_idx, []))])
    return outputs[0, 0]


def without_names(outputs):
    """Return all that outputs say but whose they are."""
    return [(o.token, o.text, o.prompt_logprobs, o.finish_reason, o.stop_reason, o.error) for o in outputs]


def _by_token(rules):
    """Return rules that say of a batch what exact numerics say of each token, whose own count is its threshold's."""
    if rules.ffn.mode is not RoutingMode.THRESHOLD_TOP_K:
        return rules
    assert rules.ffn.threshold <= 1.0, "a higher one may keep no expert, and the count is at least one"
    return rules._replace(ffn=RoutingConfig(mode=RoutingMode.THRESHOLD, threshold=rules.ffn.threshold))


def assert_logprobs_are_the_models(request, outputs):
    """Compare all log probabilities of a sequence with those of one forward pass over it; return how many."""
    model = the_model()
    rules = [_by_token(rule) for rule in request.routing or deployed_routing(model.config)]
    generated = [output.token for output in outputs if output.token is not None]
    tokens = torch.tensor([[*request.prompt_ids, *(token.token_id for token in generated)]])
    logprobs_SV = model(tokens, routing=rules).logits_BSV[0].log_softmax(-1)
    scored = generated if request.sampling.logprobs is not None else []
    positions = list(range(len(request.prompt_ids), len(request.prompt_ids) + len(scored)))
    if outputs[0].prompt_logprobs is not None:
        scored = [*outputs[0].prompt_logprobs, *scored]
        positions = [*range(1, len(request.prompt_ids)), *positions]
    for position, token in zip(positions, scored, strict=True):
        expected_V = logprobs_SV[position - 1]
        named = [(token.token_id, token.logprob), *token.top_logprobs]
        found = torch.tensor([value for _, value in named])
        torch.testing.assert_close(found, expected_V[[token_id for token_id, _ in named]], **CLOSE)
    return len(scored)
