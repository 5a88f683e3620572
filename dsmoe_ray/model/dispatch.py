"""The seam between a mixture layer and wherever its experts live.

``TokenExchange`` moves tokens between their owners and the ranks that hold experts while training. ``LocalExchange``
is the one for a single process: every expert is here and nothing moves. ``ExpertBackend`` is the seam of inference,
where every token names the few experts that it wants.

Shape suffixes: T tokens owned here, N tokens seen here (all owners'), D model width, E experts, L experts held here,
K most experts that a token of the batch wants.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)

RunSparse = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Sparse experts held here: ``(x (N, D), gates (N, L), selected (N, L) bool) -> y (N, D)``, differentiable."""


class Pending(Protocol[V_co]):
    """A value on its way."""

    def wait(self) -> V_co:
        """Return the value, blocking until it is here."""


class TokenExchange(Protocol):
    """How the tokens of several owners meet the experts held here, and the way back for outputs and gradients.

    Tokens of all owners are ordered by owner. Outputs and gradients are summed over owners, never averaged.
    """

    num_chunks: int
    """Parts a layer's tokens are cut into, so that moving one part hides behind computing another."""

    def local_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the part of an expert weight held here, differentiably."""

    def start_gather(self, x_TD: torch.Tensor, gates_TE: torch.Tensor) -> Pending[tuple[torch.Tensor, torch.Tensor]]:
        """Bring every owner's tokens here with their gates for the experts held here: ``(N, D)`` and ``(N, L)``."""

    def start_reduce(self, y_ND: torch.Tensor) -> Pending[torch.Tensor]:
        """Send partial outputs back to their owners; the value is the sum for the tokens owned here ``(T, D)``."""

    def start_gather_grad(self, dy_TD: torch.Tensor) -> Pending[torch.Tensor]:
        """Bring every owner's output gradients here ``(N, D)``."""

    def start_reduce_grad(
        self, dx_ND: torch.Tensor, dgates_NL: torch.Tensor
    ) -> Pending[tuple[torch.Tensor, torch.Tensor]]:
        """Send input gradients back, summed, and gate gradients, side by side: ``(T, D)`` and ``(T, E)``."""

    def run_sparse(
        self, x_TD: torch.Tensor, gates_TE: torch.Tensor, selected_TE: torch.Tensor, run: RunSparse
    ) -> torch.Tensor:
        """Send each token only to ranks that hold experts it selected; return the sums ``(T, D)``, differentiably."""


@dataclass(frozen=True)
class Ready(Generic[V]):
    """A value that is already here."""

    value: V

    def wait(self) -> V:
        """Return the value."""
        return self.value


class LocalExchange:
    """All experts and all tokens are in this process."""

    num_chunks = 1

    def local_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight itself."""
        return weight

    def start_gather(self, x_TD: torch.Tensor, gates_TE: torch.Tensor) -> Ready[tuple[torch.Tensor, torch.Tensor]]:
        """Return tokens and gates as they are."""
        return Ready((x_TD, gates_TE))

    def start_reduce(self, y_ND: torch.Tensor) -> Ready[torch.Tensor]:
        """Return outputs as they are."""
        return Ready(y_ND)

    def start_gather_grad(self, dy_TD: torch.Tensor) -> Ready[torch.Tensor]:
        """Return output gradients as they are."""
        return Ready(dy_TD)

    def start_reduce_grad(
        self, dx_ND: torch.Tensor, dgates_NL: torch.Tensor
    ) -> Ready[tuple[torch.Tensor, torch.Tensor]]:
        """Return gradients as they are."""
        return Ready((dx_ND, dgates_NL))

    def run_sparse(
        self, x_TD: torch.Tensor, gates_TE: torch.Tensor, selected_TE: torch.Tensor, run: RunSparse
    ) -> torch.Tensor:
        """Run the selected experts here."""
        return run(x_TD, gates_TE, selected_TE)


LOCAL_EXCHANGE = LocalExchange()


class ExpertAssignment(NamedTuple):
    """Which FFN experts of one layer each token wants, and with what weight; both ``(T, K)`` and contiguous."""

    expert_ids_TK: torch.Tensor
    """int32, ascending per token, then -1 where a token wants fewer than K."""
    gates_TK: torch.Tensor
    """Float32; zero where the id is -1."""
    all_experts: bool = False
    """Every token wants every expert: K = E and each row is 0, 1, ... E - 1."""


class ExpertBackend(Protocol):
    """Computes what FFN experts say to tokens, here or elsewhere. Calls are pure functions of their arguments."""

    def dispatch(self, layer: int, x_TD: torch.Tensor, assignment: ExpertAssignment) -> Any:
        """Send tokens to the experts that they want; return a handle for ``combine`` at once.

        Args:
            layer: Whose experts.
            x_TD: Normed hidden states in the compute type. Neither they nor the assignment change before ``combine``.
            assignment: Who wants whom.
        """

    def combine(self, handle: Any) -> torch.Tensor:
        """Wait for the outputs; return their gated sums ``(T, D)``, zeros where none is wanted.

        They are float32 or of the type of ``x_TD``.

        With exact numerics each output row is computed by itself, weighed, and added in float32 in ascending order of
        expert ids, so that it does not depend on who else is in the batch or on where an expert lives.
        """
