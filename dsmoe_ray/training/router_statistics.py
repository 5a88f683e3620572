"""Router statistics of the global batch, and the router losses that need them.

A micro-step adds what its tokens did on this rank; one small all-reduce makes it global. Reported values are those of
the whole step. Gradients of one micro-step use the mean of the micro-steps so far, since later ones are not known yet.

Shape suffixes: T tokens, L layers, E experts.
"""

from collections.abc import Callable, Sequence

import torch

from dsmoe_ray.model.losses import (
    entropies_and_log_sums,
    load_balance_share,
    mutual_information_share,
    router_z_share,
)
from dsmoe_ray.model.router import Routing
from dsmoe_ray.training.config import LossConfig

AllReduceSum = Callable[[torch.Tensor], None]


class MixtureStatistics:
    """Running sums over one step for the mixtures of one kind, attention or FFN, in all layers."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.sums_LX: torch.Tensor | None = None
        """Per layer: probability sums (E), load sums (E), entropy sum, squared log-sum-exp sum."""

    def add(self, sums_LX: torch.Tensor, num_tokens: int) -> None:
        """Add the global sums of one micro-step."""
        self.sums_LX = sums_LX if self.sums_LX is None else self.sums_LX + sums_LX
        self.num_tokens += num_tokens

    @property
    def mean_probs(self) -> torch.Tensor:
        """Mean router probabilities so far ``(L, E)``."""
        assert self.sums_LX is not None
        return self.sums_LX[:, : self._num_experts] / self.num_tokens

    @property
    def load_share(self) -> torch.Tensor:
        """Share of a layer's load that each expert got so far ``(L, E)``; each row sums to one."""
        assert self.sums_LX is not None
        load_LE = self.sums_LX[:, self._num_experts : 2 * self._num_experts]
        return load_LE / load_LE.sum(-1, keepdim=True).clamp_min(1e-20)

    @property
    def _num_experts(self) -> int:
        assert self.sums_LX is not None
        return (self.sums_LX.shape[1] - 2) // 2

    def summary(self) -> dict[str, float]:
        """Return the step's mean-over-layers values: mi, entropy, load_balance, router_z, balance."""
        if self.sums_LX is None:
            return {"mi": 0.0, "entropy": 0.0, "load_balance": 0.0, "router_z": 0.0, "balance": 1.0}
        mean_probs_LE, load_share_LE = self.mean_probs.double(), self.load_share.double()
        entropy_L = self.sums_LX[:, -2].double() / self.num_tokens
        marginal_L = -(mean_probs_LE * mean_probs_LE.clamp_min(1e-30).log()).sum(-1)
        num_experts = self._num_experts
        values = torch.stack(
            [
                (entropy_L - marginal_L).mean(),
                entropy_L.mean(),
                (num_experts * (load_share_LE * mean_probs_LE).sum(-1)).mean(),
                (self.sums_LX[:, -1] / self.num_tokens).double().mean(),
                (num_experts * load_share_LE.amax(-1)).mean(),
            ]
        ).tolist()
        return dict(zip(("mi", "entropy", "load_balance", "router_z", "balance"), values, strict=True))


