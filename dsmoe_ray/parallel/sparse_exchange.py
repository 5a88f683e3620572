"""The sparse all-to-all: each token visits only the ranks that hold an expert it selected. For the sparse baseline.

How many tokens travel is known only once the router has chosen, so the ranks first tell each other their counts and the
host waits for them, in every layer: the price of sparse training that the dense exchange does not pay.

Shape suffixes: T tokens owned here, S (token, rank) pairs sent from here, N tokens received here, D model width,
E experts, L experts held here, n ranks of the group.
"""

from typing import Any, NamedTuple

import torch
from torch import distributed

from dsmoe_ray.model.dispatch import RunSparse
from dsmoe_ray.parallel.collectives import start_all_to_all
from dsmoe_ray.parallel.mesh import World


class _Routes(NamedTuple):
    """How many tokens go to and come from each rank of the group."""

    group: distributed.ProcessGroup
    num_sent: list[int]
    num_received: list[int]

    def back(self) -> "_Routes":
        return _Routes(self.group, self.num_received, self.num_sent)


def sparse_expert_parallel(
    x_TD: torch.Tensor, gates_TE: torch.Tensor, selected_TE: torch.Tensor, *, world: World, run_experts: RunSparse
) -> torch.Tensor:
    """Run each token's selected experts where they are; differentiable in tokens, gates and the experts' weights.

    Args:
        x_TD: Tokens owned here ``(T, D)``; ranks may own different numbers, also none.
        gates_TE: Float32 gates ``(T, E)``.
        selected_TE: Which experts each token uses ``(T, E)``, bool.
        world: Gives the ``ep`` group.
        run_experts: Runs the experts held here on ``(N, D)``, ``(N, L)``, ``(N, L)``.

    Returns:
        The sum over each token's experts ``(T, D)``, added in rank order; zero for a token without any.

    Raises:
        ExchangeError: a peer is dead, hung or unreachable.
    """
    num_tokens, num_ranks = len(x_TD), world.config.ep
    by_rank_TnL = (num_tokens, num_ranks, gates_TE.shape[1] // num_ranks)
    selected_TnL = selected_TE.view(by_rank_TnL)
    wanted_nT = selected_TnL.any(-1).t()
    ranks_S, tokens_S = wanted_nT.nonzero(as_tuple=True)
    routes = _agree_on_routes(wanted_nT.sum(1), world.group("ep"))
    x_ND, gates_NL = _SendTokens.apply(x_TD[tokens_S], gates_TE.view(by_rank_TnL)[tokens_S, ranks_S], routes)
    selected_NL = _send(selected_TnL[tokens_S, ranks_S].view(torch.uint8), routes, "sparse selection").bool()
    y_ND = _run_on_some(x_ND, gates_NL, selected_NL, run_experts)
    y_SD = _ReturnOutputs.apply(y_ND, routes)
    y_TD = torch.zeros_like(x_TD)
    # One rank at a time: the tokens of one rank are distinct, so that the order of additions is fixed.
    for tokens, part in zip(tokens_S.split(routes.num_sent), y_SD.split(routes.num_sent), strict=True):
        y_TD = y_TD.index_add(0, tokens, part)
    return y_TD


class _SendTokens(torch.autograd.Function):
    """Tokens and gates to the ranks that run them; gradients come back. One node, so one order on all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x_SD: torch.Tensor, gates_SL: torch.Tensor, routes: _Routes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.routes = routes
        return _send(x_SD, routes, "sparse tokens"), _send(gates_SL, routes, "sparse gates")

    @staticmethod
    def backward(ctx: Any, dx_ND: torch.Tensor, dgates_NL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        routes = ctx.routes.back()
        dx_SD = _send(dx_ND, routes, "sparse token gradients")
        return dx_SD, _send(dgates_NL, routes, "sparse gate gradients"), None


class _ReturnOutputs(torch.autograd.Function):
    """Outputs to the tokens' owners; their gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, y_ND: torch.Tensor, routes: _Routes) -> torch.Tensor:
        ctx.routes = routes
        return _send(y_ND, routes.back(), "sparse outputs")

    @staticmethod
    def backward(ctx: Any, dy_SD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _send(dy_SD, ctx.routes, "sparse output gradients"), None


def _run_on_some(
    x_ND: torch.Tensor, gates_NL: torch.Tensor, selected_NL: torch.Tensor, run_experts: RunSparse
) -> torch.Tensor:
    """Run the experts on at least one token.

    Without any, the outputs would not depend on weights or tokens, and this rank's backward pass would skip the
    collectives in which its peers wait for it.
    """
    if len(x_ND) > 0:
        return run_experts(x_ND, gates_NL, selected_NL)
    x_1D = torch.cat([x_ND, x_ND.new_zeros(1, x_ND.shape[1])])
    gates_1L = torch.cat([gates_NL, gates_NL.new_zeros(1, gates_NL.shape[1])])
    return run_experts(x_1D, gates_1L, torch.ones_like(gates_1L, dtype=torch.bool))[:0]


def _agree_on_routes(num_sent_n: torch.Tensor, group: distributed.ProcessGroup) -> _Routes:
    num_sent_n = num_sent_n.cpu()
    num_received_n = torch.empty_like(num_sent_n)
    start_all_to_all(num_received_n, num_sent_n, group, "sparse token counts").wait()
    return _Routes(group, num_sent_n.tolist(), num_received_n.tolist())


def _send(rows_S: torch.Tensor, routes: _Routes, name: str) -> torch.Tensor:
    received_N = rows_S.new_empty(sum(routes.num_received), *rows_S.shape[1:])
    start_all_to_all(
        received_N,
        rows_S.contiguous(),
        routes.group,
        name,
        rows_received=routes.num_received,
        rows_sent=routes.num_sent,
    ).wait()
    return received_N
