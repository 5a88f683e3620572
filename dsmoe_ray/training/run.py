"""A run on Ray: data, shards and coordinator. Wires them and decides nothing; ``publish.py`` comes after it."""

from dataclasses import dataclass

from dsmoe_ray.data.prepare import prepare_data
from dsmoe_ray.data.prepared import PreparedData
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.coordinator import Coordinator, RunFiles
from dsmoe_ray.training.metrics_log import EventLog, MetricsLog
from dsmoe_ray.training.placement import plan_placement
from dsmoe_ray.training.progress import Reporter
from dsmoe_ray.training.ray_session import list_node_resources, ray_session
from dsmoe_ray.training.ray_shard_group import RayShardGroup, reserve
from dsmoe_ray.training.resume import ResumePlan, apply_resume
from dsmoe_ray.training.run_directory import RunDirectory
from dsmoe_ray.training.shard_group import ShardSetup
from dsmoe_ray.training.states import Finished
from dsmoe_ray.training.stop_request import StopRequest, StopRequestedError, stop_on_signals


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    step: int
    complete: bool
    prepared: PreparedData | None
    """None if the run was stopped before its data was ready."""


def run_on_ray(
    config: TrainingRunConfig,
    directory: RunDirectory,
    plan: ResumePlan,
    *,
    address: str | None,
    reporter: Reporter,
) -> RunResult:
    """Train until the last step or a stop request.

    Args:
        config: With absolute paths.
        directory: Locked for this run.
        plan: Where to start.
        address: Of the Ray cluster; None starts a local one.
        reporter: Told what goes on.

    Raises:
        UserError: data, configuration or cluster do not allow the run.
        TrainingError: the run failed while training.
    """
    stop = StopRequest()
    try:
        # Twice, as Ray replaces the handler while it starts.
        with stop_on_signals(stop), ray_session(config.parallel, address=address) as session, stop_on_signals(stop):
            if session.dashboard_url:
                reporter.say(f"dashboard: {session.dashboard_url}")
            return run_in_session(config, directory, plan, reporter=reporter, stop=stop)
    except StopRequestedError:
        return RunResult(plan.step, complete=False, prepared=None)


def run_in_session(
    config: TrainingRunConfig, directory: RunDirectory, plan: ResumePlan, *, reporter: Reporter, stop: StopRequest
) -> RunResult:
    """Do as ``run_on_ray`` on the Ray that this process is connected to, until the last step or ``stop``."""
    prepared = None
    try:
        prepared = _prepare(config, directory, reporter)
        finished = _train(config, directory, plan, prepared=prepared, reporter=reporter, stop=stop)
    except StopRequestedError:
        finished = Finished(plan.step, complete=False)
    return RunResult(finished.step, complete=finished.complete, prepared=prepared)


def _prepare(config: TrainingRunConfig, directory: RunDirectory, reporter: Reporter) -> PreparedData:
    prepared = prepare_data(
        config.data, vocab_size=config.model.vocab_size, run_dir=directory.root, on_progress=reporter.prepare
    )
    state = "up to date" if prepared.skipped else "prepared"
    reporter.say(
        f"data: {state}, {prepared.num_train_tokens:,} tokens to train on, {prepared.num_held_out_tokens:,} held out"
    )
    return prepared


def _train(
    config: TrainingRunConfig,
    directory: RunDirectory,
    plan: ResumePlan,
    *,
    prepared: PreparedData,
    reporter: Reporter,
    stop: StopRequest,
) -> Finished:
    if plan.step >= config.train.steps:
        return Finished(plan.step, complete=True)
    placement = plan_placement(config.parallel, list_node_resources())
    resumed = config.model_copy(update={"model": config.model.model_copy(update={"init_from": None})})
    setup = ShardSetup(
        # Weights come from the checkpoint; the artifact that the run once began with may be gone.
        config=config if plan.checkpoint is None else resumed,
        data=prepared.train_dir,
        held_out=prepared.held_out_dir,
        checkpoints=directory.checkpoints,
        device=placement.device,
    )
    shards = RayShardGroup(setup, placement, reserve(placement, timeout_s=config.parallel.timeout_s))
    # Only now: a run that cannot start must leave the run directory as it was.
    apply_resume(directory, plan)
    directory.write_config(config)
    files = RunFiles(directory, MetricsLog(directory.metrics), EventLog(directory.events))
    coordinator = Coordinator(
        config, shards=shards, files=files, reporter=reporter, stop=stop, checkpoint=plan.checkpoint
    )
    with stop.awaited():
        try:
            return coordinator.run()
        finally:
            # Inside, so that a request at this moment does not cut it short.
            shards.close()
