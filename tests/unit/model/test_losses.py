"""Each loss against its formula in float64; the head's gradient against finite differences and against PyTorch's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dsmoe_ray.model import losses
from dsmoe_ray.model.losses import (
    IGNORED_TARGET,
    LinearCrossEntropy,
    entropies_and_log_sums,
    linear_cross_entropy,
    load_balance_share,
    mutual_information_share,
    router_entropies,
    router_z_share,
)
from tests.numerics.references import randn

NUM_TOKENS, D_MODEL, VOCAB = 10, 5, 7


@pytest.fixture(params=[1, 3, 4, 10, 1000], ids=lambda rows: f"{rows}-rows")
def rows_per_chunk(request, monkeypatch):
    """Cut the tokens into parts of this many rows; ten tokens give full, ragged and single parts."""
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS_CPU", request.param * VOCAB)
    monkeypatch.setattr(losses, "_MIN_CHUNK_ROWS_CPU", 1)
    return request.param


def make_targets(*, ignored=(0, 4, 9)):
    targets_T = torch.randint(VOCAB, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    targets_T[list(ignored)] = IGNORED_TARGET
    return targets_T


def both_losses(hidden_TD, weight_VD, targets_T, *, weight=0.7):
    """Our loss and PyTorch's with gradients, each scaled as a training step would scale it."""
    results = []
    for run in (linear_cross_entropy, reference_cross_entropy):
        hidden, weights = hidden_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        loss = run(hidden, weights, targets_T)
        (weight * loss).backward()
        results.append((loss.detach(), hidden.grad, weights.grad))
    return results


def reference_cross_entropy(hidden_TD, weight_VD, targets_T):
    return functional.cross_entropy(
        (hidden_TD @ weight_VD.T).float() if hidden_TD.dtype == torch.bfloat16 else hidden_TD @ weight_VD.T,
        targets_T,
        ignore_index=IGNORED_TARGET,
        reduction="sum",
    )


def test_the_heads_gradient_is_that_of_finite_differences(rows_per_chunk):
    hidden_TD, weight_VD = randn(NUM_TOKENS, D_MODEL).requires_grad_(), randn(VOCAB, D_MODEL, seed=1).requires_grad_()
    targets_T = make_targets()
    assert torch.autograd.gradcheck(lambda h, w: LinearCrossEntropy.apply(h, w, targets_T), (hidden_TD, weight_VD))


@pytest.mark.parametrize("ignored", [(), (0, 4, 9), range(NUM_TOKENS)], ids=["none", "some", "all"])
def test_loss_and_gradients_are_pytorchs_in_float64(rows_per_chunk, ignored):
    found, expected = both_losses(
        randn(NUM_TOKENS, D_MODEL), randn(VOCAB, D_MODEL, seed=1), make_targets(ignored=ignored)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_loss_and_gradients_are_pytorchs_in_float32(rows_per_chunk):
    found, expected = both_losses(
        randn(NUM_TOKENS, D_MODEL).float(), randn(VOCAB, D_MODEL, seed=1).float(), make_targets()
    )
    for ours, theirs in zip(found, expected, strict=True):
        # Sums of ten float32 numbers near one, in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32(rows_per_chunk):
    hidden_TD, weight_VD = randn(NUM_TOKENS, D_MODEL).bfloat16(), randn(VOCAB, D_MODEL, seed=1).bfloat16()
    (loss, dhidden, dweight), expected = both_losses(hidden_TD, weight_VD, make_targets())
    assert (loss.dtype, dhidden.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    # Both start from the same bfloat16 logits, so the loss is exact to float32; gradients are rounded to eight bits
    # twice: the logits' gradient before its products, and the result.
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    for ours, theirs in zip((dhidden, dweight), expected[1:], strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0.015 * theirs.abs().max().item())


def test_large_logits_overflow_nothing():
    hidden_TD, weight_VD = 300.0 * randn(NUM_TOKENS, D_MODEL).float(), randn(VOCAB, D_MODEL, seed=1).float()
    for value in both_losses(hidden_TD, weight_VD, make_targets())[0]:
        assert torch.isfinite(value).all()


def test_an_unknown_negative_target_is_an_error_not_class_zero():
    targets_T = make_targets()
    targets_T[1] = -1
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(randn(NUM_TOKENS, D_MODEL), randn(VOCAB, D_MODEL), targets_T)


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_no_gradient_of_the_head(no_grad, monkeypatch):
    """A parameter asks for one even under ``no_grad``; it would triple the head's cost."""
    asked = []
    original = LinearCrossEntropy.forward

    def spy(ctx, *arguments):
        asked.append(any(ctx.needs_input_grad))
        return original(ctx, *arguments)

    monkeypatch.setattr(LinearCrossEntropy, "forward", staticmethod(spy))
    weight = torch.nn.Parameter(randn(VOCAB, D_MODEL))
    with no_grad():
        evaluated = linear_cross_entropy(randn(NUM_TOKENS, D_MODEL), weight, make_targets())
    trained = linear_cross_entropy(randn(NUM_TOKENS, D_MODEL), weight, make_targets())
    assert asked == [False, True]
    assert torch.equal(evaluated, trained.detach())


def mutual_information(logits_TE, *, mean_probs_E=None):
    if mean_probs_E is None:
        mean_probs_E = logits_TE.softmax(-1).mean(0)
    return mutual_information_share(logits_TE, mean_probs_E, num_tokens=len(logits_TE))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 20), st.sampled_from([1, 2, 8, 32]), st.floats(0.0, 200.0))
