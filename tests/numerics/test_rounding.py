"""What float32 and bfloat16 cost the experts, whole and cut into parts, against float64.

``python -m pytest -s -q tests/numerics/test_rounding.py`` prints the table of docs/numerics.md.
"""

import pytest
import torch

from dsmoe_ray.model.dispatch import LocalExchange
from dsmoe_ray.model.experts import Experts
from tests.numerics.references import randn

NUM_EXPERTS, D_MODEL, D_FF, NUM_TOKENS = 8, 128, 64, 512


class ChunkedExchange(LocalExchange):
    """Everything is here, but tokens are worked on in parts."""

    def __init__(self, num_chunks):
        self.num_chunks = num_chunks


def run(activation, dtype, num_chunks):
    """Return the output and all gradients of one layer of experts; weights are float32, as in training."""
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    experts = Experts(num_experts=NUM_EXPERTS, d_model=D_MODEL, d_ff=D_FF, activation=activation).to(parameter_dtype)
    with torch.no_grad():
        for index, weight in enumerate(experts.parameters()):
            # The same float32 numbers for every type, so that only the computation differs.
            weight.copy_(randn(*weight.shape, seed=index).float() * D_MODEL**-0.5)
    x_TD = randn(NUM_TOKENS, D_MODEL, seed=10).bfloat16().to(dtype).requires_grad_()
    gates_TE = randn(NUM_TOKENS, NUM_EXPERTS, seed=11).softmax(-1).float().to(parameter_dtype).requires_grad_()
    y_TD = experts(x_TD, gates_TE, None, ChunkedExchange(num_chunks))
    (y_TD * randn(NUM_TOKENS, D_MODEL, seed=12).bfloat16().to(dtype)).sum().backward()
    results = {"output": y_TD.detach(), "dx": x_TD.grad, "dgates": gates_TE.grad}
    return results | {f"d{name}": weight.grad for name, weight in experts.named_parameters()}


def compare(found, exact):
    """Return the deviation over the norm, by tensor."""
    return {name: ((found[name].double() - exact[name]).norm() / exact[name].norm()).item() for name in exact}


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    # Unit roundoff is 6e-8 and 4e-3; a value passes half a dozen roundings and sums of up to 512 such terms.
    [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)],
    ids=["float32", "bfloat16"],
)
def test_experts_round_as_their_type_says_whatever_the_number_of_parts(activation, dtype, bound):
    exact = run(activation, torch.float64, 1)
    whole = run(activation, dtype, 1)
    for num_chunks in (1, 2, 4, 8):
        found = run(activation, dtype, num_chunks)
        deviations = compare(found, exact)
        print(f"\n{activation} {num_chunks} parts:", *(f"{name} {value:.1e}" for name, value in deviations.items()))
        assert max(deviations.values()) < bound
        for name in ("output", "dx", "dgates"):
            # A token's own results never meet other tokens; rows of one GEMM may only be blocked differently.
            assert compare({name: found[name]}, {name: whole[name].double()})[name] < bound / 4
