"""What a decode step costs at least."""

import pytest
import torch

from dsmoe_ray.bench.roofline import CountingExperts, StepCost, compute_step_cost, find_kept
from dsmoe_ray.model.accounting import compute_forward_flops
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.dispatch import ExpertAssignment


def make_config(**changes) -> ModelConfig:
    router = {"kind": "linear", "inference": {"mode": "top_k", "top_k": 2}}
    values = {
        "vocab_size": 100,
        "d_model": 16,
        "num_layers": 3,
        "max_seq_len": 32,
        "tie_embeddings": True,
        "attention": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
        "ffn": {"kind": "moe", "num_experts": 8, "d_ff": 4, "activation": "swiglu", "router": router},
    }
    return ModelConfig.model_validate(values | changes)


def test_a_step_reads_weights_once_and_keys_and_values_of_every_sequence():
    one, four = (
        compute_step_cost(make_config(), batch_size=batch, context_tokens=10, distinct_experts=5, weight_bytes=2)
        for batch in (1, 4)
    )
    keys_and_values = 3 * 2 * 2 * 8 * 10 * 2
    assert four.num_bytes - one.num_bytes == 3 * keys_and_values
    assert four.flops == 4 * one.flops


def test_an_expert_more_is_its_matrices_in_every_layer_and_no_flops():
    five, six = (
        compute_step_cost(make_config(), batch_size=4, context_tokens=10, distinct_experts=used, weight_bytes=4)
        for used in (5, 6)
    )
    assert six.num_bytes - five.num_bytes == 3 * 3 * 16 * 4 * 4
    assert six.flops == five.flops


def test_flops_are_those_of_the_experts_that_a_token_keeps_and_of_all_in_the_twin():
    config = make_config()
    assert find_kept(config).ffn == 2 and find_kept(config.dense_twin()).ffn is None
    twin = compute_step_cost(
        config.dense_twin(), batch_size=1, context_tokens=10, distinct_experts=None, weight_bytes=4
    )
    assert twin.flops == compute_forward_flops(config.dense_twin(), context_tokens=10)


@pytest.mark.parametrize(("bytes_per_s", "expected_s"), [(10.0, 10.0), (1000.0, 2.0)], ids=["memory", "arithmetic"])
def test_the_longer_of_both_times_is_the_bound(bytes_per_s, expected_s):
    assert StepCost(num_bytes=100.0, flops=40.0).time_s(bytes_per_s=bytes_per_s, flops_per_s=20.0) == expected_s


class Echo:
    def dispatch(self, layer, x_TD, assignment):
        return x_TD

    def combine(self, handle):
        return handle


def test_distinct_experts_are_counted_over_decode_steps_only():
    counting = CountingExperts(Echo(), batch_size=2)
    gates = torch.ones(2, 2)
    for ids in ([[0, 1], [1, 2]], [[3, -1], [3, -1]]):
        x_TD = torch.zeros(2, 4)
        handle = counting.dispatch(0, x_TD, ExpertAssignment(torch.tensor(ids, dtype=torch.int32), gates))
        assert counting.combine(handle) is x_TD
    counting.dispatch(0, torch.zeros(3, 4), ExpertAssignment(torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)))
    assert counting.mean_distinct == (3 + 1) / 2
