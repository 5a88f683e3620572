"""The control loop of a run (start reading here): one state after another until the run is over.

The coordinator uses no GPU and touches no tensor. It asks all shards for the same operations in the same order, a few
steps at a time and one call ahead of the answers, so that the shards never wait for it. What is decided is in
``policies.py``; what is known between two moves is in the states.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.config_io import config_digest
from dsmoe_ray.training.checkpoint_commit import commit_checkpoint, prepare_checkpoints
from dsmoe_ray.training.checkpoint_store import find_newest_complete
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.metrics import EvalMetrics, StepMetrics
from dsmoe_ray.training.metrics_log import EventLog, MetricsLog
from dsmoe_ray.training.policies import (
    FailureObservation,
    GiveUp,
    StepPlan,
    decide_after_failure,
    decide_last_operation,
    decide_next_operation,
    decide_steps_per_call,
)
from dsmoe_ray.training.progress import Reporter
from dsmoe_ray.training.run_directory import RunDirectory, check_probe
from dsmoe_ray.training.shard_calls import POLL_S, SILENCE_S, ShardCalls, ShardFailureError
from dsmoe_ray.training.shard_group import ShardDescription, ShardGroup
from dsmoe_ray.training.states import (
    Asked,
    Call,
    Checkpointing,
    Draining,
    Evaluate,
    Failed,
    Finished,
    Flight,
    Operation,
    Recovering,
    Replies,
    Running,
    RunSteps,
    Save,
    Starting,
    State,
)
from dsmoe_ray.training.stop_request import StopRequest, StopRequestedError

MAX_CALLS_UNDER_WAY = 2
START_DEADLINE_S = 300.0


@dataclass(frozen=True)
class RunFiles:
    """Where the coordinator writes."""

    directory: RunDirectory
    metrics: MetricsLog
    events: EventLog


class Coordinator:
    """Drives one run from its first to its last state."""

    def __init__(
        self,
        config: TrainingRunConfig,
        *,
        shards: ShardGroup,
        files: RunFiles,
        reporter: Reporter,
        stop: StopRequest,
        checkpoint: Path | None = None,
    ) -> None:
        """Prepare a run that starts from ``checkpoint``, known to be whole, or from the first weights."""
        self._config, self._shards, self._files = config, shards, files
        self._reporter, self._stop = reporter, stop
        self._calls = ShardCalls(shards, stop, timeout_s=config.parallel.timeout_s)
        self._first_checkpoint = checkpoint
        self._moves: dict[type, Callable[[Any], State]] = {
            Starting: self._start,
            Running: self._run,
            Checkpointing: self._run_while_saving,
            Draining: self._drain,
            Recovering: self._recover,
        }
        self.state: State = Starting(generation=0, launch=tuple(range(shards.num_shards)))
        self._saved_step = 0
        self._furthest_step = 0
        self._failures_without_progress = 0
        self._failed_at_s: float | None = None
        self._step_time_s: float | None = None

    def run(self) -> Finished:
        """Go from state to state until the run is over.

        Raises:
            DsmoeError: the run failed; trying again does not mend it.
        """
        while not isinstance(self.state, Finished | Failed):
            self.state = self.step()
        if isinstance(self.state, Failed):
            self._files.events.add("failed", error=str(self.state.error))
            raise self.state.error
        self._files.events.add("finished", step=self.state.step, complete=self.state.complete)
        return self.state

    def step(self) -> State:
        """Make one move and return the next state."""
        state = self.state
        try:
            return self._moves[type(state)](state)
        except StopRequestedError:
            return Finished(self._saved_step, complete=False)
        except ShardFailureError as failure:
            return self._after_failure(state, failure.replies)

    def _start(self, state: Starting) -> State:
        """Launch what is missing, let all shards meet, and load the newest state."""
        self._shards.launch(state.launch)
        survivors = [rank for rank in range(self._shards.num_shards) if rank not in state.launch]
        if survivors:
            # While the replacements start. A collective that still waits for a hung peer ends by its own timeout.
            self._calls.gather("leave", ranks=survivors, deadline_s=self._config.parallel.timeout_s + SILENCE_S)
        checkpoint = self._first_checkpoint if state.generation == 0 else self._find_checkpoint()
        address, port = self._meet()
        self._calls.gather("join", address, port, deadline_s=START_DEADLINE_S)
        step = int(self._calls.gather("restore", checkpoint, deadline_s=START_DEADLINE_S)[0])
        self._files.metrics.keep_until(step)
        self._saved_step = 0 if checkpoint is None else step
        # The first call is a single step again, so that it is heard of soon.
        self._step_time_s = None
        name = None if checkpoint is None else checkpoint.name
        self._files.events.add("started", generation=state.generation, step=step, checkpoint=name)
        self._reporter.start(step, self._config.train.steps)
        return Running(Flight(state.generation, last=Save(step)))

    def _run(self, state: Running) -> State:
        return self._train(state.flight, None)

    def _run_while_saving(self, state: Checkpointing) -> State:
        return self._train(state.flight, state.save)

    def _train(self, flight: Flight, save: Asked | None) -> State:
        """Keep the shards busy and take in one answer."""
        if self._stop.requested:
            self._reporter.say("Stop requested: finishing the steps under way, then saving.")
            return Draining(flight, save)
        flight = self._ask_ahead(flight, saving=save is not None, draining=False)
        flight, save = self._take_replies(flight, save)
        if save is not None:
            return Checkpointing(flight, save)
        if not flight.asked and decide_next_operation(flight.last, self._plan()) is None:
            return Finished(self._saved_step, complete=True)
        return Running(flight)

    def _drain(self, state: Draining) -> State:
        """Finish what was asked, save, and end."""
        flight = self._ask_ahead(state.flight, saving=state.save is not None, draining=True)
        flight, save = self._take_replies(flight, state.save)
        if flight.asked or save is not None or decide_last_operation(flight.last, saved_step=self._saved_step):
            return Draining(flight, save)
        return Finished(self._saved_step, complete=self._saved_step >= self._config.train.steps)

    def _recover(self, state: Recovering) -> State:
        """Find out who is lost, and have them replaced or give up."""
        self._failures_without_progress += 1
        lost = self._calls.find_lost(state.replies)
        decision = decide_after_failure(
            FailureObservation(state.replies, lost, failures_without_progress=self._failures_without_progress)
        )
        if isinstance(decision, GiveUp):
            return Failed(decision.error)
        self._files.events.add("shards_lost", generation=state.generation, lost=dict(decision.lost))
        named = "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(decision.lost.items()))
        self._reporter.say(
            f"Recovering from the last checkpoint. {named or 'A collective failed; no process is lost.'}"
        )
        return Starting(state.generation + 1, launch=tuple(sorted(decision.lost)))

    def _after_failure(self, state: Any, replies: Replies) -> State:
        if isinstance(state, Draining):
            # Bringing shards back only to stop them would take longer than a stop is given.
            self._reporter.say(f"A shard failed while stopping; the last checkpoint is of step {self._saved_step}.")
            return Finished(self._saved_step, complete=False)
        self._failed_at_s = monotonic_s()
        generation = state.flight.generation if isinstance(state, Running | Checkpointing) else state.generation
        return Recovering(generation, replies)

    def _meet(self) -> tuple[str, int]:
        """Make sure that every shard sees the run directory; return where rank 0 will listen."""
        with self._files.directory.probe() as probe:
            shards: dict[int, ShardDescription] = self._calls.gather(
                "describe", probe.path, deadline_s=START_DEADLINE_S
            )
        hosts = {rank: shard.host for rank, shard in shards.items()}
        check_probe(probe, {rank: shard.probe for rank, shard in shards.items()}, hosts)
        self._files.events.add("shards", process_ids=[shard.process_id for shard in shards.values()])
        one_node = len({shard.node_id for shard in shards.values()}) == 1
        return "127.0.0.1" if one_node else shards[0].address, shards[0].free_port

    def _find_checkpoint(self) -> Path | None:
        directory = self._files.directory.checkpoints
        prepare_checkpoints(directory)
        return find_newest_complete(directory).path or self._first_checkpoint

    def _plan(self) -> StepPlan:
        train = self._config.train
        return StepPlan(
            steps=train.steps,
            steps_per_call=decide_steps_per_call(train.steps_per_call, self._step_time_s),
            save_every=self._config.checkpoint.every_steps,
            eval_every=train.eval_every,
        )

    def _ask_ahead(self, flight: Flight, *, saving: bool, draining: bool) -> Flight:
        """Ask for operations until enough are under way; a checkpoint waits for the one before it."""
        while len(flight.asked) < MAX_CALLS_UNDER_WAY:
            if draining:
                operation = decide_last_operation(flight.last, saved_step=self._saved_step)
            else:
                operation = decide_next_operation(flight.last, self._plan())
            saving = saving or any(isinstance(asked.operation, Save) for asked in flight.asked)
            if operation is None or (isinstance(operation, Save) and saving):
                break
            asked = Asked(operation, self._ask(operation))
            flight = replace(flight, last=operation, asked=(*flight.asked, asked))
        return flight

    def _ask(self, operation: Operation) -> Call:
        match operation:
            case RunSteps():
                return self._shards.ask("run_steps", operation.num_steps)
            case Evaluate():
                return self._shards.ask("evaluate")
            case Save():
                return self._shards.ask("start_checkpoint", operation.step)

    def _take_replies(self, flight: Flight, save: Asked | None) -> tuple[Flight, Asked | None]:
        """Handle the oldest call if it was answered, and the save if it is done."""
        if flight.asked:
            oldest = flight.asked[0]
            replies = oldest.call.poll(POLL_S)
            if self._calls.is_answered(replies):
                flight = replace(flight, asked=flight.asked[1:])
                save = self._handle(oldest.operation, replies.values[0]) or save
        if save is not None:
            replies = save.call.poll(0.0 if flight.asked else POLL_S)
            if self._calls.is_answered(replies, watch=False):
                self._commit(save.operation.step, list(replies.values.values()))
                save = None
        return flight, save

    def _handle(self, operation: Operation, answer: Any) -> Asked | None:
        """Take in rank 0's answer; a save that was begun is returned, to be waited for."""
        match operation:
            case RunSteps():
                self._take_steps(answer)
            case Evaluate():
                metrics: EvalMetrics = answer
                self._files.events.add("evaluation", **metrics.to_json())
                self._reporter.evaluation(metrics)
            case Save():
                return Asked(operation, self._shards.ask("finish_checkpoint"))
        return None

    def _take_steps(self, rows: Sequence[StepMetrics]) -> None:
        self._files.metrics.append(rows)
        self._reporter.steps(rows)
        self._step_time_s = rows[-1].step_time_s
        if self._failed_at_s is not None:
            recovery_s = round(monotonic_s() - self._failed_at_s, 3)
            self._failed_at_s = None
            self._files.events.add("recovered", step=rows[0].step, recovery_s=recovery_s)
            self._reporter.say(f"Training again after {recovery_s:.1f} s, at step {rows[0].step}.")
        if rows[-1].step > self._furthest_step:
            self._furthest_step = rows[-1].step
            self._failures_without_progress = 0

    def _commit(self, step: int, parts: list[Any]) -> None:
        # A checkpoint must not outlive the rows of its steps, should the machine lose power.
        self._files.metrics.sync()
        parallel = self._config.parallel
        path = commit_checkpoint(
            self._files.directory.checkpoints,
            step=step,
            parts=parts,
            config_digest=config_digest(self._config),
            mesh={"dp_replicate": parallel.dp_replicate, "dp_shard": parallel.dp_shard, "ep": parallel.ep},
            keep=self._config.checkpoint.keep,
        )
        self._saved_step = step
        self._files.events.add("checkpoint", step=step, path=path.name)
