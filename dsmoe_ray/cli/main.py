"""The command line: finds the file of the asked command, runs it, and turns its outcome into an exit code.

Every command lives in ``cli/<name>.py`` as one function ``command`` with typer annotations. Only the file of the
command that was asked for is imported, so that ``validate`` and ``--help`` answer without loading torch or Ray.

Exit codes: 0 success, 2 a person's mistake (a message, no traceback), 130 interrupted, 1 everything else.
"""

import importlib
import importlib.metadata
import importlib.util
import keyword
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from dsmoe_ray.errors import DsmoeError, UserError

# A new command is one line here and one file beside this one; a line whose file is not there is not offered.
COMMANDS = {
    "train": "Train a model densely on Ray actors.",
    "evaluate": "Measure loss, perplexity and active parameters of an artifact.",
    "calibrate": "Find the routing that loses least within a compute budget, and deploy it.",
    "generate": "Continue a prompt with an artifact, streamed.",
    "serve": "Serve an artifact at an OpenAI-compatible endpoint.",
    "export": "Write an artifact as a Hugging Face model.",
    "import": "Read a Hugging Face model into an artifact.",
    "validate": "Check a config; print its parameters, FLOPs, memory and traffic.",
    "inspect": "Describe an artifact and verify its digests.",
    "doctor": "Check this machine: versions, cores, memory, GPU, ports.",
    "scale": "Show where experts live and what would change now; pin experts, go back to an earlier plan.",
    "simulate-scaling": "Replay a routing trace through the scaling decisions.",
    "bench": "Measure ratios against a named baseline, side by side.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave the process with its exit code.

    Args:
        arguments: Words after the program's name; by default those of this process.

    Raises:
        SystemExit: always, except when the command fails for a reason of its own; that exception passes through.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        build_app(words)(words, prog_name="dsmoe")
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(2) from None
    except DsmoeError as error:
        # Its message is complete as well; where it came from would not help.
        typer.echo(f"Failed: {error}", err=True)
        raise SystemExit(1) from None


def build_app(words: Sequence[str]) -> typer.Typer:
    """Build the application for one command line: the asked command in full, the others by name and help only."""
    app = typer.Typer(
        help="Train mixture-of-experts language models densely on Ray; run them sparsely.",
        no_args_is_help=True,
        add_completion=False,
        # Plain text: messages stay on one line in logs, and rich is not loaded for an error.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_global_options)
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        module = f"dsmoe_ray.cli.{module_name(name)}"
        if importlib.util.find_spec(module) is not None:
            function = importlib.import_module(module).command if name == asked else _not_asked
            app.command(name, short_help=summary)(function)
    return app


def module_name(command: str) -> str:
    """Return the module of a command; one named like a keyword of Python has an underscore after it."""
    name = command.replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


def _not_asked() -> None:
    """Stand for a command that this command line does not run."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dsmoe_ray {importlib.metadata.version('dsmoe_ray')}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that stand before the command; the version is handled by its callback."""
