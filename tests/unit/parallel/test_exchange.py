"""Packing tokens with their gates, and sums in rank order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_ray.model.dispatch import LOCAL_EXCHANGE
from dsmoe_ray.parallel.collectives import all_reduce_sum_, join_world, leave_world
from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.parallel.exchange import build_exchange, pack_rows, unpack_rows


@given(
    num_tokens=st.integers(0, 5),
    d_model=st.integers(1, 40),
    num_experts=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_packed_rows_come_out_bit_for_bit(num_tokens, d_model, num_experts, dtype):
    x_TD = torch.randn(num_tokens, d_model).to(dtype)
    gates_TE = torch.rand(num_tokens, num_experts)
    packed = pack_rows(x_TD, gates_TE)
    assert packed.shape[1] % 16 == 0
    found_x, found_gates = unpack_rows(packed, x_TD, gates_TE)
    assert torch.equal(found_x, x_TD)
    assert torch.equal(found_gates, gates_TE)


def test_a_world_of_one_rank_needs_no_network_and_no_exchange():
    world = join_world(ParallelConfig(), rank=0, address="no address", port=-1, device=torch.device("cpu"))
    assert build_exchange(world) is LOCAL_EXCHANGE
    assert all_reduce_sum_(torch.tensor(3.0)).item() == 3.0
    leave_world()


def test_a_world_of_one_rank_has_no_process_groups():
    world = join_world(ParallelConfig(), rank=0, address="", port=0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="has no process group along 'ep'"):
        world.group("ep")
