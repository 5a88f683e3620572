"""What a person reads while a run goes on."""

import io
import itertools

import pytest
from rich.console import Console

from dsmoe_ray.training.metrics import EvalMetrics
from dsmoe_ray.training.progress import PlainReporter, RichReporter, build_reporter
from tests.fakes.fake_shards import make_metrics


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock takes two seconds."""
    seconds = itertools.count(step=2)
    monkeypatch.setattr("dsmoe_ray.training.progress.monotonic_s", lambda: float(next(seconds)))


def test_a_line_tells_loss_speed_balance_and_time_left(clock):
    output = io.StringIO()
    reporter = PlainReporter(Console(file=output, width=200))
    reporter.start(0, 100)
    reporter.steps([make_metrics(1, loss=2.5, tokens=1000)])
    # 1000 tokens and one step in the two seconds between two looks; 99 steps of two seconds are left.
    assert "step 1/100  loss 2.500  500 tokens/s  balance 1.00  ETA 3:18" in output.getvalue()


def test_lines_come_every_few_seconds_and_at_the_end(clock):
    output = io.StringIO()
    reporter = PlainReporter(Console(file=output, width=200))
    reporter.start(0, 20)
    for step in range(1, 21):
        reporter.steps([make_metrics(step)])
    lines = [line for line in output.getvalue().splitlines() if line.startswith("step ")]
    assert 2 <= len(lines) <= 15
    assert lines[-1].startswith("step 20/20")


def test_the_bar_shows_the_newest_step_and_keeps_lines_above():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=160)
    reporter = RichReporter(console)
    reporter.prepare("tokenize", 5, 10)
    reporter.start(10, 40)
    reporter.steps([make_metrics(30, loss=1.25)])
    reporter.evaluation(EvalMetrics(step=30, loss_dense=1.0, loss_sparse=1.5, tokens=9, load_share=[]))
    reporter.close()
    text = output.getvalue()
    assert "30/40" in text and "loss 1.250" in text
    assert "held-out loss 1.0000 with all experts, 1.5000 as deployed" in text


def test_only_a_terminal_gets_a_bar():
    assert isinstance(build_reporter(Console(file=io.StringIO())), PlainReporter)
    reporter = build_reporter(Console(file=io.StringIO(), force_terminal=True))
    assert isinstance(reporter, RichReporter)
    reporter.close()


def test_a_message_with_brackets_is_printed_as_it_is():
    output = io.StringIO()
    PlainReporter(Console(file=output, width=80)).say("install ray[default] in [/bold]")
    assert output.getvalue() == "install ray[default] in [/bold]\n"
