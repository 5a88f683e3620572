"""The published model computes what the trained one did: checkpoint -> artifact -> model, bit for bit."""

import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.save import save_artifact
from dsmoe_ray.model.config import MoaConfig, ModelConfig, MoeConfig, RouterConfig
from dsmoe_ray.model.transformer import Transformer
from dsmoe_ray.training.checkpoint import CheckpointWriter, collect_state, read_model_tensors
from dsmoe_ray.training.checkpoint_commit import commit_checkpoint

CONFIG = ModelConfig(
    vocab_size=50,
    d_model=16,
    num_layers=2,
    max_seq_len=8,
    attention=MoaConfig(kind="moa", num_experts=4, num_kv_heads=1, head_dim=4),
    ffn=MoeConfig(kind="moe", num_experts=11, d_ff=4, router=RouterConfig(kind="mlp", d_hidden=8)),
    tie_embeddings=True,
)


def test_a_model_published_from_a_checkpoint_gives_the_same_logits(tmp_path):
    torch.manual_seed(0)
    trained = Transformer(CONFIG)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_(std=0.3)
    writer = CheckpointWriter(tmp_path)
    part = writer.start_save(collect_state(trained, torch.optim.AdamW(trained.parameters())), step=1).result(30)
    writer.close()
    checkpoint = commit_checkpoint(tmp_path, step=1, parts=[part], config_digest="", mesh={}, keep=1)
    save_artifact(
        tmp_path / "artifact",
        model_config=CONFIG,
        tensors=read_model_tensors(checkpoint),
        tokenizer_json="{}",
        provenance={},
    )
    published = Transformer(CONFIG)
    published.load_state_dict(load_artifact(tmp_path / "artifact").load_state_dict(), assign=True)
    tokens_BS = torch.randint(0, 50, (2, 8))
    with torch.no_grad():
        assert torch.equal(published(tokens_BS).logits_BSV, trained(tokens_BS).logits_BSV)
