"""Experts spread over ranks give what the same experts give in one process."""

import pytest
import torch

from dsmoe_ray.errors import ExchangeError
from dsmoe_ray.model.dispatch import LOCAL_EXCHANGE
from dsmoe_ray.model.experts import Experts
from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.parallel.exchange import CollectiveExchange, MessageExchange, build_exchange
from tests.numerics.ranks import run_in_world

# Some ten seconds and more as a whole.
pytestmark = pytest.mark.slow

T, D, F, E = 12, 16, 8, 8
WAYS = [MessageExchange, CollectiveExchange]
# float32 sums of a few hundred products in another order; values are of order one.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
# Partial outputs are rounded to bfloat16 (8 bits) once on the way.
BFLOAT16 = {"rtol": 2e-2, "atol": 2e-2}


def _draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _transport(world, way, dtype):
    """Return what each of the four transfers brought, and what it had to bring."""
    exchange = way(world)
    n, me, L = world.config.ep, world.ep_rank, E // world.config.ep
    x = [_draw(rank, T, D, dtype=dtype) for rank in range(n)]
    gates = [_draw(10 + rank, T, E) for rank in range(n)]
    y = [_draw(20 + rank, n * T, D, dtype=dtype) for rank in range(n)]
    dgates = [_draw(30 + rank, n * T, L) for rank in range(n)]
    mine = slice(me * T, (me + 1) * T)
    # All four at once, as the chunks of a layer overlap.
    pending = [
        exchange.start_gather(x[me], gates[me]),
        exchange.start_reduce(y[me]),
        exchange.start_gather_grad(x[me]),
        exchange.start_reduce_grad(y[me], dgates[me]),
    ]
    (x_ND, gates_NL), y_TD, dy_ND, (dx_TD, dgates_TE) = [part.wait() for part in pending]
    total = torch.stack([part[mine].float() for part in y]).sum(0).to(dtype)
    exact = {
        "tokens": (x_ND, torch.cat(x)),
        "gates": (gates_NL, torch.cat(gates)[:, me * L : (me + 1) * L]),
        "output gradients": (dy_ND, torch.cat(x)),
        "gate gradients": (dgates_TE, torch.cat([part[mine] for part in dgates], dim=1)),
    }
    return exact, {"outputs": (y_TD, total), "input gradients": (dx_TD, total)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS, ids=["messages", "collectives"])
@pytest.mark.parametrize("ep", [2, 4])
def test_each_transfer_brings_every_owners_part_in_order(ep, way, dtype):
    for exact, summed in run_in_world(_transport, ParallelConfig(ep=ep), way, dtype):
        for name, (found, expected) in exact.items():
            assert torch.equal(found, expected), name
        for name, (found, expected) in summed.items():
            torch.testing.assert_close(found, expected, msg=name, **(FLOAT32 if dtype == torch.float32 else BFLOAT16))


def _ordered_sums(world):
    exchange = build_exchange(world)
    partials = [_draw(rank, 3 * T, D) * 10.0**rank for rank in range(3)]
    mine = slice(world.ep_rank * T, (world.ep_rank + 1) * T)
    found = exchange.start_reduce(partials[world.ep_rank]).wait()
    return torch.equal(found, (partials[0][mine] + partials[1][mine]) + partials[2][mine])


def test_partial_outputs_are_added_in_rank_order_to_the_bit():
    assert run_in_world(_ordered_sums, ParallelConfig(ep=3)) == [True] * 3


def _experts(activation):
    experts = Experts(num_experts=E, d_model=D, d_ff=F, activation=activation)
    with torch.no_grad():
        for index, parameter in enumerate(experts.parameters()):
            parameter.copy_(_draw(100 + index, *parameter.shape) / D**0.5)
    return experts


def _run_experts(experts, x_TD, gates_TE, selected_TE, weights_of_loss_TD, exchange):
    """Return the output and the gradients of tokens, gates and weights."""
    x_TD, gates_TE = x_TD.clone().requires_grad_(), gates_TE.clone().requires_grad_()
    y_TD = experts(x_TD, gates_TE, selected_TE, exchange)
    (y_TD.float() * weights_of_loss_TD).sum().backward()
    weight_grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return y_TD.detach(), x_TD.grad, gates_TE.grad, weight_grads


