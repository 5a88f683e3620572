"""The mutual-information loss is that of the global batch: on one rank, on two, and over micro-steps.

``python -m pytest -s -q tests/numerics/test_mutual_information.py -k deviation`` prints the table of docs/numerics.md.

Shape suffixes: T tokens, D model width, E experts, M micro-steps.
"""

import numpy as np
import pytest
import torch

from dsmoe_ray.model.losses import mutual_information_share
from dsmoe_ray.model.router import Routing
from dsmoe_ray.parallel.collectives import all_reduce_sum_
from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.training.config import LossConfig
from dsmoe_ray.training.router_statistics import StepStatistics
from tests.numerics.ranks import run_in_world
from tests.numerics.references import randn

WEIGHTS = LossConfig(mutual_information_attention=0.5, mutual_information_ffn=2.0)


def formula(logits_TE):
    """``-H(mean_x S) + mean_x H(S | x)`` as it is written, with the gradient through the mean."""
    probs_TE = torch.exp(logits_TE) / torch.exp(logits_TE).sum(-1, keepdim=True)
    mean_E = probs_TE.mean(0)
    entropy_of_mean = -(mean_E * mean_E.log()).sum()
    mean_of_entropy = -(probs_TE * probs_TE.log()).sum(-1).mean()
    return mean_of_entropy - entropy_of_mean


def numpy_formula(logits_TE):
    scores = np.exp(logits_TE.detach().numpy())
    probs = scores / scores.sum(-1, keepdims=True)
    mean = probs.mean(0)
    return (mean * np.log(mean)).sum() - (probs * np.log(probs)).sum(-1).mean()


def to_routing(logits_TE):
    probs_TE = logits_TE.softmax(-1)
    return Routing(logits_TE, probs_TE, probs_TE, None)


def run_step(micro_steps, *, all_reduce_sum=lambda tensor: None, world_size=1):
    """What a rank's training step does with its routers; every micro-step is ``(attention logits, ffn logits)``, each a
    list over layers. Return the statistics and the sum of the micro-steps' losses after their backward passes."""
    num_tokens = sum(len(ffn[0]) for _, ffn in micro_steps) * world_size
    statistics = StepStatistics(all_reduce_sum, world_size=world_size)
    total = 0.0
    for attention_logits, ffn_logits in micro_steps:
        attention, ffn = ([to_routing(logits_TE) for logits_TE in logits] for logits in (attention_logits, ffn_logits))
        statistics.add_micro_step(torch.zeros(()), attention, ffn, num_tokens=len(ffn_logits[0]))
        loss = statistics.router_loss(attention, ffn, WEIGHTS, num_tokens=num_tokens)
        loss.backward()
        total += loss.item()
    return statistics, total


def make_logits(num_tokens, num_experts, *, seed, sharpness=2.0):
    return (sharpness * randn(num_tokens, num_experts, seed=seed)).requires_grad_()


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 20.0])
def test_the_share_of_all_tokens_is_the_formula_in_value_and_gradient(sharpness):
    """The share holds the mean fixed; the formula differentiates through it. Their gradients are equal all the same."""
    logits_TE = make_logits(40, 8, seed=0, sharpness=sharpness)
    found = mutual_information_share(logits_TE, logits_TE.softmax(-1).mean(0), num_tokens=40)
    expected = formula(logits_TE)
    assert found.item() == pytest.approx(numpy_formula(logits_TE), rel=1e-10, abs=1e-13)
    (ours,), (theirs,) = (torch.autograd.grad(loss, logits_TE) for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("cut", [1, 13, 20])
def test_shares_of_two_ranks_with_the_global_mean_add_up_in_value_and_gradient(cut):
    logits_TE = make_logits(40, 8, seed=0)
    mean_E = logits_TE.softmax(-1).mean(0)
    parts = [part.detach().requires_grad_() for part in (logits_TE[:cut], logits_TE[cut:])]
    shares = [mutual_information_share(part, mean_E, num_tokens=40) for part in parts]
    expected = formula(logits_TE)
    assert sum(share.item() for share in shares) == pytest.approx(expected.item(), rel=1e-12)
    (whole,) = torch.autograd.grad(expected, logits_TE)
    found = torch.cat([torch.autograd.grad(share, part)[0] for share, part in zip(shares, parts, strict=True)])
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-15)


