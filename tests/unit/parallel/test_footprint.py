"""Memory and traffic of one rank: formulas by hand, and against what autograd really keeps."""

import pytest
import torch

from dsmoe_ray.model.accounting import count_parameters
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.losses import mutual_information_share
from dsmoe_ray.model.transformer import Transformer
from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.parallel.footprint import StepShape, compute_rank_memory, compute_rank_traffic, count_held_parameters

BATCH, SEQ_LEN = 2, 16
TOKENS = BATCH * SEQ_LEN


def make_model(*, num_layers=2, attention="moa", ffn="moe", activation="gelu", router=None) -> ModelConfig:
    router = router or {"kind": "mlp", "d_hidden": 96}
    attentions = {
        "moa": {"kind": "moa", "num_experts": 6, "num_kv_heads": 2, "head_dim": 16, "router": router},
        "gqa": {"kind": "gqa", "num_heads": 12, "num_kv_heads": 2, "head_dim": 16},
    }
    ffns = {
        "moe": {"kind": "moe", "num_experts": 8, "d_ff": 40, "activation": activation, "router": router},
        "dense": {"kind": "dense", "d_ff": 320, "activation": activation},
    }
    return ModelConfig.model_validate(
        {
            "vocab_size": 512,
            "d_model": 128,
            "num_layers": num_layers,
            "max_seq_len": SEQ_LEN,
            "attention": attentions[attention],
            "ffn": ffns[ffn],
        }
    )


def count_kept_bytes(config: ModelConfig, step: StepShape) -> int:
    """Return the bytes of distinct storages that autograd keeps for the backward pass, parameters apart."""
    dtype = getattr(torch, step.dtype)
    model = Transformer(config, compute_dtype=dtype, activation_checkpointing=step.activation_checkpointing)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive, bytes_by_storage = [], {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Kept alive, so that no two storages share an address.
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            bytes_by_storage[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens_BS = torch.zeros(BATCH, SEQ_LEN, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(tokens_BS, targets_BS=tokens_BS)
        losses = [output.loss_sum]
        for routing in output.attention_routings + output.ffn_routings:
            mean_probs = routing.router_probs_TE.mean(0).detach()
            losses.append(mutual_information_share(routing.router_logits_TE, mean_probs, num_tokens=TOKENS))
        assert sum(losses).requires_grad
    return sum(bytes_by_storage.values())


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="moa and moe"),
        pytest.param({"activation": "swiglu", "router": {"kind": "linear"}}, id="swiglu, linear routers"),
        pytest.param({"attention": "gqa", "ffn": "dense", "activation": "swiglu"}, id="dense"),
    ],
)
def test_a_layer_adds_what_autograd_keeps(shape, dtype, checkpointing):
    step = StepShape(TOKENS, dtype=dtype, activation_checkpointing=checkpointing)
    measured, predicted = [], []
    for num_layers in (1, 3):
        config = make_model(num_layers=num_layers, **shape)
        memory = compute_rank_memory(config, ParallelConfig(), step)
        measured.append(count_kept_bytes(config, step))
        predicted.append(memory.activations_bytes + memory.working_copies_bytes)
    # Left out of the formulas: reciprocal roots of norms and bfloat16 gates, a few bytes a token.
    assert predicted[1] - predicted[0] == pytest.approx(measured[1] - measured[0], rel=0.01)


@pytest.mark.parametrize(
    ("trunk", "ep", "dp_shard", "trunk_shards"),
    [
        pytest.param("replicate", 1, 1, 1, id="one rank"),
        pytest.param("replicate", 4, 1, 1, id="experts over 4"),
        pytest.param("replicate", 2, 2, 1, id="experts over 2 x 2"),
        pytest.param("shard", 2, 2, 4, id="all over 2 x 2"),
    ],
)
def test_each_rank_holds_its_share(trunk, ep, dp_shard, trunk_shards):
    config = make_model()
    counts = count_parameters(config)
    trunk_held, experts_held = count_held_parameters(config, ParallelConfig(trunk=trunk, ep=ep, dp_shard=dp_shard))
    assert trunk_held == (counts.total - counts.ffn) // trunk_shards
    assert experts_held == counts.ffn // (ep * dp_shard)


