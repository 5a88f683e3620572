"""Debug switches of one rank."""

import json

import pytest
import torch

from dsmoe_ray.model.transformer import Transformer
from dsmoe_ray.training.config import DebugConfig
from dsmoe_ray.training.debug import StepProfiler, apply_debug_switches


def run_steps(profiler, first, last):
    """Do steps whose names show in a trace."""
    for step in range(first, last + 1):
        profiler.before_step(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(2) + 1
        profiler.after_step(step)


def steps_in(path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("step ")})


@pytest.mark.parametrize("start", [0, 3], ids=["from the start", "resumed among them"])
def test_the_trace_holds_the_steps_asked_for(tmp_path, start):
    run_steps(StepProfiler(DebugConfig(profile_steps=(2, 4)), tmp_path, rank=1), start, 6)
    expected = [f"step {step}" for step in range(max(start, 2), 5)]
    assert steps_in(tmp_path / "profile" / "rank-1.json") == expected


def test_nothing_is_profiled_unless_asked(tmp_path):
    run_steps(StepProfiler(DebugConfig(), tmp_path, rank=0), 0, 3)
    run_steps(StepProfiler(DebugConfig(profile_steps=(1, 2)), tmp_path, rank=0), 3, 4)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    model = Transformer(tiny_config().model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_forced_balance_reaches_all_routers(model):
    tokens_BS = torch.arange(16).view(2, 8)
    assert not is_uniform(model(tokens_BS))
    apply_debug_switches(model, DebugConfig(force_balanced_routing=True))
    assert is_uniform(model(tokens_BS))
    apply_debug_switches(model, DebugConfig())
    assert not is_uniform(model(tokens_BS))


def is_uniform(output) -> bool:
    routings = output.attention_routings + output.ffn_routings
    assert len(routings) == 4
    return all(bool((r.router_probs_TE == 1 / r.router_probs_TE.shape[1]).all()) for r in routings)


def test_deterministic_turns_on_torch_s_own_switch(model):
    try:
        apply_debug_switches(model, DebugConfig(deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