def _inputs(num_owners, num_tokens_of_owner, select):
    """Return tokens, gates, selection and loss weights per owner."""
    inputs = []
    for owner in range(num_owners):
        num_tokens = num_tokens_of_owner[owner]
        gates = _draw(40 + owner, num_tokens, E).softmax(-1)
        selected = select(owner, num_tokens)
        if selected is not None:
            gates = torch.where(selected, gates, 0.0)
        inputs.append((_draw(50 + owner, num_tokens, D), gates, selected, _draw(60 + owner, num_tokens, D)))
    return inputs


def _spread(world, activation, inputs, way):
    experts = _experts(activation)
    L = E // world.config.ep
    with torch.no_grad():
        for name, parameter in list(experts.named_parameters()):
            mine = parameter[world.ep_rank * L : (world.ep_rank + 1) * L].clone()
            setattr(experts, name, torch.nn.Parameter(mine))
    exchange = build_exchange(world) if way is None else way(world)
    return _run_experts(experts, *inputs[world.rank], exchange)


def _assert_spread_equals_whole(results, activation, inputs):
    x, gates, selected, loss_weights = zip(*inputs, strict=True)
    whole_selection = None if selected[0] is None else torch.cat(selected)
    y, dx, dgates, dweights = _run_experts(
        _experts(activation),
        torch.cat(x),
        torch.cat(gates),
        whole_selection,
        torch.cat(loss_weights),
        LOCAL_EXCHANGE,
    )
    torch.testing.assert_close(torch.cat([result[0] for result in results]), y, **FLOAT32)
    torch.testing.assert_close(torch.cat([result[1] for result in results]), dx, **FLOAT32)
    torch.testing.assert_close(torch.cat([result[2] for result in results]), dgates, **FLOAT32)
    for name, expected in dweights.items():
        torch.testing.assert_close(torch.cat([result[3][name] for result in results]), expected, msg=name, **FLOAT32)


@pytest.mark.parametrize("way", WAYS, ids=["messages", "collectives"])
@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_dense_experts_on_two_ranks_equal_one_process(activation, num_chunks, way):
    inputs = _inputs(2, [T, T], lambda owner, num_tokens: None)
    config = ParallelConfig(ep=2, exchange_chunks=num_chunks)
    _assert_spread_equals_whole(run_in_world(_spread, config, activation, inputs, way), activation, inputs)


def _top_3(owner, num_tokens):
    scores = _draw(70 + owner, num_tokens, E)
    return scores >= scores.topk(3, dim=-1).values[:, -1:]


def _first_rank_only(owner, num_tokens):
    """Select experts of rank 0 only, and none at all for every third token."""
    selected = torch.zeros(num_tokens, E, dtype=torch.bool)
    selected[:, 1] = True
    selected[::3] = False
    return selected


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    ("num_tokens", "select"),
    [([T, T], _top_3), ([T, 5], _top_3), ([T, 0], _top_3), ([T, T], _first_rank_only)],
    ids=["top 3", "unequal numbers of tokens", "an owner without tokens", "a rank that no token selects"],
)
def test_sparse_experts_on_two_ranks_equal_one_process(num_tokens, select, activation):
    inputs = _inputs(2, num_tokens, select)
    results = run_in_world(_spread, ParallelConfig(ep=2), activation, inputs, None)
    _assert_spread_equals_whole(results, activation, inputs)


def _disagree(world):
    exchange = build_exchange(world)
    num_tokens = T + world.rank
    try:
        exchange.start_gather(torch.ones(num_tokens, D), torch.ones(num_tokens, E))
    except ExchangeError as error:
        return str(error)
    return "no error"


def test_ranks_that_hold_different_numbers_of_tokens_are_told_so():
    for message in run_in_world(_disagree, ParallelConfig(ep=2)):
        assert f"found [{T}, {T + 1}] by ep rank" in message