def test_replicas_hold_as_much_as_one_rank_and_a_dense_ffn_belongs_to_the_trunk():
    config = make_model(ffn="dense")
    assert count_held_parameters(config, ParallelConfig(dp_replicate=4)) == (count_parameters(config).total, 0)


def test_master_state_is_sixteen_bytes_a_parameter():
    memory = compute_rank_memory(make_model(), ParallelConfig(ep=2), StepShape(TOKENS))
    held = sum(count_held_parameters(make_model(), ParallelConfig(ep=2)))
    assert memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes == 16 * held
    assert memory.working_copies_bytes == 0
    assert memory.total_bytes > 16 * held + memory.activations_bytes


@pytest.mark.parametrize(("device", "gathered_gates"), [("cpu", 2), ("cuda", 8)])
def test_exchange_counts_tokens_and_gates_both_ways(device, gathered_gates):
    config, parallel = make_model(), ParallelConfig(ep=4, device=device)
    step = StepShape(TOKENS, num_micro_steps=5, dtype="bfloat16")
    traffic = compute_rank_traffic(config, parallel, step)
    tokens, gates = 4 * 2 * 128, 4 * (gathered_gates + 2)
    assert traffic.exchange_per_layer_bytes == 5 * 3 * TOKENS * (tokens + gates)
    assert traffic.exchange_bytes == 2 * traffic.exchange_per_layer_bytes


def test_full_checkpointing_repeats_the_forward_exchange():
    config, parallel = make_model(), ParallelConfig(ep=2)
    plain = compute_rank_traffic(config, parallel, StepShape(TOKENS))
    full = compute_rank_traffic(config, parallel, StepShape(TOKENS, activation_checkpointing="full"))
    forward = 2 * (4 * 128) + 4 * 4
    assert full.exchange_bytes - plain.exchange_bytes == 2 * TOKENS * (forward)
    assert plain.exchange_bytes == 2 * TOKENS * (2 * forward)


def test_one_rank_sends_nothing():
    traffic = compute_rank_traffic(make_model(), ParallelConfig(), StepShape(TOKENS))
    memory = compute_rank_memory(make_model(), ParallelConfig(), StepShape(TOKENS))
    assert (traffic.exchange_bytes, traffic.reduction_bytes, traffic.gather_bytes) == (0, 0, 0)
    assert memory.gathered_tokens_bytes == 0


def test_a_replicated_trunk_is_reduced_over_all_ranks_and_experts_over_their_copies():
    config = make_model()
    counts = count_parameters(config)
    trunk = counts.total - counts.ffn
    traffic = compute_rank_traffic(config, ParallelConfig(ep=2, dp_replicate=2), StepShape(TOKENS))
    assert traffic.reduction_bytes == 4 * (2 * trunk * 3 / 4 + 2 * counts.ffn / 2 * 1 / 2)
    assert traffic.gather_bytes == 0


def test_a_sharded_trunk_is_gathered_and_scattered_every_micro_step():
    config = make_model()
    counts = count_parameters(config)
    root = counts.embedding + counts.head + 128
    layers = counts.total - counts.ffn - root
    step = StepShape(TOKENS, num_micro_steps=3)
    traffic = compute_rank_traffic(config, ParallelConfig(ep=2, dp_shard=2, trunk="shard"), step)
    experts = counts.ffn / 2
    assert traffic.reduction_bytes == 3 * 4 * ((layers + root) * 3 / 4 + experts / 2)
    # The root stays gathered from the forward to the backward pass.
    assert traffic.gather_bytes == 3 * 4 * ((2 * layers + root) * 3 / 4 + 2 * experts / 2)


def test_gathered_experts_move_in_the_compute_type_and_the_trunk_as_stored():
    config = make_model()
    counts = count_parameters(config)
    step = StepShape(TOKENS, dtype="bfloat16")
    traffic = compute_rank_traffic(config, ParallelConfig(dp_shard=2), step)
    assert traffic.gather_bytes == 2 * 2 * counts.ffn / 2


def test_sharding_the_trunk_saves_more_than_gathering_costs():
    config = make_model(num_layers=12)
    whole = compute_rank_memory(config, ParallelConfig(ep=8), StepShape(TOKENS))
    sharded = compute_rank_memory(config, ParallelConfig(ep=8, trunk="shard"), StepShape(TOKENS))
    assert sharded.working_copies_bytes > whole.working_copies_bytes
    assert sharded.total_bytes < whole.total_bytes
