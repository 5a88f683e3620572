"""The seam between a mixture layer and wherever its experts live.

``TokenExchange`` moves tokens between their owners and the ranks that hold experts while training. ``LocalExchange``
is the one for a single process: every expert is here and nothing moves.

Shape suffixes: T tokens owned here, N tokens seen here (all owners'), D model width, E experts, L experts held here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

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
