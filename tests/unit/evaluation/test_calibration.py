"""A calibration from end to end, on a small model whose first layer needs its experts more than its second."""

import functools
import hashlib
import math

import numpy as np
import pytest
import torch

from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.errors import DataError, UserError
from dsmoe_ray.evaluation.calibration import Calibration, calibrate, check_budget, parse_method, split_windows
from dsmoe_ray.evaluation.calibration_report import digest_windows, draw_frontier, save_picture, to_record, to_table
from dsmoe_ray.evaluation.quality import Windows, measure_quality, plan_windows
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.model.config import RoutingConfig, RoutingMode
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer
from tests.fakes.tiny_artifact import make_config

VOCAB_SIZE, SEQ_LEN, NUM_EXPERTS, NUM_WINDOWS = 300, 16, 8, 170
BUDGET = 0.3


@functools.cache
def make_model(deployed="top_k=2") -> Transformer:
    values = make_config().model_dump()["ffn"]
    values |= {"num_experts": NUM_EXPERTS}
    values["router"] |= {"gate_scale": 8.0, "inference": RoutingConfig.parse(deployed).model_dump()}
    config = make_config(ffn=values)
    model = Transformer(config)
    initialize(model, config, seed=1)
    with torch.no_grad():
        model.blocks[1].ffn.experts.w2.mul_(0.1)
    return model.requires_grad_(False)


