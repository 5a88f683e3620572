"""Give a published model another deployed routing. The weights are neither read nor written, only named anew."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from dsmoe_ray.artifact.calibration_record import CalibrationRecord
from dsmoe_ray.artifact.load import Artifact
from dsmoe_ray.artifact.manifest import CONFIG, MANIFEST, ArtifactManifest, SideFile, describe_routing
from dsmoe_ray.artifact.save import to_json_file
from dsmoe_ray.config_io import config_digest
from dsmoe_ray.durable import commit_directory, delete_directory, recover_directory, sync_file, write_durably
from dsmoe_ray.errors import ArtifactError
from dsmoe_ray.model.config import RoutingConfig

_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


def update_routing(
    artifact: Artifact, *, ffn: RoutingConfig, calibration: CalibrationRecord | None, target: Path | None = None
) -> Path:
    """Publish the artifact with another deployed routing of its FFN mixture; return its directory.

    A reader sees the old artifact or the new one, never a mixture. Whoever has the old one open keeps it.

    Args:
        artifact: The model.
        ffn: What the FFN runs with from now on.
        calibration: How it was found; None removes what an earlier calibration left.
        target: Where to publish, see ``check_target``; by default the artifact is replaced. Files are hard links to the
            artifact's where the filesystem allows, and copies elsewhere.

    Raises:
        ArtifactError: the directory cannot be written.
        ValueError: the rule is impossible with this model.
    """
    # Of an artifact that is a symbolic link the directory is replaced, not the link.
    source = artifact.directory.resolve()
    directory = source if target is None else target.absolute()
    config = artifact.model_config.with_ffn_routing(ffn)
    content = to_json_file(config.model_dump(mode="json"))
    staging = directory.with_name(f".staging-{directory.name}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        recover_directory(directory)
        delete_directory(staging)
        shutil.copytree(source, staging, copy_function=_link, ignore=_leave_out(source))
        side_file = SideFile(**write_durably(staging / CONFIG, content)._asdict())
        manifest = ArtifactManifest.model_validate(
            artifact.manifest.model_dump()
            | {
                "config_sha256": config_digest(config),
                "routing": describe_routing(config),
                "side_files": {**artifact.manifest.side_files, CONFIG: side_file},
                "calibration": calibration,
            }
        )
        write_durably(staging / MANIFEST, manifest.to_bytes())
        commit_directory(staging, directory)
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be written: {error}. Give another directory to write to.") from error
    finally:
        delete_directory(staging)
    return directory


def _leave_out(source: Path) -> Callable[[str, list[str]], list[str]]:
    """Return which names are written anew, in the artifact itself but not in a directory that someone put into it."""

    def choose(directory: str, found: list[str]) -> list[str]:
        return [name for name in found if name in (CONFIG, MANIFEST)] if Path(directory) == source else []

    return choose


def _link(source: str, target: str) -> None:
    """Name a file a second time; where that is impossible, copy it and wait until the copy is on the disk."""
    try:
        # A link to a symbolic link would dangle once that one is gone.
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        shutil.copyfile(source, target)
        sync_file(Path(target))