def two_layers(num_tokens, *, seed):
    """Logits of two attention mixtures of 4 experts and two FFN mixtures of 8."""
    return [[make_logits(num_tokens, num_experts, seed=seed + layer) for layer in (0, 1)] for num_experts in (4, 8)]


def test_a_step_on_one_rank_has_the_formulas_value_and_gradient_summed_over_layers():
    micro_step = two_layers(48, seed=3)
    statistics, total = run_step([micro_step])
    terms = [
        weight * formula(logits_TE)
        for weight, logits in zip((0.5, 2.0), micro_step, strict=True)
        for logits_TE in logits
    ]
    expected = torch.stack(terms).sum()
    assert total == pytest.approx(expected.item(), rel=1e-12)
    assert statistics.router_loss_value(WEIGHTS) == pytest.approx(expected.item(), rel=1e-12)
    for logits_TE in [*micro_step[0], *micro_step[1]]:
        (gradient,) = torch.autograd.grad(expected, logits_TE, retain_graph=True)
        torch.testing.assert_close(logits_TE.grad, gradient, rtol=1e-10, atol=1e-15)


def cut_step(micro_step, part):
    return [[logits_TE.detach()[part].requires_grad_() for logits_TE in logits] for logits in micro_step]


def _step_on_a_rank(world):
    """Run this rank's half of the tokens against its peer's by real all-reduces."""
    part = slice(24 * world.rank, 24 * (world.rank + 1))
    micro_steps = [cut_step(two_layers(48, seed=seed), part) for seed in (3, 50)]
    statistics, total = run_step(
        micro_steps,
        all_reduce_sum=all_reduce_sum_,
        world_size=world.world_size,
    )
    gradients = [logits_TE.grad for step in micro_steps for logits in step for logits_TE in logits]
    return statistics.router_loss_value(WEIGHTS), total, gradients


