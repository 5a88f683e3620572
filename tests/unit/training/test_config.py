"""A run's config: what is refused and how, overrides, and that it reads back as written."""

import re

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmoe_ray.config_io import parse_config, to_yaml
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.training.config import TrainingRunConfig


def test_the_tiny_run_is_valid(tiny_config):
    config = tiny_config()
    assert (config.sequences_per_rank, config.sequences_per_micro_step) == (8, 8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(["model.ffn.num_expert=4"], "model.ffn.num_expert: unknown key; did you mean 'num_experts'?"),
        pytest.param(["lr=1"], "lr: unknown key; did you mean 'train.lr'?"),
        pytest.param(["train.steps=many"], "train.steps: must be a whole number; found 'many'"),
        pytest.param(["train.steps=yes"], "train: steps must be a number; found True"),
        pytest.param(["train.lr=.inf"], "train.lr: must be a finite number; found inf"),
        pytest.param(["train.dtype=bf16"], "must be one of float32, bfloat16; found 'bf16'; did you mean 'bfloat16'?"),
        pytest.param(["train.betas=[0.9, 1.5]"], "train.betas[1]: must be less than 1; found 1.5"),
        pytest.param(
            ["parallel={device: cuda, gpus_per_shard: 0}"],
            "parallel: gpus_per_shard=0 contradicts device='cuda'; leave one out",
        ),
        pytest.param(["run.name=a/b"], "run.name: string must match pattern"),
        pytest.param(
            ["parallel.ep=3", "train.num_tokens_per_step=144"],
            "model.ffn.num_experts=4 is not divisible by ep * dp_shard = 3 * 1; choose degrees whose product divides 4",
        ),
        pytest.param(
            ["model.ffn={kind: dense, d_ff: 64}", "parallel.ep=2"],
            "parallel.ep=2 needs a mixture of FFN experts, but model.ffn is dense; set ep=1",
        ),
        pytest.param(
            ["parallel.dp_replicate=3"],
            "train.num_tokens_per_step=128 is not a multiple of seq_len * ranks = 16 * 3; use 144",
        ),
        pytest.param(
            ["train.num_tokens_per_micro_step=48"],
            "=48 must be a multiple of seq_len=16 that divides the 128 tokens of one rank",
        ),
        pytest.param(["train.seq_len=64"], "train.seq_len=64 exceeds model.max_seq_len=32"),
        pytest.param(
            ["model.ffn.router.inference={mode: top_k, top_k: 5}"],
            "model.ffn: top_k must be at most num_experts; got top_k=5, num_experts=4",
        ),
        pytest.param(
            ["train.routing_ffn={mode: top_k, top_k: 5}"],
            "train.routing_ffn.top_k must be at most num_experts; got 5 of 4",
        ),
        pytest.param(["model.ffn.router.inference={mode: top_k}"], "routing mode 'top_k' needs top_k; add it"),
        pytest.param(
            ["model.ffn.router.inference={mode: dense, top_p: 0.5}"],
            "routing mode 'dense' does not use top_p=0.5; remove it",
        ),
        pytest.param(
            ["model.ffn.router.kind=mlp"], "d_hidden goes with kind 'mlp' only; got kind='mlp', d_hidden=None"
        ),
        pytest.param(["model.attention.head_dim=7"], "head_dim must be even for rotary positions; got 7"),
        pytest.param(
            ["model.attention={kind: gqa, num_heads: 3, num_kv_heads: 2, head_dim: 8}"],
            "num_heads must be a multiple of num_kv_heads; got 3 and 2",
        ),
        pytest.param(["train.routing_ffn={mode: anneal, top_k: 2}"], "end_step goes with mode 'anneal' only"),
        pytest.param(["train.lr_schedule={kind: wsd}"], "decay_steps goes with kind 'wsd' only"),
        pytest.param(
            ["debug.profile_steps=[3, 1]"], "profile_steps must be [first, last] with first <= last; got [3, 1]"
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_in_one_line(tiny_config, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        tiny_config(*overrides)
    assert len(str(caught.value).splitlines()) == 1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ep=st.sampled_from([1, 2, 4]),
    dp_replicate=st.sampled_from([1, 2]),
    lr=st.floats(1e-8, 1.0),
    seed=st.integers(0, 2**63),
    threshold=st.floats(0, 3.9),
    steps=st.integers(1, 10**9),
    profile=st.none() | st.tuples(st.integers(0, 9), st.integers(10, 99)),
)
def test_a_resolved_config_reads_back_equal(tiny_config, ep, dp_replicate, lr, seed, threshold, steps, profile):
    config = tiny_config(
        f"parallel.ep={ep}",
        f"parallel.dp_replicate={dp_replicate}",
        f"train.lr={lr}",
        f"run.seed={seed}",
        f"train.steps={steps}",
        f"model.ffn.router.inference={{mode: threshold, threshold: {threshold}}}",
        f"debug.profile_steps={'null' if profile is None else list(profile)}",
    )
    again = parse_config(yaml.safe_load(to_yaml(config)), TrainingRunConfig, source="again")
    assert again == config
    assert again.train.lr == lr


def test_the_dense_twin_has_the_same_width_and_heads(tiny_config):
    twin = tiny_config().model.dense_twin()
    assert (twin.ffn.kind, twin.ffn.d_ff) == ("dense", 64)
    assert (twin.attention.kind, twin.attention.num_heads, twin.attention.num_kv_heads) == ("gqa", 4, 2)
