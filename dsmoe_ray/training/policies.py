"""What the coordinator decides, as pure functions from an observation to a decision."""

from collections.abc import Mapping
from dataclasses import dataclass

from dsmoe_ray.errors import DsmoeError, TrainingError
from dsmoe_ray.training.shard_group import ShardStatus
from dsmoe_ray.training.states import Evaluate, Operation, Replies, RunSteps, Save

TARGET_CALL_S = 1.0
"""A call takes about this long at most, so that a stop request is obeyed soon; two of them are under way at a time."""
MAX_FAILURES_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class StepPlan:
    """When a run saves, evaluates and ends, in steps."""

    steps: int
    steps_per_call: int
    save_every: int | None = None
    eval_every: int | None = None


def decide_next_operation(last: Operation, plan: StepPlan) -> Operation | None:
    """Return what to ask of the shards after ``last``, or None at the end of the run.

    Steps that end on a boundary are followed by an evaluation if one is due, then by a checkpoint if one is due, as it
    always is after the last step. A run that starts from a checkpoint goes on as if it had just saved it.
    """
    step = last.step
    if isinstance(last, RunSteps) and is_evaluation_due(step, plan):
        return Evaluate(step)
    if not isinstance(last, Save) and is_checkpoint_due(step, plan):
        return Save(step)
    if step >= plan.steps:
        return None
    return RunSteps(step, min(plan.steps_per_call, _next_boundary(step, plan) - step))


def decide_last_operation(last: Operation, *, saved_step: int) -> Operation | None:
    """Return what to ask of the shards after ``last`` when the run is to stop: a checkpoint, unless it is there."""
    if isinstance(last, Save) or last.step == saved_step:
        return None
    return Save(last.step)


def is_evaluation_due(step: int, plan: StepPlan) -> bool:
    """Return whether held-out loss is measured after ``step`` steps."""
    return plan.eval_every is not None and (step % plan.eval_every == 0 or step >= plan.steps)


def is_checkpoint_due(step: int, plan: StepPlan) -> bool:
    """Return whether a checkpoint is taken after ``step`` steps."""
    return step >= plan.steps or (plan.save_every is not None and step % plan.save_every == 0)


def decide_steps_per_call(limit: int, step_time_s: float | None) -> int:
    """Return how many steps to ask for at once: many enough to cost nothing, few enough to stop soon."""
    if step_time_s is None:
        return 1
    return max(1, min(limit, int(TARGET_CALL_S / max(step_time_s, 1e-6))))


def find_hung_ranks(
    statuses: Mapping[int, ShardStatus], silent: tuple[int, ...], *, timeout_s: float, silence_s: float
) -> dict[int, str]:
    """Return the ranks to count as lost, and why: those that do not answer, and those whose step takes too long.

    A rank that waits in a collective for a hung peer is itself released when the collective times out, so it is given
    twice the time.
    """
    hung = {rank: f"does not answer within {silence_s:g} s" for rank in silent}
    for rank, status in statuses.items():
        if status.busy_s is not None and status.busy_s > 2 * timeout_s:
            hung[rank] = f"has been in step {status.step + 1} for {status.busy_s:.0f} s"
    return hung


@dataclass(frozen=True)
class FailureObservation:
    """What is known once every rank has answered, or is known not to."""

    replies: Replies
    """Of the failed call."""
    lost: Mapping[int, str]
    """Ranks found gone or hung since."""
    failures_without_progress: int
    """This one included, since the run last got further than before."""


@dataclass(frozen=True)
class Restart:
    """Replace these ranks; the others keep their processes."""

    lost: Mapping[int, str]


@dataclass(frozen=True)
class GiveUp:
    """Stop the run."""

    error: Exception


def decide_after_failure(observation: FailureObservation) -> Restart | GiveUp:
    """Replace processes that are gone, unless an error of the program's own would only come back.

    An exception that a shard raised itself is not mended by a new process. Lost processes are, but when the run does
    not get further between one loss and the next, something in it kills them.
    """
    replies = observation.replies
    lost = {**replies.lost, **observation.lost}
    if replies.errors:
        rank, error = min(replies.errors.items(), key=lambda item: item[0])
        return GiveUp(_name_rank(rank, error))
    if observation.failures_without_progress > MAX_FAILURES_WITHOUT_PROGRESS:
        reasons = lost or replies.cut_off
        causes = "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(reasons.items()))
        return GiveUp(
            TrainingError(
                f"gave up after {observation.failures_without_progress} failures without getting any further. "
                f"The last: {causes}. The checkpoints are whole; the same command resumes once the cause is gone."
            )
        )
    return Restart(lost)


def _name_rank(rank: int, error: Exception) -> Exception:
    if isinstance(error, DsmoeError):
        return error
    failure = TrainingError(f"rank {rank} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _next_boundary(step: int, plan: StepPlan) -> int:
    periods = [period for period in (plan.save_every, plan.eval_every) if period is not None]
    return min([plan.steps, *(step - step % period + period for period in periods)])