def test_value_and_gradient_are_the_same_on_one_rank_and_two():
    """Two micro-steps of 48 tokens, whole on one rank and halved between two that really exchange their statistics."""
    whole = [two_layers(48, seed=seed) for seed in (3, 50)]
    statistics, total = run_step(whole)
    one_rank = [logits_TE.grad for step in whole for logits in step for logits_TE in logits]
    results = run_in_world(_step_on_a_rank, ParallelConfig(dp_replicate=2))
    for value, _, _ in results:
        assert value == pytest.approx(statistics.router_loss_value(WEIGHTS), rel=1e-10)
    assert sum(share for _, share, _ in results) == pytest.approx(total, rel=1e-10)
    for expected, *halves in zip(one_rank, *(gradients for _, _, gradients in results), strict=True):
        torch.testing.assert_close(torch.cat(halves), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("num_micro_steps", [1, 2, 3, 8])
def test_the_reported_value_is_the_whole_batchs_however_it_is_cut(num_micro_steps):
    logits_TE = make_logits(48, 8, seed=0)
    micro_steps = [([], [part.detach().requires_grad_()]) for part in logits_TE.chunk(num_micro_steps)]
    statistics, _ = run_step(micro_steps)
    assert statistics.ffn.summary()["mi"] == pytest.approx(numpy_formula(logits_TE), rel=1e-12)


def test_the_gradients_deviation_is_bounded_by_the_change_of_the_log_mean():
    """With d the running minus the final log mean, a token's logits' gradient is off by ``S * (d - <S, d>) / T``, whose
    absolute sum is at most half the range of d over T. So the sum over all tokens is at most the micro-steps' mean of
    that half range."""
    logits_TE = make_logits(64, 8, seed=0)
    (exact_TE,) = torch.autograd.grad(2.0 * formula(logits_TE), logits_TE)
    parts = [part.detach().requires_grad_() for part in logits_TE.chunk(4)]
    run_step([([], [part]) for part in parts])
    probs_TE = logits_TE.detach().softmax(-1)
    running = [probs_TE[: 16 * (index + 1)].mean(0).log() - probs_TE.mean(0).log() for index in range(4)]
    bound = 2.0 * sum((delta_E.max() - delta_E.min()).item() / 2 for delta_E in running) / 4
    deviation = (torch.cat([part.grad for part in parts]) - exact_TE).abs().sum().item()
    assert 0.05 * bound < deviation <= bound
    # The last micro-step knows the mean of the whole batch.
    torch.testing.assert_close(parts[-1].grad, exact_TE[48:], rtol=1e-9, atol=1e-15)


# Routers from nearly uniform, as after initialisation, to nearly sure, as after training.
SHARPNESSES = (0.1, 1.0, 4.0)
NUM_EXPERTS, D_MODEL, SEQ_LEN, SEQUENCES_PER_MICRO_STEP = 32, 64, 128, 8


def make_tokens(num_micro_steps, *, seed, topic_share):
    """Token vectors of unit variance; ``topic_share`` of it is common to the tokens of one sequence."""
    num_sequences = num_micro_steps * SEQUENCES_PER_MICRO_STEP
    own = randn(num_sequences, SEQ_LEN, D_MODEL, seed=seed)
    topic = randn(num_sequences, 1, D_MODEL, seed=seed + 1)
    return (own * (1 - topic_share) ** 0.5 + topic * topic_share**0.5).flatten(0, 1)


def measure(num_micro_steps, *, sharpness, seed, topic_share):
    """Return how far the gradient of a router's weight is from that of the whole batch's loss, relative to its norm:
    as trained, with the running mean of the micro-steps; and for comparison, if each only used its own mean."""
    x_TD = make_tokens(num_micro_steps, seed=seed, topic_share=topic_share)
    weight_ED = (sharpness * D_MODEL**-0.5 * randn(NUM_EXPERTS, D_MODEL, seed=seed + 2)).requires_grad_()
    parts = x_TD.chunk(num_micro_steps)
    (exact_ED,) = torch.autograd.grad(2.0 * formula(x_TD @ weight_ED.T), weight_ED)
    (own_ED,) = torch.autograd.grad(2.0 * sum(formula(part @ weight_ED.T) for part in parts) / len(parts), weight_ED)
    run_step([([], [part @ weight_ED.T]) for part in parts])
    return [((gradient - exact_ED).norm() / exact_ED.norm()).item() for gradient in (weight_ED.grad, own_ED)]


@pytest.mark.parametrize(
    ("topic_share", "bounds"),
    [(0.0, (0.006, 0.025, 0.125)), (0.5, (0.2, 0.25, 0.7))],
    ids=["independent-tokens", "sequences-with-topics"],
)
def test_the_gradients_deviation_over_micro_steps_stays_within_the_documented_figure(topic_share, bounds):
    """Micro-steps of 1024 tokens in 8 sequences, 32 experts. The bounds are the figures of docs/numerics.md with a
    quarter of room for other random numbers."""
    print(f"\n{topic_share=}: sharpness, micro-steps, deviation with the running mean, with own means only")
    for sharpness, bound in zip(SHARPNESSES, bounds, strict=True):
        for num_micro_steps in (2, 4, 8):
            running, own = measure(num_micro_steps, sharpness=sharpness, seed=0, topic_share=topic_share)
            print(f"  {sharpness:3.1f}  {num_micro_steps}  {running:.4f}  {own:.4f}")
            assert running < bound