def test_mutual_information_lies_between_minus_log_n_and_zero(seed, num_tokens, num_experts, sharpness):
    loss = mutual_information(sharpness * randn(num_tokens, num_experts, seed=seed))
    assert -math.log(num_experts) - 1e-12 <= loss.item() <= 1e-12


def test_mutual_information_reaches_both_ends_of_its_range():
    sure_and_balanced = 1e4 * torch.eye(8, dtype=torch.float64).repeat(3, 1)
    assert mutual_information(sure_and_balanced).item() == pytest.approx(-math.log(8), abs=1e-12)
    sure_of_one = 1e4 * torch.eye(8, dtype=torch.float64)[:1].repeat(5, 1)
    for without_information in (torch.zeros(5, 8).double(), sure_of_one, randn(1, 8).expand(5, 8)):
        assert mutual_information(without_information).item() == pytest.approx(0.0, abs=1e-12)


def test_mutual_information_and_its_gradient_are_finite_for_sure_float32_routers():
    """Probabilities underflow to zero here, and an expert may be used by nobody at all."""
    for logits_TE in (200.0 * torch.eye(4).repeat(2, 1), 200.0 * torch.eye(4)[:1].repeat(6, 1)):
        logits_TE.requires_grad_()
        loss = mutual_information(logits_TE)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logits_TE.grad).all()


def test_entropies_are_those_of_the_softmax():
    logits_TE = 3 * randn(6, 5)
    probs_TE = torch.exp(logits_TE) / torch.exp(logits_TE).sum(-1, keepdim=True)
    torch.testing.assert_close(router_entropies(logits_TE), -(probs_TE * probs_TE.log()).sum(-1), rtol=1e-12, atol=0)
    assert router_entropies(torch.zeros(1, 5).double()).item() == pytest.approx(math.log(5), rel=1e-12)


def switch_formula(probs_TE, chosen_T):
    """``E * sum_i f_i P_i``: f the share of tokens sent to expert i, P the mean probability, for top-1 routing."""
    num_experts = probs_TE.shape[1]
    share_E = torch.stack([(chosen_T == expert).double().mean() for expert in range(num_experts)])
    return num_experts * (share_E * probs_TE.mean(0)).sum(), share_E


def test_load_balance_is_the_switch_formula_with_its_gradient():
    probs_TE = randn(12, 4).softmax(-1).requires_grad_()
    expected, share_E = switch_formula(probs_TE, probs_TE.argmax(-1))
    found = load_balance_share(probs_TE, share_E, num_tokens=12)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (ours,), (theirs,) = (torch.autograd.grad(loss, probs_TE) for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_load_balance_is_one_when_even_and_n_when_all_go_to_one():
    even_TE, one_TE = torch.full((8, 4), 0.25), torch.eye(4)[:1].repeat(8, 1)
    assert load_balance_share(even_TE, torch.full((4,), 0.25), num_tokens=8).item() == pytest.approx(1.0)
    assert load_balance_share(one_TE, torch.eye(4)[0], num_tokens=8).item() == pytest.approx(4.0)


def test_router_z_is_the_mean_squared_log_sum_exp():
    logits_TE = 2 * randn(9, 5)
    expected = sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits_TE.tolist()) / 9
    assert router_z_share(logits_TE, num_tokens=9).item() == pytest.approx(expected, rel=1e-12)


def test_no_gradient_flows_into_statistics_of_the_global_batch():
    """They come from an all-reduce; what a rank could add through its own part of them would be its own bias."""
    logits_TE, statistic_E = randn(6, 4).requires_grad_(), torch.full((4,), 0.25).double().requires_grad_()
    for share in (
        mutual_information_share(logits_TE, statistic_E, num_tokens=6),
        load_balance_share(logits_TE.softmax(-1), statistic_E, num_tokens=6),
    ):
        assert torch.autograd.grad(share, statistic_E, allow_unused=True, retain_graph=True) == (None,)


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_shares_of_two_processes_add_up_to_the_whole(cut):
    logits_TE = 2 * randn(12, 4)
    probs_TE = logits_TE.softmax(-1)
    load_E, mean_E = probs_TE.mean(0) ** 2, probs_TE.mean(0)
    for share in (
        lambda part: mutual_information_share(part, mean_E, num_tokens=12),
        lambda part: load_balance_share(part.softmax(-1), load_E, num_tokens=12),
        lambda part: router_z_share(part, num_tokens=12),
    ):
        whole = share(logits_TE)
        torch.testing.assert_close(share(logits_TE[:cut]) + share(logits_TE[cut:]), whole, rtol=1e-12, atol=1e-14)


def test_layers_at_once_are_the_sum_over_layers_with_given_or_own_probabilities():
    logits_LTE = (2 * randn(3, 8, 4)).requires_grad_()
    mean_LE = logits_LTE.detach().softmax(-1).mean(1)
    expected = sum(mutual_information_share(logits_LTE[i], mean_LE[i], num_tokens=8) for i in range(3))
    for probs_LTE in (None, logits_LTE.softmax(-1)):
        found = mutual_information_share(logits_LTE, mean_LE, num_tokens=8, router_probs_TE=probs_LTE)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        (ours,), (theirs,) = (torch.autograd.grad(loss, logits_LTE, retain_graph=True) for loss in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_log_sums_come_without_an_exponential():
    logits_TE = 30 * randn(6, 5)
    _, log_sums_T = entropies_and_log_sums(logits_TE, logits_TE.softmax(-1))
    torch.testing.assert_close(log_sums_T, logits_TE.logsumexp(-1), rtol=1e-12, atol=0)
