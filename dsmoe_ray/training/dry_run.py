"""One training step of one rank on ``meta`` tensors, which have shapes and no memory: proves shapes, at any size.

The model, the losses and the optimizer are the real ones; only what other ranks would send is made up, with the shapes
it would have. FSDP2 and torch.compile are left out, since they change no shape that the mathematics sees.

Shape suffixes: B sequences, S positions, T tokens owned here, N tokens of all owners, D model width, E experts, L
experts held here.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.model.config import MoeConfig
from dsmoe_ray.model.dispatch import RunSparse
from dsmoe_ray.model.transformer import Transformer
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.router_statistics import StepStatistics
from dsmoe_ray.training.schedule import compute_training_routing

V = TypeVar("V")
Pair = tuple[torch.Tensor, torch.Tensor]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Rehearsal:
    """What was gone through."""

    num_ranks: int
    num_sequences: int
    seq_len: int
    num_layers: int
    num_parameters: int
    num_tensors: int
    num_gradients: int
    """Parameter tensors that got a gradient; those of experts do not where training is sparse."""

    def describe(self) -> str:
        """Return it in one line."""
        return (
            f"dry run: rank 0 of {self.num_ranks}, {self.num_sequences} x {self.seq_len} tokens through "
            f"{self.num_layers} layers, forward, losses, backward and update on shapes alone; "
            f"{self.num_parameters:,} parameters in {self.num_tensors} tensors, {self.num_gradients} with a gradient."
        )


@dataclass(frozen=True)
class Sent(Generic[V]):
    """A made-up value that is here at once."""

    value: V

    def wait(self) -> V:
        """Return it."""
        return self.value


class RehearsedExchange:
    """The dense all-to-all as rank 0 of an ``ep`` group sees it, with peers that send nothing but shapes."""

    def __init__(self, *, ep: int, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        self._ep = ep

    def local_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the experts held here."""
        return weight[: weight.shape[0] // self._ep]

    def start_gather(self, x_TD: torch.Tensor, gates_TE: torch.Tensor) -> Sent[Pair]:
        """Make up all owners' tokens ``(N, D)`` and gates for the experts held here ``(N, L)``."""
        num_tokens, num_experts = gates_TE.shape
        x_ND = x_TD.new_empty(self._ep * num_tokens, x_TD.shape[1])
        return Sent((x_ND, gates_TE.new_empty(self._ep * num_tokens, num_experts // self._ep)))

    def start_reduce(self, y_ND: torch.Tensor) -> Sent[torch.Tensor]:
        """Make up the sum for the tokens owned here ``(T, D)``."""
        return Sent(y_ND.new_empty(y_ND.shape[0] // self._ep, y_ND.shape[1]))

    def start_gather_grad(self, dy_TD: torch.Tensor) -> Sent[torch.Tensor]:
        """Make up all owners' output gradients ``(N, D)``."""
        return Sent(dy_TD.new_empty(self._ep * dy_TD.shape[0], dy_TD.shape[1]))

    def start_reduce_grad(self, dx_ND: torch.Tensor, dgates_NL: torch.Tensor) -> Sent[Pair]:
        """Make up the sums for the tokens owned here ``(T, D)`` and ``(T, E)``."""
        num_tokens = dx_ND.shape[0] // self._ep
        dgates_TE = dgates_NL.new_empty(num_tokens, self._ep * dgates_NL.shape[1])
        return Sent((dx_ND.new_empty(num_tokens, dx_ND.shape[1]), dgates_TE))

    def run_sparse(
        self, x_TD: torch.Tensor, gates_TE: torch.Tensor, selected_TE: torch.Tensor, run: RunSparse
    ) -> torch.Tensor:
        """Make up outputs ``(T, D)``: how many tokens an expert gets depends on values, which are not there."""
        return x_TD * gates_TE.sum(-1, keepdim=True).to(x_TD.dtype)


def rehearse_step(config: TrainingRunConfig) -> Rehearsal:
    """Go through one micro-step and the update of rank 0 without memory or data.

    Raises:
        ConfigError: shapes do not fit; names the first that does not.
    """
    train = config.train
    num_sequences, seq_len = config.sequences_per_micro_step, train.seq_len
    try:
        with torch.device("meta"):
            model = Transformer(
                config.model,
                compute_dtype=_DTYPES[train.dtype],
                activation_checkpointing=train.activation_checkpointing,
            )
            _run_micro_step(model, config, num_sequences=num_sequences)
        # Outside the block: the optimizer reads its step count, which must have a value.
        torch.optim.AdamW(model.parameters(), lr=train.lr, betas=train.betas, foreach=False).step()
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(f"the shapes of this run do not fit: {error}") from error
    parameters = list(model.parameters())
    return Rehearsal(
        num_ranks=config.parallel.world_size,
        num_sequences=num_sequences,
        seq_len=seq_len,
        num_layers=config.model.num_layers,
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_tensors=len(parameters),
        num_gradients=sum(parameter.grad is not None for parameter in parameters),
    )


def _run_micro_step(model: Transformer, config: TrainingRunConfig, *, num_sequences: int) -> None:
    train, parallel = config.train, config.parallel
    tokens_BS = torch.zeros(num_sequences, train.seq_len, dtype=torch.int64)
    document_ids_BS = torch.zeros_like(tokens_BS) if config.data.document_boundaries else None
    statistics = StepStatistics(lambda sums: None, world_size=parallel.world_size)
    mixture = isinstance(config.model.ffn, MoeConfig)
    output = model(
        tokens_BS,
        targets_BS=tokens_BS,
        document_ids_BS=document_ids_BS,
        routing=compute_training_routing(0, train, config.model, seed=config.run.seed),
        exchange=RehearsedExchange(ep=parallel.ep if mixture else 1, num_chunks=parallel.exchange_chunks),
    )
    assert output.loss_sum is not None
    attention, ffn = output.attention_routings, output.ffn_routings
    statistics.add_micro_step(output.loss_sum, attention, ffn, num_tokens=tokens_BS.numel())
    router_loss = statistics.router_loss(attention, ffn, train.loss, num_tokens=train.num_tokens_per_step)
    loss = output.loss_sum / train.num_tokens_per_step
    (loss if router_loss is None else loss + router_loss).backward()
