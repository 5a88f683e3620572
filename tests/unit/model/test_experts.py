"""The hand-written gradient of all experts at once against finite differences, and the corners of both paths."""

import pytest
import torch

from dsmoe_ray.model.dispatch import LocalExchange, Ready
from dsmoe_ray.model.experts import DenseExperts, Experts
from tests.numerics.references import randn, sum_of_experts

ACTIVATIONS = pytest.mark.parametrize("activation", ["gelu", "swiglu"])


class ChunkedExchange(LocalExchange):
    """Everything is here; tokens are worked on in parts."""

    def __init__(self, num_chunks):
        self.num_chunks = num_chunks


class TwoOwners(ChunkedExchange):
    """This process twice: a second owner sends the same tokens, so outputs stay and weight gradients double."""

    def start_gather(self, x_TD, gates_TE):
        return Ready((torch.cat([x_TD, x_TD]), torch.cat([gates_TE, gates_TE])))

    def start_reduce(self, y_ND):
        return Ready(y_ND.chunk(2)[0])

    def start_gather_grad(self, dy_TD):
        return Ready(torch.cat([dy_TD, dy_TD]))

    def start_reduce_grad(self, dx_ND, dgates_NL):
        return Ready((dx_ND.chunk(2)[0], dgates_NL.chunk(2)[0]))


class LoggedExchange(ChunkedExchange):
    """Notes in which order parts are started."""

    def __init__(self, num_chunks):
        super().__init__(num_chunks)
        self.log = []

    def start_gather(self, x_TD, gates_TE):
        self.log.append("gather")
        return super().start_gather(x_TD, gates_TE)

    def start_reduce(self, y_ND):
        self.log.append("reduce")
        return super().start_reduce(y_ND)

    def start_gather_grad(self, dy_TD):
        self.log.append("gather_grad")
        return super().start_gather_grad(dy_TD)

    def start_reduce_grad(self, dx_ND, dgates_NL):
        self.log.append("reduce_grad")
        return super().start_reduce_grad(dx_ND, dgates_NL)


def make_experts(activation, *, num_experts=3, d_model=4, d_ff=2, dtype=torch.float64):
    experts = Experts(num_experts=num_experts, d_model=d_model, d_ff=d_ff, activation=activation).to(dtype)
    with torch.no_grad():
        for index, weight in enumerate(experts.parameters()):
            weight.copy_(randn(*weight.shape, seed=10 + index))
    return experts


