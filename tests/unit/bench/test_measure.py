"""Turn-taking, ratios of neighbours, and bars."""

import pytest

from dsmoe_ray.bench.measure import Bar, Measurement, Row, Spread, Turns, compare_speed


class FakeSide:
    """Takes a scripted time for each turn and writes down whose turn it was."""

    def __init__(self, name, log, seconds, tokens_per_step=100):
        self.name, self.log, self.seconds = name, log, iter(seconds)
        self.tokens_per_step = tokens_per_step

    def run(self, num_steps):
        self.log.append((self.name, num_steps))
        return next(self.seconds)


def test_sides_take_turns_after_each_has_warmed_up():
    log = []
    ours = FakeSide("ours", log, [9.0, 1.0, 2.0])
    theirs = FakeSide("theirs", log, [9.0, 2.0, 2.0])
    compare_speed(ours, theirs, Turns(num_pairs=2, steps_per_turn=3, warmup_steps=1))
    assert log == [("ours", 1), ("theirs", 1), ("ours", 3), ("theirs", 3), ("ours", 3), ("theirs", 3)]


def test_the_figure_is_the_median_ratio_of_neighbours():
    log = []
    # The machine is ten times slower during the second pair, and one of our turns is disturbed.
    ours = FakeSide("ours", log, [0.0, 1.0, 10.0, 50.0], tokens_per_step=200)
    theirs = FakeSide("theirs", log, [0.0, 1.5, 15.0, 1.5])
    found = compare_speed(ours, theirs, Turns(num_pairs=3, warmup_steps=1))
    assert found.figure.median == pytest.approx(3.0)
    assert found.figure.min == pytest.approx(0.06)
    assert found.ours["tokens_per_s"] == pytest.approx(20.0)


@pytest.mark.parametrize(("kind", "figure", "met"), [("at_least", 0.95, True), ("at_least", 0.94, False)])
def test_a_bar_is_met_at_its_value(kind, figure, met):
    row = Row(name="a", what="b", unit="c", bar=Bar(kind, 0.95), measurement=Measurement(Spread.of([figure])))
    assert row.passed is met
    assert row.to_json()["bar"] == {kind: 0.95}


def test_memory_may_be_at_most_its_bar():
    assert Bar("at_most", 1.1).is_met_by(1.1)
    assert not Bar("at_most", 1.1).is_met_by(1.11)
