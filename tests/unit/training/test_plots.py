"""Plots from the files of a run, whatever is in them."""

import pytest

from dsmoe_ray.training.metrics_log import EventLog, MetricsLog
from dsmoe_ray.training.plots import draw_loss, draw_plots, draw_routing
from dsmoe_ray.training.run_directory import RunDirectory
from tests.fakes.fake_shards import make_metrics


def evaluation(step, dense):
    return {"step": step, "loss_dense": dense, "loss_sparse": dense + 0.5, "load_share": [[0.25, 0.75], [0.5, 0.5]]}


@pytest.mark.parametrize("evaluations", [0, 2], ids=["without evaluations", "with"])
@pytest.mark.parametrize("steps", [0, 1, 120])
def test_plots_are_drawn_for_any_run(tmp_path, steps, evaluations):
    directory = RunDirectory(tmp_path)
    MetricsLog(directory.metrics).append([make_metrics(step) for step in range(1, steps + 1)])
    for step in range(evaluations):
        EventLog(directory.events).add("evaluation", **evaluation(step + 1, 1.0))
    for path in draw_plots(directory):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in directory.plots.iterdir()) == ["loss.png", "routing.png"]


def test_loss_shows_training_and_both_held_out_losses():
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    axes = draw_loss(rows, [evaluation(3, 2.0)]).axes[0]
    by_label = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert by_label["training"][::2] == [3.0, 1.0]
    assert by_label["held out, all experts"] == [2.0]
    assert by_label["held out, as deployed"] == [2.5]


def test_routing_shows_each_experts_load_relative_to_the_mean():
    figure = draw_routing([{"step": 1, "balance": 1.5}], [evaluation(1, 2.0)])
    [image] = figure.axes[1].images
    assert image.get_array().tolist() == [[0.5, 1.5], [1.0, 1.0]]