@functools.cache
def make_shards() -> TokenShards:
    """Text that the model wrote with all experts on: every cut makes it less likely."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(VOCAB_SIZE, (NUM_WINDOWS, 1), generator=generator)
    for _ in range(SEQ_LEN - 1):
        probs = make_model()(rows).logits_BSV[:, -1].softmax(-1)
        rows = torch.cat([rows, torch.multinomial(probs, 1, generator=generator)], dim=1)
    return TokenShards.from_documents([np.append(rows.flatten().numpy(), 0)], vocab_size=VOCAB_SIZE)


def make_windows() -> Windows:
    return plan_windows(make_shards(), seq_len=SEQ_LEN, batch_tokens=1024)


@functools.cache
def run(budget=BUDGET, method="auto", deployed="top_k=2") -> Calibration:
    model, shards = make_model(deployed), make_shards()
    return calibrate(model, shards, budget=budget, method=method, windows=make_windows())


def make_record(calibration=None):
    return to_record(calibration or run(), make_shards(), data="text", created_unix_s=1.0, duration_s=2.0)


def find(calibration, spec):
    [row] = [row for row in calibration.frontier if row.rule.to_spec() == spec]
    return row


@pytest.mark.parametrize("budget", [1 / 8, 0.3, 0.55, 1.0])
@pytest.mark.parametrize("method", ["auto", "per_layer_top_k", "threshold"])
def test_the_choice_keeps_to_the_budget_and_loses_least_of_all_that_do(budget, method):
    found = run(budget, method)
    modes = {
        "per_layer_top_k": {RoutingMode.DENSE, RoutingMode.TOP_K, RoutingMode.PER_LAYER_TOP_K},
        "threshold": {RoutingMode.THRESHOLD},
    }
    allowed = modes.get(method, set.union(*modes.values()))
    assert found.chosen.rule.mode in allowed
    assert found.chosen.selection.active_ffn_ratio <= budget * (1 + 1e-9)
    for row in found.frontier:
        if row.rule.mode in allowed and row.selection.active_ffn_ratio <= budget:
            assert found.chosen.selection.loss <= row.selection.loss


@pytest.mark.parametrize("budget", [1 / 8, 0.3, 0.55])
def test_a_table_is_never_worse_than_uniform_top_k_on_the_text_that_chose(budget):
    found = run(budget, "per_layer_top_k")
    uniform = find(found, f"top_k={int(budget * NUM_EXPERTS)}")
    assert found.chosen.selection.loss <= uniform.selection.loss


def test_the_layer_that_needs_its_experts_gets_more_of_them_and_that_holds_on_other_text():
    found = run(0.3, "per_layer_top_k")
    first, second = found.chosen.rule.per_layer_top_k
    assert first > second and first + second <= 0.3 * 2 * NUM_EXPERTS
    assert found.chosen.held_out.loss < find(found, "top_k=2").held_out.loss
    first_increase, second_increase = found.profile.loss_increase
    assert all(first > second for first, second in zip(first_increase, second_increase, strict=True))


def test_a_threshold_nearly_spends_the_budget():
    found = run(0.3, "threshold")
    assert 0.95 * 0.3 <= found.chosen.selection.active_ffn_ratio <= 0.3
    assert found.profile is None


def test_the_frontier_holds_every_kind_of_rule_at_several_budgets():
    found = run()
    modes = [row.rule.mode for row in found.frontier]
    assert modes.count(RoutingMode.DENSE) == 1 and modes.count(RoutingMode.TOP_K) == 3
    assert modes.count(RoutingMode.PER_LAYER_TOP_K) >= 2 and modes.count(RoutingMode.THRESHOLD) == 4
    assert len(set(row.rule for row in found.frontier)) == len(found.frontier)
    shares = [row.held_out.active_ffn_ratio for row in found.frontier]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1.0


def test_losses_are_those_of_an_evaluation_of_each_half():
    found = run()
    for half, windows in (("selection", found.selection), ("held_out", found.held_out)):
        spec = found.chosen.rule.to_spec()
        rules = {spec: resolve_routing(spec, make_model().config)}
        report = measure_quality(make_model(), make_shards(), rules, windows=windows)
        cost = getattr(found.chosen, half)
        assert cost.loss == report.settings[0].loss
        kept = report.settings[0].kept_ffn_experts
        assert cost.active_ffn_ratio == pytest.approx(sum(kept) / 2 / NUM_EXPERTS, rel=1e-12)


def test_halves_share_no_window_and_lie_side_by_side_all_over_the_text():
    selection, held_out = split_windows(make_windows())
    assert selection.indices == list(range(0, NUM_WINDOWS, 2)) and held_out.indices == list(range(1, NUM_WINDOWS, 2))
    assert (selection.seq_len, selection.batch_sequences) == (SEQ_LEN, 64)


def test_what_was_deployed_is_on_the_frontier_and_counts_only_if_it_is_of_a_kind_to_choose_from():
    found = run(0.3, "auto", "top_p=0.2")
    assert found.deployed_before.to_spec() == "top_p=0.2"
    assert find(found, "top_p=0.2").selection.active_ffn_ratio < 0.3
    assert found.chosen.rule.mode is not RoutingMode.TOP_P


def test_progress_names_the_stages():
    stages = []
    calibrate(
        make_model(),
        make_shards(),
        budget=0.3,
        method="auto",
        windows=make_windows(),
        on_progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    assert list(dict.fromkeys(stage for stage, _, _ in stages))[-1] == "other half"
    assert all(1 <= done <= total for _, done, total in stages)


@pytest.mark.parametrize("budget", [0.0, -1.0, 0.124, 1.0001, math.nan, math.inf, -math.inf])
def test_an_impossible_budget_is_refused(budget):
    with pytest.raises(UserError, match=r"--budget must be from 0.125, one of 8 experts, to 1, all of them; found"):
        check_budget(budget, make_model().config)


@pytest.mark.parametrize("num_experts", [3, 7, 32, 60])
def test_the_smallest_budget_that_a_message_names_is_possible(num_experts):
    values = make_config().model_dump()["ffn"] | {"num_experts": num_experts}
    config = make_config(ffn=values)
    with pytest.raises(UserError) as caught:
        check_budget(0.0, config)
    check_budget(float(str(caught.value).split("from ")[1].split(",")[0]), config)


def test_a_model_without_a_mixture_has_nothing_to_calibrate():
    with pytest.raises(UserError, match="one dense FFN"):
        check_budget(0.5, make_config(ffn={"kind": "dense", "d_ff": 8}))


def test_an_unknown_method_is_refused():
    assert parse_method("threshold") == "threshold"
    with pytest.raises(UserError, match="--method must be one of auto, per_layer_top_k, threshold; found 'best'"):
        parse_method("best")


@pytest.mark.parametrize(("num_tokens", "seq_len"), [(2000, 16), (3000, 3000)])
def test_too_little_text_is_refused(num_tokens, seq_len):
    shards = TokenShards.from_documents([np.zeros(num_tokens, dtype=int)], vocab_size=VOCAB_SIZE)
    with pytest.raises(DataError, match="calibration needs 2048 tokens in two windows at least; found"):
        split_windows(plan_windows(shards, seq_len=seq_len))


def test_a_loss_that_is_no_number_is_refused():
    model = Transformer(make_model().config)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    with pytest.raises(DataError, match="not finite"):
        calibrate(model, make_shards(), budget=0.3, method="auto", windows=make_windows())


def test_the_record_tells_text_choice_and_frontier():
    found, record = run(), make_record()
    assert record.routing == found.chosen.rule.to_spec() and record.deployed_before == "top_k=2"
    assert (record.budget, record.method, record.seq_len) == (BUDGET, "auto", SEQ_LEN)
    assert record.num_selection_tokens == record.num_held_out_tokens == NUM_WINDOWS // 2 * SEQ_LEN
    tokens = make_shards()._read_tokens(0, NUM_WINDOWS * SEQ_LEN + 1)
    digest = hashlib.sha256()
    for start in range(0, NUM_WINDOWS * SEQ_LEN, SEQ_LEN):
        digest.update(tokens[start : start + SEQ_LEN + 1].astype("<u4").tobytes())
    assert record.data_sha256 == digest.hexdigest()
    assert [point.loss for point in record.frontier] == [row.held_out.loss for row in found.frontier]
    assert type(record).model_validate(record.model_dump(mode="json"), strict=True) == record


def test_the_digest_depends_on_the_text_and_not_on_the_batches():
    windows = make_windows()
    again = plan_windows(make_shards(), seq_len=SEQ_LEN, batch_tokens=64)
    fewer = plan_windows(make_shards(), seq_len=SEQ_LEN, max_tokens=64)
    assert digest_windows(make_shards(), windows) == digest_windows(make_shards(), *split_windows(again))
    assert digest_windows(make_shards(), windows) != digest_windows(make_shards(), fewer)


def test_the_table_marks_the_choice_and_compares_with_all_experts():
    record = make_record()
    table = to_table(record, num_experts=NUM_EXPERTS)
    cells = [list(column.cells) for column in table.columns]
    specs = [str(cell) for cell in cells[0]]
    notes = [str(cell) for cell in cells[-1]]
    assert specs == [point.routing for point in record.frontier]
    assert notes[specs.index(record.routing)] == "chosen" and notes[specs.index("top_k=2")] == "deployed before"
    dense = specs.index("dense")
    assert (cells[1][dense], cells[2][dense], cells[4][dense]) == ("8.00", "100.0%", "+0.00%")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_picture_shows_every_kind_of_rule(tmp_path, suffix):
    record = make_record()
    figure = draw_frontier(record)
    [axes] = figure.axes
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["uniform top-k", "table of layers", "threshold", f"chosen: {record.routing}", "budget 0.3"]
    dense = next(point for point in record.frontier if point.routing == "dense")
    thresholds = [dense, *(point for point in record.frontier if point.routing.startswith("threshold"))]
    assert sorted(axes.lines[2].get_ydata()) == sorted(max(point.loss - dense.loss, 1e-4) for point in thresholds)
    save_picture(figure, tmp_path / "new" / f"frontier{suffix}")
    assert (tmp_path / "new" / f"frontier{suffix}").stat().st_size > 1000
    assert len(list((tmp_path / "new").iterdir())) == 1
