"""What a host computes is what its router would have computed itself."""

import numpy as np
import pytest
import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.inference.loading import load_model
from dsmoe_ray.inference.row_math import ExactMath
from dsmoe_ray.inference.sparse_experts import LocalExperts, experts_of
from dsmoe_ray.model.dispatch import ExpertAssignment
from dsmoe_ray.serving import expert_compute
from dsmoe_ray.serving.expert_compute import ExpertCompute
from dsmoe_ray.serving.expert_pool import ExpertPool
from dsmoe_ray.serving.wire.messages import ExpertCall
from tests.fakes.runner_kinds import make_experts, with_kernels
from tests.fakes.tiny_artifact import write_tiny_artifact

NUM_EXPERTS, D_MODEL = 6, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# bfloat16 keeps 8 bits: a sum of size two is off by less than this where it is rounded to its nearest.
ROUNDED = 2.0**-7
# More than a pass of the kernels over weights takes, and some that take more than one.
NUM_TOKENS = (1, 3, 19, 50)


@pytest.fixture(scope="module", params=["gelu", "swiglu"])
def directory(request, tmp_path_factory):
    router = {"kind": "linear", "inference": {"mode": "top_k", "top_k": 2}}
    ffn = {"kind": "moe", "num_experts": NUM_EXPERTS, "d_ff": 40, "activation": request.param, "router": router}
    directory = tmp_path_factory.mktemp("artifact") / "artifact"
    return write_tiny_artifact(directory, d_model=D_MODEL, ffn=ffn, init_std=0.15)


def make_compute(directory, dtype, kind):
    pool = ExpertPool(load_artifact(directory), dtype=DTYPES[dtype])
    for layer in range(pool.num_layers):
        # Backwards, so that an expert's slot is not its number.
        for expert_id in reversed(range(pool.num_experts)):
            with pool.pinned(layer, [expert_id]):
                pass
    if kind == "torch":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DSMOE_CPU_KERNELS", "off")
            return ExpertCompute(pool.memory, num_threads=1)
    return with_kernels("cpu native", lambda: ExpertCompute(pool.memory, num_threads=1))


def make_call(num_tokens, *, layer=1, exact=True, dtype="float32", width=4):
    """Return a call whose tokens want none to ``width`` experts each."""
    generator = torch.Generator().manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, D_MODEL, generator=generator).to(DTYPES[dtype])
    ids_TK = np.full((num_tokens, width), -1, np.int32)
    gates_TK = np.zeros((num_tokens, width), np.float32)
    for token in range(num_tokens):
        count = (token + 1) % (width + 1)
        ids_TK[token, :count] = torch.randperm(NUM_EXPERTS, generator=generator)[:count].sort().values
        gates_TK[token, :count] = torch.rand(count, generator=generator)
    return ExpertCall(
        call_id=0,
        layer=layer,
        plan_version=0,
        exact=exact,
        deadline_ms=1000,
        dtype=dtype,
        x_TD=x_TD.numpy() if dtype == "float32" else x_TD.view(torch.uint16).numpy(),
        expert_ids_TK=ids_TK,
        gates_TK=gates_TK,
    )


def compute_locally(directory, call, kind):
    """Return what the router's own experts say, in the type of its model."""
    model = load_model(load_artifact(directory), device=torch.device("cpu"), dtype=call.dtype)
    backend = LocalExperts(experts_of(model), numerics=ExactMath())
    if kind == "kernels":
        backend = make_experts("cpu native", model)
    x_TD = torch.from_numpy(call.x_TD)
    x_TD = x_TD if call.dtype == "float32" else x_TD.view(torch.bfloat16)
    assignment = ExpertAssignment(torch.from_numpy(call.expert_ids_TK), torch.from_numpy(call.gates_TK))
    return backend.combine(backend.dispatch(call.layer, x_TD, assignment))


def add_up(call, y_PD):
    """Add rows as a router does: in float32, from zero, in ascending order of expert ids."""
    rows, y_TD = iter(y_PD), np.zeros((len(call.x_TD), D_MODEL), np.float32)
    for token, ids_K in enumerate(call.expert_ids_TK):
        for _ in range(np.count_nonzero(ids_K >= 0)):
            y_TD[token] += next(rows)
    assert next(rows, None) is None
    return torch.from_numpy(y_TD)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["kernels", "torch"])
def test_exact_rows_add_up_to_the_local_result_bit_for_bit(directory, kind, dtype, num_tokens):
    call = make_call(num_tokens, dtype=dtype)
    [y_PD] = make_compute(directory, dtype, kind).compute([call])
    expected_TD = compute_locally(directory, call, kind)
    assert torch.equal(add_up(call, y_PD).to(expected_TD.dtype), expected_TD)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["kernels", "torch"])
def test_fast_sums_are_close_to_the_local_result(directory, kind, dtype, num_tokens):
    call = make_call(num_tokens, dtype=dtype, exact=False)
    [y_TD] = make_compute(directory, dtype, kind).compute([call])
    expected_TD = compute_locally(directory, call, "torch").float()
    # Up to four terms of size one; slots may be added in another order than ids.
    atol = 1e-5 if dtype == "float32" else 4 * ROUNDED
    torch.testing.assert_close(torch.from_numpy(y_TD), expected_TD, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("kind", ["kernels", "torch"])
def test_merged_calls_get_what_each_gets_alone(directory, kind, exact, monkeypatch):
    calls = [make_call(num_tokens, exact=exact, width=width) for num_tokens, width in ((3, 2), (19, 6), (1, 1))]
    expected = [make_compute(directory, "float32", kind).compute([call])[0] for call in calls]
    # Smaller than the calls together, so that they are computed in parts.
    monkeypatch.setattr(expert_compute, "MAX_TOKENS", 8)
    found = make_compute(directory, "float32", kind).compute(calls)
    for one, other in zip(found, expected, strict=True):
        if exact or kind == "kernels":
            assert np.array_equal(one, other)
        else:
            # PyTorch's products of few and of many rows differ in the last bits.
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_tokens_in_another_type_than_the_experts_are_converted(directory):
    call = make_call(19, dtype="bfloat16")
    [found_PD] = make_compute(directory, "float32", "kernels").compute([call])
    wide = (call.x_TD.astype(np.uint32) << 16).view(np.float32)
    values = {name: getattr(call, name) for name in call.__slots__} | {"x_TD": wide, "dtype": "float32"}
    [expected_PD] = make_compute(directory, "float32", "kernels").compute([ExpertCall(**values)])
    assert np.array_equal(found_PD, expected_PD)
