"""The list of tensors is that of the model itself."""

import pytest
import torch

from dsmoe_ray.artifact.layout import count_stored, is_stacked, model_shapes, stored_shapes
from dsmoe_ray.model.config import DenseFfnConfig, GqaConfig, MoaConfig, ModelConfig, MoeConfig, RouterConfig
from dsmoe_ray.model.transformer import Transformer

ATTENTION = {
    "gqa": GqaConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=4),
    "moa": MoaConfig(kind="moa", num_experts=3, num_kv_heads=2, head_dim=4),
    "moa_mlp": MoaConfig(
        kind="moa", num_experts=3, num_kv_heads=2, head_dim=4, router=RouterConfig(kind="mlp", d_hidden=5)
    ),
}
FFN = {
    "dense": DenseFfnConfig(kind="dense", d_ff=6),
    "dense_swiglu": DenseFfnConfig(kind="dense", d_ff=6, activation="swiglu"),
    "moe": MoeConfig(kind="moe", num_experts=5, d_ff=6),
    "moe_swiglu_mlp": MoeConfig(
        kind="moe", num_experts=5, d_ff=6, activation="swiglu", router=RouterConfig(kind="mlp", d_hidden=5)
    ),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("ffn", FFN)
@pytest.mark.parametrize("attention", ATTENTION)
def test_names_and_shapes_are_those_of_the_model(attention, ffn, tied):
    config = ModelConfig(
        vocab_size=11,
        d_model=8,
        num_layers=2,
        max_seq_len=4,
        attention=ATTENTION[attention],
        ffn=FFN[ffn],
        tie_embeddings=tied,
    )
    with torch.device("meta"):
        model = Transformer(config)
    shapes = model_shapes(config)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert count_stored(config) == len(stored_shapes(config))
    assert any(map(is_stacked, shapes)) == ffn.startswith("moe")


def test_each_expert_has_its_own_tensor_and_a_number_that_sorts():
    config = ModelConfig(
        vocab_size=11,
        d_model=8,
        num_layers=1,
        max_seq_len=4,
        attention=ATTENTION["gqa"],
        ffn=MoeConfig(kind="moe", num_experts=12, d_ff=6),
    )
    names = [name for name in sorted(stored_shapes(config)) if "experts.w1" in name]
    assert names == [f"blocks.0.ffn.experts.w1.{expert_id:05d}" for expert_id in range(12)]
    assert stored_shapes(config)["blocks.0.ffn.experts.w2.00011"] == (6, 8)
