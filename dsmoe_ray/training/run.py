"""A whole run on Ray: data, shards, coordinator, artifact and plots. Wires them and decides nothing."""

from dataclasses import dataclass
from pathlib import Path

from dsmoe_ray.data.prepare import prepare_data
from dsmoe_ray.data.prepared import PreparedData
from dsmoe_ray.training.checkpoint_store import find_newest_complete
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.coordinator import Coordinator, RunFiles
from dsmoe_ray.training.export import export_artifact
from dsmoe_ray.training.metrics_log import EventLog, MetricsLog
from dsmoe_ray.training.placement import plan_placement
from dsmoe_ray.training.plots import draw_plots
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
    artifact: Path | None
    plots: tuple[Path, ...]


def run_on_ray(
    config: TrainingRunConfig,
    directory: RunDirectory,
    plan: ResumePlan,
    *,
    address: str | None,
    reporter: Reporter,
) -> RunResult:
    """Train until the last step or a stop request, and publish the model of a complete run.

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
    apply_resume(directory, plan)
    directory.write_config(config)
    stop = StopRequest()
    with ray_session(config.parallel, address=address) as session, stop_on_signals(stop):
        if session.dashboard_url:
            reporter.say(f"dashboard: {session.dashboard_url}")
        try:
            prepared = _prepare(config, directory, reporter)
            finished = _train(config, directory, plan, prepared=prepared, reporter=reporter, stop=stop)
            if finished.complete:
                return _publish(config, directory, finished, prepared)
        except StopRequestedError:
            finished = Finished(plan.step, complete=False)
    return RunResult(finished.step, complete=False, artifact=None, plots=())


def _prepare(config: TrainingRunConfig, directory: RunDirectory, reporter: Reporter) -> PreparedData:
    prepared = prepare_data(
        config.data, vocab_size=config.model.vocab_size, run_dir=directory.root, on_progress=reporter.prepare
    )
    state = "up to date" if prepared.skipped else "prepared"
    reporter.say(
        f"data: {state}, {prepared.num_train_tokens:,} tokens to train on, {prepared.num_held_out_tokens:,} held out"
    )
    if prepared.bad_rows.total:
        reporter.say(f"data: {prepared.bad_rows.total} bad rows were left out, see {prepared.report_path}")
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
    setup = ShardSetup(
        config=config,
        data=prepared.train_dir,
        held_out=prepared.held_out_dir,
        checkpoints=directory.checkpoints,
        device=placement.device,
    )
    shards = RayShardGroup(setup, placement, reserve(placement, timeout_s=config.parallel.timeout_s))
    files = RunFiles(directory, MetricsLog(directory.metrics), EventLog(directory.events))
    coordinator = Coordinator(
        config, shards=shards, files=files, reporter=reporter, stop=stop, checkpoint=plan.checkpoint
    )
    try:
        with stop.awaited():
            return coordinator.run()
    finally:
        shards.close()


def _publish(
    config: TrainingRunConfig, directory: RunDirectory, finished: Finished, prepared: PreparedData
) -> RunResult:
    checkpoint = find_newest_complete(directory.checkpoints).path
    assert checkpoint is not None
    artifact = export_artifact(config, directory, checkpoint=checkpoint, prepared=prepared)
    return RunResult(finished.step, complete=True, artifact=artifact, plots=tuple(draw_plots(directory)))
