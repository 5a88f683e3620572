"""Decoding as graphs, with the recorded function called in place of a replay."""

import numpy as np
import pytest
import torch

from dsmoe_ray.inference import decode_graphs
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.inference.torch_runner import TorchRunner
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer
from tests.fakes.paged_sequences import PagedSequences

# Float32 sums of some ten terms of size one in another order, in two layers; logits of size ten.
CLOSE = {"rtol": 1e-5, "atol": 3e-5}
SPECS = ["top_k=2", "dense", "threshold=0.9", "top_p=0.6", "attention:top_k=2/ffn:threshold_top_k=1.0", "top_k=1"]


@pytest.fixture(params=["gelu", "swiglu"])
def model(request):
    router = {"kind": "mlp", "d_hidden": 8, "gates": "renormalized"}
    config = ModelConfig.model_validate(
        {
            "vocab_size": 50,
            "d_model": 16,
            "num_layers": 2,
            "max_seq_len": 24,
            "attention": {"kind": "moa", "num_experts": 3, "num_kv_heads": 2, "head_dim": 4, "router": router},
            "ffn": {"kind": "moe", "num_experts": 4, "d_ff": 8, "activation": request.param, "router": router},
            "init_std": 0.3,
        }
    )
    made = Transformer(config)
    initialize(made, config, seed=0)
    return made.requires_grad_(False)


class Recorder:
    """Counts recordings and calls; a call runs the function again on what its inputs hold by then."""

    def __init__(self):
        self.num_captured, self.num_replayed = 0, 0

    def __call__(self, function):
        self.num_captured += 1

        def replay():
            self.num_replayed += 1
            return function()

        return replay


def make_runner(model, recorder=None):
    runner = TorchRunner(model, num_blocks=40, block_size=4, numerics="fast")
    if recorder is not None:
        runner._graphs = runner.build_graphs(8, recorder)
    return runner


def generate(model, specs, lengths, *, recorder=None, prompt=5):
    rules = [resolve_routing(spec, model.config) for spec in specs]
    rule_idxs = [index % len(specs) for index in range(len(lengths))]
    sequences = PagedSequences(make_runner(model, recorder), lengths, rules=rules, rule_idxs=rule_idxs)
    return sequences.run([[prompt] + [1] * (length - prompt) for length in lengths])


@pytest.mark.parametrize("specs", [*([spec] for spec in SPECS), SPECS], ids=[*SPECS, "all rules"])
@pytest.mark.parametrize("num_sequences", [1, 3, 6])
def test_graphs_give_what_plain_steps_give(model, specs, num_sequences):
    # Sequences end at different steps, so that the batch shrinks through the sizes; the longest fills all blocks.
    lengths = [24, 13, 9, 17, 20, 11][:num_sequences]
    recorder = Recorder()
    found = generate(model, specs, lengths, recorder=recorder)
    expected = generate(model, specs, lengths)
    assert recorder.num_replayed == max(lengths) - 5 > recorder.num_captured
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_sizes_are_rounded_up_so_that_few_graphs_serve_all_steps(model):
    recorder = Recorder()
    generate(model, SPECS[:1], [24] * 5, recorder=recorder)
    # Five sequences take the graph for eight; positions 5 to 23 in blocks of 4 take those for 2, 4 and 6 blocks.
    assert recorder.num_captured == 3


def test_padding_touches_no_expert_that_the_step_does_not_touch_and_writes_where_nobody_reads(model):
    runner = make_runner(model)
    seen = []
    graphs = runner.build_graphs(8, lambda function: function)
    graphs._decode = lambda inputs, shapes: seen.append(inputs) or runner.decode(inputs, shapes)
    sequences = PagedSequences(runner, [6, 6, 6], rules=[resolve_routing("top_k=2", model.config)])
    sequences.step((0, 5), (1, 5), (2, 5))
    batch = sequences.batch([(0, 1), (1, 1), (2, 1)])
    graphs.run(batch, runner._planner.find_rule_table(batch.rules))
    tokens_3B, tables_BM, _ = seen[0]
    assert tokens_3B[0].tolist() == [*batch.token_ids_T.tolist(), batch.token_ids_T[2]]
    assert torch.equal(tables_BM[3], tables_BM[2])
    scratch = runner.num_blocks * 4 + 1
    assert tokens_3B[2].tolist() == [*(table[1] * 4 + 1 for table in sequences.tables), scratch]


def test_steps_that_are_not_decoding_alone_are_not_taken(model):
    runner = make_runner(model)
    graphs = runner.build_graphs(2, Recorder())
    sequences = PagedSequences(runner, [6, 6, 6], rules=[resolve_routing("dense", model.config)])
    assert graphs.takes(sequences.batch([(0, 1), (1, 1)]))
    assert not graphs.takes(sequences.batch([(0, 1), (1, 2)]))
    assert not graphs.takes(sequences.batch([(0, 1), (1, 1)], wanted=[1]))
    assert not graphs.takes(sequences.batch([(0, 1), (1, 1), (2, 1)]))


def test_the_oldest_graph_goes_when_there_are_too_many(model, monkeypatch):
    monkeypatch.setattr(decode_graphs, "_MAX_GRAPHS", 2)
    recorder = Recorder()
    runner = make_runner(model, recorder)
    sequences = PagedSequences(runner, [24], rules=[resolve_routing("dense", model.config)])
    for _ in range(24):
        sequences.step((0, 1))
    assert runner._graphs.num_recorded == 2 < recorder.num_captured == 4
    expected = generate(model, ["dense"], [24])[0]
    torch.testing.assert_close(sequences.finished()[0][5:], expected[5:], **CLOSE)


def test_the_layout_of_a_step_is_plain_data(model):
    runner = make_runner(model)
    sequences = PagedSequences(runner, [6], rules=[resolve_routing("top_k=2", model.config)])
    batch = sequences.batch([(0, 1)])
    inputs = runner.build_graphs(4, Recorder())._lay_out(
        batch, runner._planner.find_rule_table(batch.rules), padded_seqs=4, num_blocks=8
    )
    assert inputs.tokens_3B.dtype == torch.int64 and inputs.block_tables_BM.shape == (4, 8)
    # Nothing reads the numbers of a rule that is the same for all.
    assert [column.shape for column in inputs.numbers] == [(4, 0)] * 4
    assert np.array_equal(inputs.block_tables_BM[0, :2], sequences.tables[0])


def test_models_without_experts_decode_as_graphs_too():
    config = ModelConfig.model_validate(
        {
            "vocab_size": 50,
            "d_model": 16,
            "num_layers": 2,
            "max_seq_len": 24,
            "attention": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
            "ffn": {"kind": "dense", "d_ff": 8},
            "init_std": 0.3,
        }
    )
    model = Transformer(config)
    initialize(model, config, seed=0)
    model.requires_grad_(False)
    found = generate(model, ["dense"], [13, 9], recorder=Recorder())
    for one, other in zip(found, generate(model, ["dense"], [13, 9]), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
