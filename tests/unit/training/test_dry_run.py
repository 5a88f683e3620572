"""A step on shapes alone: it meets what a real step meets, and finds what does not fit."""

import pytest
import torch

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.model.experts import Experts
from dsmoe_ray.training import dry_run
from dsmoe_ray.training.dry_run import rehearse_step


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.ep=2", "parallel.exchange_chunks=2"],
        ["parallel.ep=2", "parallel.dp_shard=2", "parallel.trunk=shard"],
        ["model.ffn.activation=swiglu", "model.tie_embeddings=true", "train.dtype=bfloat16"],
        ["train.activation_checkpointing=full", "data.document_boundaries=true"],
        ["train.activation_checkpointing=selective", "train.loss.load_balance=0.01", "train.loss.router_z=0.001"],
        [
            "model.attention={kind: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 8}",
            "model.ffn={kind: dense, d_ff: 64}",
        ],
    ],
    ids=["one rank", "ep", "ep and dp", "swiglu", "full", "selective", "dense"],
)
def test_every_parameter_gets_a_gradient(tiny_config, overrides):
    rehearsal = rehearse_step(tiny_config(*overrides))
    assert rehearsal.num_gradients == rehearsal.num_tensors > 10


def test_sparse_training_is_rehearsed_up_to_its_experts(tiny_config):
    rehearsal = rehearse_step(tiny_config("parallel.ep=2", "train.routing_ffn={mode: top_k, top_k: 2}"))
    assert 0 < rehearsal.num_gradients < rehearsal.num_tensors


def test_the_experts_of_a_rank_see_the_tokens_of_all(tiny_config, monkeypatch):
    seen = []
    dense_forward = dry_run.RehearsedExchange.start_reduce

    def watch(self, y_ND):
        seen.append((y_ND.device.type, tuple(y_ND.shape)))
        return dense_forward(self, y_ND)

    monkeypatch.setattr(dry_run.RehearsedExchange, "start_reduce", watch)
    rehearse_step(tiny_config("parallel.ep=4"))
    # 128 tokens a step over 4 ranks are 32 each; an expert's rank sees all 128 in each of the 2 layers.
    assert seen == [("meta", (128, 32))] * 2


def test_a_shape_that_does_not_fit_is_told(tiny_config, monkeypatch):
    init = Experts.__init__

    def build_wrong(self, **sizes):
        init(self, **sizes)
        self.w2 = torch.nn.Parameter(torch.empty(sizes["num_experts"], sizes["d_ff"] + 1, sizes["d_model"]))

    monkeypatch.setattr(Experts, "__init__", build_wrong)
    with pytest.raises(ConfigError, match="the shapes of this run do not fit"):
        rehearse_step(tiny_config())


def test_a_model_of_a_hundred_billion_parameters_takes_no_memory(tiny_config):
    sizes = ["model.d_model=8192", "model.num_layers=4", "model.ffn.num_experts=64", "model.ffn.d_ff=8192"]
    assert rehearse_step(tiny_config("parallel.ep=8", *sizes)).num_parameters > 30e9
