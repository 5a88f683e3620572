import pytest
import torch

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.inference.torch_runner import TorchRunner, finish
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer
from tests.fakes.paged_sequences import PagedSequences


@pytest.fixture
def model():
    config = ModelConfig.model_validate(
        {
            "vocab_size": 50,
            "d_model": 16,
            "num_layers": 3,
            "max_seq_len": 16,
            "attention": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
            "ffn": {"kind": "moe", "num_experts": 4, "d_ff": 8},
        }
    )
    made = Transformer(config)
    initialize(made, config, seed=0)
    return made.requires_grad_(False)


class RecordingExperts:
    """A backend that says which layers were asked, and answers zeros."""

    def __init__(self):
        self.events = []

    def dispatch(self, layer, x_TD, assignment):
        self.events.append(f"dispatch {layer}")
        return layer, torch.zeros_like(x_TD)

    def combine(self, handle):
        self.events.append(f"combine {handle[0]}")
        return handle[1]


def make_sequences(model, runner, lengths=(5, 3)):
    return PagedSequences(runner, list(lengths), rules=[resolve_routing("top_k=2", model.config)])


def test_only_the_wanted_rows_get_logits(model):
    def run(wanted):
        sequences = make_sequences(model, TorchRunner(model, num_blocks=8, block_size=4, numerics="exact"))
        return sequences.runner.run(sequences.batch([(0, 5), (1, 3)], wanted=wanted))

    whole = run(None)
    assert whole.shape == (8, 50) and whole.dtype == torch.float32 and whole.device.type == "cpu"
    assert torch.equal(run([4, 7]), whole[[4, 7]])
    assert run([]).shape == (0, 50)


def test_a_step_gives_way_between_sending_tokens_to_experts_and_adding_their_outputs(model):
    experts = RecordingExperts()
    runner = TorchRunner(model, num_blocks=8, block_size=4, numerics="fast", experts=experts)
    sequences = make_sequences(model, runner)
    step = runner.start(sequences.batch([(0, 5)]))
    next(step)
    assert experts.events == ["dispatch 0"]
    next(step)
    assert experts.events == ["dispatch 0", "combine 0", "dispatch 1"]
    assert finish(step).shape == (5, 50)
    assert experts.events[-1] == "combine 2"


def test_two_steps_that_take_turns_give_what_they_give_one_after_the_other(model):
    runner = TorchRunner(model, num_blocks=8, block_size=4, numerics="exact")
    expected = make_sequences(model, runner).run([[5], [3]])
    sequences = make_sequences(model, runner)
    steps = [runner.start(sequences.batch([(index, size)])) for index, size in ((0, 5), (1, 3))]
    for _ in range(3):
        for step in steps:
            next(step)
    for step, logits in zip(steps, expected, strict=True):
        assert torch.equal(finish(step), logits)


def test_the_cache_takes_the_memory_that_it_reports(model):
    runner = TorchRunner(model, num_blocks=6, block_size=4, numerics="fast")
    # Three layers of keys and values of 2 heads of 4 numbers of 4 bytes; two slots more than those given out.
    assert runner.kv_cache_bytes == 3 * 2 * (6 * 4 + 2) * 2 * 4 * 4


def test_exact_numerics_are_refused_off_the_cpu(model):
    with pytest.raises(ConfigError, match="'exact' is computed on a CPU; the model is on meta"):
        TorchRunner(model.to("meta"), num_blocks=6, block_size=4, numerics="exact")
