"""Losses. Each returns this process's share of a sum over the global batch, so that shares and gradients just add up.

Shape suffixes: T tokens here, D model width, V vocabulary, E experts.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORED_TARGET = -100
# Logits formed at a time: on a CPU they stay in its cache, and a GPU is kept busy.
_CHUNK_ELEMENTS_CPU = 1 << 20
_CHUNK_ELEMENTS_GPU = 1 << 22
# The head's weights are read, and their gradient is added to, once a chunk: a large vocabulary gets this many rows.
_MIN_CHUNK_ROWS_CPU = 256
_MIN_CHUNK_ROWS_GPU = 1024


def linear_cross_entropy(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Return the summed loss of ``LinearCrossEntropy``; under ``no_grad``, no gradient is computed."""
    if not torch.is_grad_enabled():
        # A custom function is told that a leaf wants a gradient even under no_grad, and would compute it.
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    return LinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T)


class LinearCrossEntropy(torch.autograd.Function):
    """Output head and next-token cross-entropy in one, a chunk of tokens at a time.

    The logits ``(T, V)`` never exist at once: gradients of a chunk are formed while its logits are at hand, so the
    backward pass only scales them.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        """Return the summed loss in nats over targets that are not ``IGNORED_TARGET``, a scalar in float32 or wider."""
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        total = hidden_TD.new_zeros((), dtype=dtype)
        dhidden_TD = torch.empty_like(hidden_TD) if needs_grad else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs_grad else None
        chunk = _rows_per_chunk(weight_VD)
        for start in range(0, hidden_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = functional.linear(hidden_TD[rows], weight_VD).to(dtype)
            valid = (targets_T[rows] != IGNORED_TARGET).unsqueeze(-1)
            targets = targets_T[rows].unsqueeze(-1).masked_fill(~valid, 0)
            target_logits = logits.gather(-1, targets)
            # One buffer from logits to their gradient, and one exponential: each pass over it counts.
            largest = logits.amax(-1, keepdim=True)
            exponentials = logits.sub_(largest).exp_()
            sums = exponentials.sum(-1, keepdim=True)
            total += ((largest + sums.log() - target_logits) * valid).sum()
            if dhidden_TD is not None and dweight_VD is not None:
                dlogits = exponentials.mul_(valid / sums).scatter_add_(-1, targets, -valid.to(dtype))
                dlogits = dlogits.to(hidden_TD.dtype)
                torch.mm(dlogits, weight_VD, out=dhidden_TD[rows])
                if dweight_VD.dtype == dlogits.dtype:
                    dweight_VD.addmm_(dlogits.t(), hidden_TD[rows])
                else:
                    dweight_VD += dlogits.t() @ hidden_TD[rows]
        ctx.save_for_backward(dhidden_TD, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Scale the gradients formed in the forward pass."""
        dhidden_TD, dweight_VD = ctx.saved_tensors
        return dhidden_TD * dtotal, (dweight_VD * dtotal).to(ctx.weight_dtype), None