class StepStatistics:
    """Loss and routing of one optimizer step over the global batch."""

    def __init__(self, all_reduce_sum: AllReduceSum, *, world_size: int) -> None:
        self._all_reduce_sum = all_reduce_sum
        self._world_size = world_size
        self.attention = MixtureStatistics()
        self.ffn = MixtureStatistics()
        self._loss_sum = torch.zeros(())

    @property
    def loss_sum(self) -> float:
        """Summed next-token loss of the step so far over all ranks, in nats."""
        return self._loss_sum.item()

    @torch.no_grad()
    def add_micro_step(
        self, loss_sum: torch.Tensor, attention: Sequence[Routing], ffn: Sequence[Routing], *, num_tokens: int
    ) -> None:
        """Add one micro-step of ``num_tokens`` tokens on this rank, by one all-reduce over all ranks."""
        parts = [_layer_sums(routings) for routings in (attention, ffn)]
        flat = torch.cat([loss_sum.reshape(1).float(), *(part.flatten() for part in parts if part is not None)])
        self._all_reduce_sum(flat)
        self._loss_sum = self._loss_sum.to(flat.device) + flat[0]
        start = 1
        for statistics, part in zip((self.attention, self.ffn), parts, strict=True):
            if part is not None:
                statistics.add(flat[start : start + part.numel()].view_as(part), num_tokens * self._world_size)
                start += part.numel()

    def router_loss(
        self, attention: Sequence[Routing], ffn: Sequence[Routing], config: LossConfig, *, num_tokens: int
    ) -> torch.Tensor | None:
        """Return this rank's weighted share for one micro-step, or None where no router loss is asked for.

        Args:
            attention: Routings of the micro-step, one per layer with a mixture.
            ffn: Likewise.
            config: Weights.
            num_tokens: Tokens of the whole step over all ranks.
        """
        terms = _mutual_information(attention, self.attention, config.mutual_information_attention, num_tokens)
        terms += _mutual_information(ffn, self.ffn, config.mutual_information_ffn, num_tokens)
        for layer, routing in enumerate(ffn):
            if config.load_balance:
                load_share_E = self.ffn.load_share[layer]
                share = load_balance_share(routing.router_probs_TE, load_share_E, num_tokens=num_tokens)
                terms.append(config.load_balance * share)
            if config.router_z:
                terms.append(config.router_z * router_z_share(routing.router_logits_TE, num_tokens=num_tokens))
        return torch.stack(terms).sum() if terms else None

    def router_loss_value(self, config: LossConfig) -> float:
        """Return the weighted router losses of the whole step, summed over layers."""
        attention, ffn = self.attention.summary(), self.ffn.summary()
        num_attention, num_ffn = (
            0 if mixture.sums_LX is None else len(mixture.sums_LX) for mixture in (self.attention, self.ffn)
        )
        value = num_attention * config.mutual_information_attention * attention["mi"]
        per_ffn_layer = (
            config.mutual_information_ffn * ffn["mi"]
            + config.load_balance * ffn["load_balance"]
            + config.router_z * ffn["router_z"]
        )
        return value + num_ffn * per_ffn_layer


def _mutual_information(
    routings: Sequence[Routing], statistics: MixtureStatistics, weight: float, num_tokens: int
) -> list[torch.Tensor]:
    if not weight or not routings:
        return []
    # All layers at once: these tensors are so small that the number of operations is what costs.
    share = mutual_information_share(
        torch.stack([routing.router_logits_TE for routing in routings]),
        statistics.mean_probs,
        num_tokens=num_tokens,
        router_probs_TE=torch.stack([routing.router_probs_TE.detach() for routing in routings]),
    )
    return [weight * share]


def _layer_sums(routings: Sequence[Routing]) -> torch.Tensor | None:
    """Return probability sums, load sums, entropy sum and squared log-sum-exp sum per layer ``(L, 2 E + 2)``."""
    if not routings:
        return None
    logits_LTE = torch.stack([routing.router_logits_TE for routing in routings])
    probs_LTE = torch.stack([routing.router_probs_TE for routing in routings])
    probs_LE = probs_LTE.sum(1)
    # Dense training loads all experts alike; what the router would weigh them by is the telling load.
    load_LE = torch.stack(
        [
            probs_E if routing.selected_TE is None else routing.selected_TE.sum(0).to(probs_E.dtype)
            for routing, probs_E in zip(routings, probs_LE, strict=True)
        ]
    )
    entropies_LT, log_sums_LT = entropies_and_log_sums(logits_LTE, probs_LTE)
    sums_L2 = torch.stack([entropies_LT.sum(1), log_sums_LT.square().sum(1)], dim=1)
    return torch.cat([probs_LE, load_LE, sums_L2], dim=1)
