"""The directory of a run: what lies where in it, who may write to it, and whether every shard sees the same one."""

import fcntl
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsmoe_ray.artifact.manifest import read_manifest
from dsmoe_ray.config_io import to_yaml
from dsmoe_ray.errors import ArtifactError, ConfigError
from dsmoe_ray.training.config import TrainingRunConfig

logger = logging.getLogger(__name__)


JOB_COPY = "working_dir_files"
"""Ray unpacks the working directories of jobs under a directory of this name."""


@dataclass(frozen=True)
class Probe:
    """A file with a secret: who can tell what is in it sees the directory it lies in."""

    path: Path
    token: str


@dataclass(frozen=True)
class RunDirectory:
    """Names in a run directory; ``root`` is absolute."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration of the last start."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One row for each step."""
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """Everything else that happened."""
        return self.root / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Directories to resume from."""
        return self.root / "checkpoints"

    @property
    def artifact(self) -> Path:
        """The published model, once the run is complete."""
        return self.root / "artifact"

    @property
    def plots(self) -> Path:
        """Pictures of loss and routing."""
        return self.root / "plots"

    def has_artifact_of(self, step: int) -> bool:
        """Return whether the model after ``step`` steps has been published here."""
        try:
            return bool(read_manifest(self.artifact).provenance.get("step") == step)
        except ArtifactError:
            return False

    def write_config(self, config: TrainingRunConfig) -> None:
        """Save the resolved configuration, all at once."""
        replacement = self.root / ".config.yaml.new"
        replacement.write_text(to_yaml(config), encoding="utf-8")
        replacement.replace(self.config)

    @contextmanager
    def probe(self) -> Iterator[Probe]:
        """Leave a file for every shard to read back, for as long as the block lasts."""
        probe = Probe(self.root / f".probe-{secrets.token_hex(4)}", secrets.token_hex(16))
        probe.path.write_text(probe.token, encoding="ascii")
        try:
            yield probe
        finally:
            probe.path.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out for as long as the block lasts; the lock of a killed process ends with it.

        Raises:
            ConfigError: another run is using the directory; names it.
        """
        with (self.root / ".lock").open("a+", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                raise ConfigError(
                    f"{self.root} is in use by another run ({stream.read().strip()}). "
                    "Wait for it, stop it with SIGTERM, or set run.dir to another directory."
                ) from None
            except OSError as error:
                logger.warning("no file locks at %s (%s): do not start two runs there at once", self.root, error)
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}")
            stream.flush()
            yield


def open_run_directory(config: TrainingRunConfig) -> RunDirectory:
    """Create the run directory if need be.

    Raises:
        ConfigError: it cannot be created or written, or would be deleted with the job.
    """
    try:
        root = Path(config.run.dir).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"run.dir={config.run.dir!r} names the home of an unknown user; write the path.") from error
    if JOB_COPY in root.parts:
        raise ConfigError(
            f"run.dir: {root} lies in the copy of the working directory that Ray made for this job and deletes after "
            "it. Set run.dir to an absolute path on a file system that every machine of the cluster mounts."
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("a"):
            pass
    except OSError as error:
        raise ConfigError(f"run.dir: {root} cannot be written ({error.strerror}); choose another directory.") from error
    return RunDirectory(root)


def read_probe(path: Path) -> str | None:
    """Return what a shard finds in the probe file, None if nothing is there."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return None


def check_probe(probe: Probe, seen_by_rank: dict[int, str | None], hosts: dict[int, str]) -> None:
    """Refuse a run directory that some shard does not see.

    Raises:
        ConfigError: names the ranks and their machines.
    """
    blind = [rank for rank, seen in sorted(seen_by_rank.items()) if seen != probe.token]
    if blind:
        names = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in blind)
        raise ConfigError(
            f"run.dir: {probe.path.parent} is not the same directory everywhere: {names} cannot see what was written "
            "here. Set run.dir to a directory on a file system that every machine of the cluster mounts."
        )
