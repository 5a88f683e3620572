"""``dsmoe train CONFIG``: train a model densely on Ray actors, or rehearse it."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dsmoe_ray.cli.validate import LOG_WIDTH, print_report
from dsmoe_ray.config_io import load_config
from dsmoe_ray.errors import ConfigError, TrainingError
from dsmoe_ray.ray_environment import prepare_local_ray
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.resume import ResumePlan, plan_resume
from dsmoe_ray.training.run_checks import find_obstacles
from dsmoe_ray.training.run_directory import RunDirectory, open_run_directory
from dsmoe_ray.training.validation import build_report


def command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one key; may be given many times.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster, HOST:PORT or 'auto'. By default that of RAY_ADDRESS; without it a local Ray is started.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|DIR",
            help="Go on from the newest checkpoint, start over (moving the old run aside), or start from a checkpoint.",
        ),
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run would cost and do one step on shapes alone.")
    ] = False,
) -> None:
    """Train a model densely on Ray actors. The same command again continues a run that was stopped or killed."""
    run_config = load_config(config, TrainingRunConfig, overrides=overrides or ())
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    if dry_run:
        _rehearse(run_config, console)
        return
    obstacles = find_obstacles(run_config)
    if obstacles:
        raise ConfigError(f"{config}: " + "; ".join(obstacles))
    directory = open_run_directory(run_config)
    with directory.lock():
        plan = plan_resume(directory, run_config, resume)
        if plan.step >= run_config.train.steps and directory.has_artifact_of(plan.step):
            advice = "Raise train.steps to go on, or start over with --resume never."
            _tell(console, f"This run is complete at step {plan.step}. {advice}")
            _say_next(console, run_config, directory)
            return
        _train(_with_absolute_paths(run_config, directory), directory, plan, address=address, console=console)


def _rehearse(config: TrainingRunConfig, console: Console) -> None:
    from dsmoe_ray.training.dry_run import rehearse_step

    report = build_report(config)
    print_report(report, console)
    if report.failed:
        raise ConfigError("; ".join(check.detail for check in report.failed))
    _tell(console, rehearse_step(config).describe())


def _train(
    config: TrainingRunConfig, directory: RunDirectory, plan: ResumePlan, *, address: str | None, console: Console
) -> None:
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        prepare_local_ray()
    from dsmoe_ray.training.fine_tuning import adopt_tokenizer

    config = adopt_tokenizer(config)
    # Ray takes seconds to load, which a mistake in what the run starts from need not wait for.
    from dsmoe_ray.training.progress import build_reporter
    from dsmoe_ray.training.run import run_on_ray

    reporter = build_reporter(console)
    reporter.say(f"run directory: {directory.root}")
    for note in plan.notes:
        reporter.say(note)
    if plan.checkpoint is not None:
        reporter.say(f"resuming from {plan.checkpoint}, step {plan.step}")
    if address is None:
        reporter.say("starting a local Ray")
    try:
        result = run_on_ray(config, directory, plan, address=address, reporter=reporter)
    except TrainingError as error:
        if error.__cause__ is not None:
            raise
        # A reason that the run found itself; where in the code it did so tells a person nothing.
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    finally:
        reporter.close()
    if not result.complete or result.prepared is None:
        advice = "The same command continues the run, with --resume auto or without --resume."
        _tell(console, f"Stopped at step {result.step} of {config.train.steps}. {advice}")
        return
    _tell(console, f"Trained {result.step} steps. Publishing the model.")
    # Loads torch, which the coordinator does without.
    from dsmoe_ray.training.publish import publish

    publish(config, directory, result.prepared)
    _say_next(console, config, directory)


def _with_absolute_paths(config: TrainingRunConfig, directory: RunDirectory) -> TrainingRunConfig:
    """Return the configuration for processes whose working directory is another."""
    model = config.model
    if model.init_from is not None:
        model = model.model_copy(update={"init_from": str(Path(model.init_from).expanduser().absolute())})
    run = config.run.model_copy(update={"dir": str(directory.root)})
    return config.model_copy(update={"run": run, "model": model})


def _say_next(console: Console, config: TrainingRunConfig, directory: RunDirectory) -> None:
    for name, path in (
        ("artifact", directory.artifact),
        ("plots", directory.plots),
        ("metrics", directory.metrics),
        ("config", directory.config),
        ("checkpoints", directory.checkpoints),
    ):
        _tell(console, f"  {name + ':':<13}{path}")
    prepared = Path(config.data.prepared_dir) if config.data.prepared_dir else directory.root / "data"
    sparse = f" --routing top_k={max(config.model.ffn.num_experts // 4, 1)}" if config.model.ffn.kind == "moe" else ""
    _tell(console, "Next:")
    _tell(console, f"  dsmoe evaluate {directory.artifact} --data {prepared / 'held_out'} --routing dense{sparse}")
    _tell(console, f"  dsmoe generate {directory.artifact} --prompt 'import ' --max-tokens 64")


def _tell(console: Console, message: str) -> None:
    console.print(message, markup=False, highlight=False, soft_wrap=True)
