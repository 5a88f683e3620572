"""Decisions of the coordinator, from made-up observations."""

import pytest

from dsmoe_ray.errors import CheckpointError, TrainingError
from dsmoe_ray.training.policies import (
    MAX_FAILURES_WITHOUT_PROGRESS,
    FailureObservation,
    GiveUp,
    Restart,
    StepPlan,
    decide_after_failure,
    decide_last_operation,
    decide_next_operation,
    decide_steps_per_call,
    find_hung_ranks,
)
from dsmoe_ray.training.shard_group import ShardStatus
from dsmoe_ray.training.states import Evaluate, Replies, RunSteps, Save


def list_operations(plan, start=0):
    operations, last = [], Save(start)
    while (last := decide_next_operation(last, plan)) is not None:
        operations.append(last)
    return operations


def test_steps_are_cut_at_boundaries_and_every_boundary_is_served_once():
    plan = StepPlan(steps=10, steps_per_call=4, save_every=6, eval_every=5)
    assert list_operations(plan) == [
        RunSteps(0, 4),
        RunSteps(4, 1),
        Evaluate(5),
        RunSteps(5, 1),
        Save(6),
        RunSteps(6, 4),
        Evaluate(10),
        Save(10),
    ]


def test_the_last_step_is_saved_even_if_no_period_is_set():
    assert list_operations(StepPlan(steps=3, steps_per_call=5)) == [RunSteps(0, 3), Save(3)]


def test_a_run_that_starts_from_a_checkpoint_neither_saves_nor_evaluates_it_again():
    plan = StepPlan(steps=12, steps_per_call=5, save_every=6, eval_every=6)
    assert list_operations(plan, start=6) == [RunSteps(6, 5), RunSteps(11, 1), Evaluate(12), Save(12)]


def test_nothing_is_left_to_do_at_the_last_step():
    assert list_operations(StepPlan(steps=6, steps_per_call=5), start=6) == []


@pytest.mark.parametrize("steps_per_call", [1, 3, 7, 100])
def test_every_step_is_run_once_whatever_the_size_of_calls(steps_per_call):
    plan = StepPlan(steps=50, steps_per_call=steps_per_call, save_every=7, eval_every=11)
    done = 0
    for operation in list_operations(plan):
        if isinstance(operation, RunSteps):
            assert operation.first_step == done
            done = operation.step
        assert operation.step == done
    assert done == 50


def test_a_stop_saves_what_was_done_since_the_last_checkpoint():
    assert decide_last_operation(RunSteps(4, 2), saved_step=4) == Save(6)
    assert decide_last_operation(Evaluate(6), saved_step=4) == Save(6)


def test_a_stop_saves_nothing_twice():
    assert decide_last_operation(Save(6), saved_step=0) is None
    assert decide_last_operation(Evaluate(6), saved_step=6) is None


@pytest.mark.parametrize(
    ("step_time_s", "expected"), [(None, 1), (0.01, 5), (0.3, 3), (60.0, 1)], ids=["unknown", "fast", "slow", "minute"]
)
def test_calls_are_short_enough_to_stop_soon(step_time_s, expected):
    assert decide_steps_per_call(5, step_time_s) == expected


def test_ranks_that_do_not_answer_or_do_not_get_on_hang():
    statuses = {0: ShardStatus(step=7, busy_s=50.0), 1: ShardStatus(step=7, busy_s=1.0), 3: ShardStatus(7, None)}
    hung = find_hung_ranks(statuses, (2,), timeout_s=20.0, silence_s=10.0)
    assert hung == {0: "has been in step 8 for 50 s", 2: "does not answer within 10 s"}


def observe(replies, *, lost=None, failures=1):
    return FailureObservation(replies, lost or {}, failures_without_progress=failures)


def test_a_killed_rank_is_replaced_and_the_survivors_are_not():
    decision = decide_after_failure(observe(Replies(lost={1: "killed"}, cut_off={0: "peer gone"})))
    assert decision == Restart({1: "killed"})


def test_a_failed_collective_without_a_loss_replaces_nobody():
    assert decide_after_failure(observe(Replies(cut_off={0: "reset", 1: "reset"}))) == Restart({})


def test_a_rank_found_dead_later_is_replaced_too():
    assert decide_after_failure(observe(Replies(cut_off={0: "reset"}), lost={1: "dead"})) == Restart({1: "dead"})


def test_a_known_error_of_a_shard_ends_the_run_as_it_is():
    error = CheckpointError("disk full")
    decision = decide_after_failure(observe(Replies(errors={1: error}, cut_off={0: "peer gone"})))
    assert isinstance(decision, GiveUp) and decision.error is error


def test_an_unknown_error_of_a_shard_ends_the_run_naming_the_rank():
    decision = decide_after_failure(observe(Replies(errors={1: ZeroDivisionError("division by zero")})))
    assert isinstance(decision, GiveUp) and isinstance(decision.error, TrainingError)
    assert str(decision.error) == "rank 1 failed: ZeroDivisionError: division by zero"


def test_losses_without_progress_end_the_run():
    replies = Replies(lost={1: "killed"})
    last_try = decide_after_failure(observe(replies, failures=MAX_FAILURES_WITHOUT_PROGRESS))
    decision = decide_after_failure(observe(replies, failures=MAX_FAILURES_WITHOUT_PROGRESS + 1))
    assert isinstance(last_try, Restart)
    assert isinstance(decision, GiveUp) and "rank 1: killed" in str(decision.error)
