"""A directory of prepared data: its parts, its report, and whether it is what a run asks for. Knows no Ray.

Holds ``tokenizer.json``, ``train/`` and ``held_out/`` (token shards) and ``report.json``, which is written last and
names by a digest what the data was made from.
"""

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_ray.data.bad_rows import BadRows
from dsmoe_ray.data.config import DataConfig
from dsmoe_ray.data.shard_index import FORMAT_VERSION
from dsmoe_ray.data.sources import SourceFile, digest_listing
from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.data.tokenizer import TextTokenizer, load_tokenizer
from dsmoe_ray.durable import from_sealed_json, to_sealed_json, write_durably
from dsmoe_ray.errors import DataError

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
TRAIN_DIR = "train"
HELD_OUT_DIR = "held_out"
REPORT_FILE = "report.json"
# Raised when the same sources would give other tokens, so that older results are made again.
_PREPARATION_VERSION = 1
# They say where the result lies and how samples are read from it, not what is in it; the listing stands for `paths`.
_KEYS_WITHOUT_EFFECT = {"paths", "prepared_dir", "document_boundaries", "tokenizer"}


@dataclass(frozen=True)
class PreparedData:
    """Text that is ready to train on."""

    directory: Path
    num_train_tokens: int
    num_held_out_tokens: int
    num_train_documents: int
    num_held_out_documents: int
    bad_rows: BadRows
    """What was left out; also in ``report.json``."""
    skipped: bool
    """It was up to date, so nothing was done."""

    @property
    def tokenizer_path(self) -> Path:
        """Return the path of the tokenizer the tokens were made with."""
        return self.directory / TOKENIZER_FILE

    @property
    def train_dir(self) -> Path:
        """Return the token shards to train on."""
        return self.directory / TRAIN_DIR

    @property
    def held_out_dir(self) -> Path:
        """Return the token shards to evaluate on."""
        return self.directory / HELD_OUT_DIR

    @property
    def report_path(self) -> Path:
        """Return the path of the report."""
        return self.directory / REPORT_FILE


def digest_request(
    sources: list[SourceFile], *, config: DataConfig, vocab_size: int, tokenizer: TextTokenizer | None
) -> str:
    """Return a SHA-256 of everything the result depends on; ``tokenizer`` is None if one will be trained."""
    request = {
        "version": [_PREPARATION_VERSION, FORMAT_VERSION],
        "listing": digest_listing(sources),
        "config": config.model_dump(mode="json", exclude=_KEYS_WITHOUT_EFFECT),
        "vocab_size": vocab_size,
        "tokenizer": tokenizer.to_json() if tokenizer else None,
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def write_report(prepared: PreparedData, directory: Path, *, request_digest: str) -> None:
    """Write ``report.json`` into a directory that is complete otherwise."""
    fields: dict[str, Any] = {
        "request_sha256": request_digest,
        "num_train_tokens": prepared.num_train_tokens,
        "num_held_out_tokens": prepared.num_held_out_tokens,
        "num_train_documents": prepared.num_train_documents,
        "num_held_out_documents": prepared.num_held_out_documents,
        "bad_rows": prepared.bad_rows.to_fields(),
    }
    write_durably(directory / REPORT_FILE, to_sealed_json(fields))


def find_up_to_date(directory: Path, *, request_digest: str, vocab_size: int) -> PreparedData | None:
    """Return the data in a directory if it is whole and is what was asked for."""
    path = directory / REPORT_FILE
    if not path.exists():
        return None
    try:
        fields = from_sealed_json(path.read_bytes())
        if fields["request_sha256"] != request_digest:
            return None
        prepared = _from_fields(directory, fields)
        tokenizer = load_tokenizer(prepared.tokenizer_path, vocab_size=vocab_size)
        for part in (prepared.train_dir, prepared.held_out_dir):
            TokenShards.open(part, vocab_size=vocab_size, tokenizer_digest=tokenizer.digest)
    except (OSError, ValueError, KeyError, DataError) as error:
        # Damage costs time, not the run: everything here can be made again from the sources.
        logger.warning("prepared data in %s is damaged and is made again: %s", directory, error)
        return None
    return prepared


def refuse_foreign(directory: Path) -> None:
    """Refuse to replace a directory that holds something else than prepared data.

    Raises:
        DataError: it is a file, or a directory with other content.
    """
    ours = {TOKENIZER_FILE, TRAIN_DIR, HELD_OUT_DIR, REPORT_FILE}
    if directory.exists() and not (directory.is_dir() and {path.name for path in directory.iterdir()} <= ours):
        raise DataError(
            f"{directory} holds something else than prepared data, and preparing would replace it. Set "
            "data.prepared_dir to a directory that is new or empty."
        )


@contextmanager
def only_one_at_a_time(target: Path) -> Iterator[None]:
    """Hold a lock beside the target, so that runs which share it prepare once and do not disturb each other."""
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that prepares %s", target)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("no file locks at %s (%s): do not prepare it twice at once", target.parent, error)
        yield


def _from_fields(directory: Path, fields: dict[str, Any]) -> PreparedData:
    return PreparedData(
        directory=directory,
        num_train_tokens=fields["num_train_tokens"],
        num_held_out_tokens=fields["num_held_out_tokens"],
        num_train_documents=fields["num_train_documents"],
        num_held_out_documents=fields["num_held_out_documents"],
        bad_rows=BadRows.from_fields(fields["bad_rows"]),
        skipped=True,
    )