@ACTIVATIONS
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_gradients_are_those_of_finite_differences(activation, num_chunks):
    wide = [randn(6, 4, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    w3_HD = wide[2] if activation == "swiglu" else None
    x_TD, gates_TE = randn(5, 4, seed=4).requires_grad_(), randn(5, 3, seed=5).requires_grad_()
    exchange = ChunkedExchange(num_chunks)
    inputs = (x_TD, gates_TE, wide[0], wide[1], *([w3_HD] if w3_HD is not None else []))

    def run(x_TD, gates_TE, w1_HD, w2_HD, w3_HD=None):
        return DenseExperts.apply(x_TD, gates_TE, w1_HD, w2_HD, w3_HD, exchange)

    assert torch.autograd.gradcheck(run, inputs)


@ACTIVATIONS
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_gradients_of_all_owners_add_up_in_the_weights(activation, num_chunks):
    x_TD, gates_TE = randn(7, 4, seed=1).requires_grad_(), randn(7, 3, seed=2).requires_grad_()
    results = []
    for exchange in (TwoOwners(num_chunks), LocalExchange()):
        experts = make_experts(activation)
        y_TD = experts(x_TD, gates_TE, None, exchange)
        y_TD.square().sum().backward()
        results.append([y_TD, x_TD.grad, gates_TE.grad, *(weight.grad for weight in experts.parameters())])
        x_TD.grad = gates_TE.grad = None
    two, one = results
    for index, (found, expected) in enumerate(zip(two, one, strict=True)):
        torch.testing.assert_close(found, expected * (2 if index >= 3 else 1), rtol=1e-12, atol=1e-12)


def test_the_next_part_is_on_its_way_before_one_is_computed():
    exchange = LoggedExchange(3)
    experts = make_experts("gelu")
    experts(randn(6, 4).requires_grad_(), randn(6, 3), None, exchange).sum().backward()
    forward = ["gather", "gather", "reduce", "gather", "reduce", "reduce"]
    assert exchange.log == forward + [f"{name}_grad" for name in forward]


@ACTIVATIONS
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_no_buffer_is_read_before_it_is_written(activation, num_chunks):
    """Deterministic mode fills fresh memory with NaN, which any unwritten entry would spread."""
    experts = make_experts(activation)
    x_TD, gates_TE = randn(7, 4, seed=1).requires_grad_(), randn(7, 3, seed=2).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        y_TD = experts(x_TD, gates_TE, None, ChunkedExchange(num_chunks))
        y_TD.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor in (y_TD, x_TD.grad, gates_TE.grad, *(weight.grad for weight in experts.parameters())):
        assert torch.isfinite(tensor).all()


@ACTIVATIONS
@pytest.mark.parametrize("selected", [None, torch.zeros(0, 3, dtype=torch.bool)], ids=["dense", "sparse"])
def test_no_tokens_give_no_output_and_zero_gradients(activation, selected):
    experts = make_experts(activation)
    x_TD = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    y_TD = experts(x_TD, torch.zeros(0, 3, dtype=torch.float64), selected)
    assert y_TD.shape == (0, 4)
    if selected is None:
        y_TD.sum().backward()
        for weight in experts.parameters():
            assert torch.equal(weight.grad, torch.zeros_like(weight))


@ACTIVATIONS
def test_inputs_are_left_as_they_were(activation):
    """The backward pass works in place on buffers of its own."""
    experts = make_experts(activation)
    x_TD, gates_TE, direction = randn(5, 4, seed=1).requires_grad_(), randn(5, 3, seed=2).requires_grad_(), randn(5, 4)
    tensors = [x_TD, gates_TE, direction, *experts.parameters()]
    before = [tensor.detach().clone() for tensor in tensors]
    y_TD = experts(x_TD, gates_TE)
    output = y_TD.detach().clone()
    y_TD.backward(direction, retain_graph=True)
    first = [tensor.grad.clone() for tensor in (x_TD, gates_TE, *experts.parameters())]
    # A second backward pass through the same graph gives the same again, so nothing saved was overwritten.
    y_TD.backward(direction)
    for tensor, copy in zip([*tensors, y_TD], [*before, output], strict=True):
        assert torch.equal(tensor.detach(), copy)
    for tensor, once in zip((x_TD, gates_TE, *experts.parameters()), first, strict=True):
        assert torch.equal(tensor.grad, 2 * once)


def test_a_second_derivative_is_refused_not_wrong():
    x_TD = randn(3, 4).requires_grad_()
    y_TD = make_experts("gelu")(x_TD, randn(3, 3))
    (dx_TD,) = torch.autograd.grad(y_TD.square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx_TD.sum().backward()


@ACTIVATIONS
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_bfloat16_agrees_with_float32_to_its_eight_bits(activation, sparse):
    """Each product chain rounds its operands a handful of times to 2^-9 of their size; sums of 16 to 64 such terms with
    random signs stay within 2 percent of the largest entry. Weights stay float32 and get float32 gradients."""
    sizes = {"num_experts": 4, "d_model": 32, "d_ff": 16}
    gates_TE = randn(24, 4, seed=2).softmax(-1).float()
    selected_TE = gates_TE > 0.2 if sparse else None
    gates_TE = gates_TE * selected_TE if sparse else gates_TE
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        experts = make_experts(activation, **sizes, dtype=torch.float32)
        x_TD = randn(24, 32, seed=1).to(dtype).requires_grad_()
        gates = gates_TE.clone().requires_grad_()
        y_TD = experts(x_TD, gates, selected_TE)
        y_TD.float().square().mean().backward()
        assert y_TD.dtype == dtype and gates.grad.dtype == torch.float32
        assert all(weight.grad.dtype == torch.float32 for weight in experts.parameters())
        results.append([y_TD, x_TD.grad, gates.grad, *(weight.grad for weight in experts.parameters())])
    for exact, rounded in zip(*results, strict=True):
        torch.testing.assert_close(rounded.float(), exact.float(), rtol=0, atol=0.02 * exact.abs().max().item())


@ACTIVATIONS
def test_gelu_is_exact_and_swiglu_gates_with_w1(activation):
    """The tanh approximation of GeLU is off by up to 5e-4, and w1 and w3 of SwiGLU are easily swapped."""
    experts = make_experts(activation)
    x_TD, gates_TE = randn(6, 4, seed=1), torch.eye(3, dtype=torch.float64).repeat(2, 1)
    torch.testing.assert_close(experts(x_TD, gates_TE), sum_of_experts(experts, x_TD, gates_TE), rtol=1e-12, atol=1e-12)