def _rows_per_chunk(weight_VD: torch.Tensor) -> int:
    on_cpu = weight_VD.device.type == "cpu"
    elements, min_rows = (
        (_CHUNK_ELEMENTS_CPU, _MIN_CHUNK_ROWS_CPU) if on_cpu else (_CHUNK_ELEMENTS_GPU, _MIN_CHUNK_ROWS_GPU)
    )
    return max(elements // weight_VD.shape[0], min_rows)


def router_entropies(router_logits_TE: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each token's router probabilities ``(T,)``, in nats."""
    return entropies_and_log_sums(router_logits_TE, router_logits_TE.softmax(-1))[0]


def entropies_and_log_sums(
    router_logits_TE: torch.Tensor, router_probs_TE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the entropy of each token's router probabilities and the log-sum-exp of its logits, ``(T,)`` each."""
    shifted_TE, log_sums_T1 = _shift(router_logits_TE, router_probs_TE)
    entropies_T = log_sums_T1.squeeze(-1) - (router_probs_TE * shifted_TE).sum(-1)
    return entropies_T, router_logits_TE.amax(-1) + log_sums_T1.squeeze(-1)


def _shift(router_logits_TE: torch.Tensor, router_probs_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits less their largest, and the logarithm of the sum of their exponentials ``(T, 1)``.

    The largest probability is one over that sum. So neither exponentials nor a log_softmax are needed, which on a CPU
    take longer than everything else about routers together.
    """
    return router_logits_TE - router_logits_TE.amax(-1, keepdim=True), -router_probs_TE.amax(-1, keepdim=True).log()


def mutual_information_share(
    router_logits_TE: torch.Tensor,
    mean_probs_E: torch.Tensor,
    *,
    num_tokens: int,
    router_probs_TE: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reward routers that are sure per token yet use all experts over the global batch.

    The loss is ``-H(mean_x S) + mean_x H(S | x)``. With the mean held fixed, ``sum_i S_i log(mean_i)`` has the value
    and, as probabilities sum to one, the gradient of its first term; so every process can compute its own share.

    Args:
        router_logits_TE: Router outputs before softmax of the tokens here ``(T, E)``; or of several layers at once,
            ``(L, T, E)``.
        mean_probs_E: Mean router probabilities over the global batch ``(E,)``, or ``(L, E)``; it gets no gradient.
        num_tokens: Tokens of the global batch.
        router_probs_TE: Softmax of the logits, where it is at hand; the gradient goes to the logits all the same.

    Returns:
        Scalar in nats, summed over layers; the shares of all processes sum to the loss, in ``[-log E, 0]`` for each
        layer. Lower is better.

    Source:
        Pan et al., "Dense Training, Sparse Inference", arXiv:2404.05567.
    """
    probs_TE = (router_logits_TE.detach().softmax(-1) if router_probs_TE is None else router_probs_TE).detach()
    log_mean_E = mean_probs_E.detach().clamp_min(torch.finfo(mean_probs_E.dtype).tiny).log()
    return _MutualInformation.apply(router_logits_TE, probs_TE, log_mean_E.unsqueeze(-2)) / num_tokens


class _MutualInformation(torch.autograd.Function):
    """Sum over tokens of ``sum_i S_i (log(mean_i) - log(S_i))``; keeps nothing but its gradient."""

    @staticmethod
    def forward(
        ctx: Any, router_logits_TE: torch.Tensor, router_probs_TE: torch.Tensor, log_mean_1E: torch.Tensor
    ) -> torch.Tensor:
        shifted_TE, log_sums_T1 = _shift(router_logits_TE, router_probs_TE)
        log_ratio_TE = torch.sub(log_mean_1E, shifted_TE, out=shifted_TE).add_(log_sums_T1)
        loss_T1 = (router_probs_TE * log_ratio_TE).sum(-1, keepdim=True)
        ctx.save_for_backward(log_ratio_TE.sub_(loss_T1).mul_(router_probs_TE))
        return loss_T1.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (dlogits_TE,) = ctx.saved_tensors
        return dlogits_TE * dloss, None, None


def load_balance_share(router_probs_TE: torch.Tensor, load_share_E: torch.Tensor, *, num_tokens: int) -> torch.Tensor:
    """Return this process's share of the Switch load-balance loss ``E * sum_i load_share_i * mean_prob_i``.

    Args:
        router_probs_TE: Router probabilities of the tokens here ``(T, E)``.
        load_share_E: Share of all (token, expert) assignments of the global batch that went to each expert ``(E,)``.
        num_tokens: Tokens of the global batch.

    Returns:
        Scalar; 1 when balanced, up to E when all tokens go to one expert.

    Source:
        Fedus et al., "Switch Transformers", arXiv:2101.03961.
    """
    num_experts = router_probs_TE.shape[-1]
    return num_experts * (router_probs_TE * load_share_E.detach()).sum() / num_tokens


def router_z_share(router_logits_TE: torch.Tensor, *, num_tokens: int) -> torch.Tensor:
    """Return this process's share of the mean squared log-sum-exp of router logits.

    Source:
        Zoph et al., "ST-MoE", arXiv:2202.08906.
    """
    return router_logits_TE.logsumexp(-1).square().sum() / num_tokens
