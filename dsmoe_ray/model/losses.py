"""Losses. Each returns this process's share of a sum over the global batch, so that shares and gradients just add up.

Shape suffixes: T tokens here, D model width, V vocabulary, E experts.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORED_TARGET = -100
_CHUNK_ELEMENTS = 1 << 22


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
        chunk = max(1, _CHUNK_ELEMENTS // weight_VD.shape[0])
        for start in range(0, hidden_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = functional.linear(hidden_TD[rows], weight_VD).to(dtype)
            valid = targets_T[rows] != IGNORED_TARGET
            targets = targets_T[rows].masked_fill(~valid, 0).unsqueeze(-1)
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += ((log_sum - logits.gather(-1, targets)).squeeze(-1) * valid).sum()
            if dhidden_TD is not None and dweight_VD is not None:
                probs = logits.sub_(log_sum).exp_()
                probs.scatter_add_(-1, targets, probs.new_full((), -1.0).expand_as(targets))
                dlogits = probs.mul_(valid.unsqueeze(-1)).to(hidden_TD.dtype)
                dhidden_TD[rows] = dlogits @ weight_VD
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


def router_entropies(router_logits_TE: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each token's router probabilities ``(T,)``, in nats."""
    log_probs_TE = router_logits_TE.log_softmax(-1)
    return -(log_probs_TE.exp() * log_probs_TE).sum(-1)


def mutual_information_share(
    router_logits_TE: torch.Tensor, mean_probs_E: torch.Tensor, *, num_tokens: int
) -> torch.Tensor:
    """Reward routers that are sure per token yet use all experts over the global batch.

    The loss is ``-H(mean_x S) + mean_x H(S | x)``. With the mean held fixed, ``sum_i S_i log(mean_i)`` has the value
    and, as probabilities sum to one, the gradient of its first term; so every process can compute its own share.

    Args:
        router_logits_TE: Router outputs before softmax of the tokens here ``(T, E)``.
        mean_probs_E: Mean router probabilities over the global batch ``(E,)``; no gradient flows into it.
        num_tokens: Tokens of the global batch.

    Returns:
        Scalar in nats; the shares of all processes sum to the loss, in ``[-log E, 0]``. Lower is better.

    Source:
        Pan et al., "Dense Training, Sparse Inference", arXiv:2404.05567.
    """
    log_probs_TE = router_logits_TE.log_softmax(-1)
    log_mean_E = mean_probs_E.detach().clamp_min(torch.finfo(mean_probs_E.dtype).tiny).log()
    return (log_probs_TE.exp() * (log_mean_E - log_probs_TE)).sum() / num_tokens


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
