"""Text to token shards in parallel, on Ray Data; the only file of this package that imports Ray.

The sources are cut into units, each unit is read and tokenized by one Ray task that leaves its tokens in a file of the
staging directory, and this process joins those files in corpus order. So the result depends on the sources alone, not
on who tokenized what when; no task or block holds more than a unit; and what travels through Ray is only accounts. The
directory gets its name when it is complete, so a killed preparation leaves nothing that could be taken for a result.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from dsmoe_ray.data.bad_rows import SliceAccount, tally
from dsmoe_ray.data.config import DataConfig
from dsmoe_ray.data.documents import Slice, plan_units
from dsmoe_ray.data.packing import explain_empty, pack_unit, sample_texts
from dsmoe_ray.data.prepared import (
    HELD_OUT_DIR,
    TOKENIZER_FILE,
    TRAIN_DIR,
    PreparedData,
    digest_request,
    find_up_to_date,
    only_one_at_a_time,
    refuse_foreign,
    write_report,
)
from dsmoe_ray.data.shard_index import token_dtype_name
from dsmoe_ray.data.shard_writer import TokenShardWriter
from dsmoe_ray.data.sources import choose_held_out_ratio, expand_path, list_sources
from dsmoe_ray.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from dsmoe_ray.durable import commit_directory, delete_directory, recover_directory, write_durably
from dsmoe_ray.errors import DataError

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[str, int, int], None]
"""Called with a phase (``train tokenizer``, ``tokenize``, ``write``), and how much of how much of it is done."""

# On 30 MB of Python, 16 MB make a vocabulary of 4096 that needs 0.5% more tokens than one trained on all, in half the
# time; and a terabyte takes no longer.
_TOKENIZER_SAMPLE_CHARS = 16_000_000
_MIN_UNIT_BYTES = 1 << 20
_MAX_UNIT_BYTES = 64 << 20
_AIMED_NUM_UNITS = 256


def prepare_data(
    config: DataConfig, *, vocab_size: int, run_dir: Path, on_progress: ProgressCallback | None = None
) -> PreparedData:
    """Turn the text of a run into token shards, unless that has been done and nothing has changed since.

    Ray must be initialised, with at least one CPU free. Sources and result lie on filesystems that every node sees.

    Args:
        config: What to read and how.
        vocab_size: The model's; the tokenizer's ids must be below it.
        run_dir: Where the result lies, as ``data``, if ``config.prepared_dir`` does not say otherwise.
        on_progress: See ``ProgressCallback``; not called if the data is up to date.

    Raises:
        DataError: a path, column or tokenizer is missing or unusable, or no document is left to train or evaluate on.
    """
    target = expand_path(config.prepared_dir) if config.prepared_dir else run_dir.absolute() / "data"
    given = load_tokenizer(expand_path(config.tokenizer), vocab_size=vocab_size) if config.tokenizer else None
    sources = list_sources(config.paths, include=config.include, exclude=config.exclude)
    request_digest = digest_request(sources, config=config, vocab_size=vocab_size, tokenizer=given)
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_one_at_a_time(target):
        recover_directory(target)
        found = find_up_to_date(target, request_digest=request_digest, vocab_size=vocab_size)
        if found is not None:
            return found
        refuse_foreign(target)
        unit_bytes = sum(source.size_bytes for source in sources) // _AIMED_NUM_UNITS
        unit_bytes = min(max(unit_bytes, _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)
        units = plan_units(sources, text_format=config.format, field=config.field, unit_bytes=unit_bytes)
        config = config.model_copy(update={"held_out_ratio": choose_held_out_ratio(sources, config=config)})
        job = _Preparation(config, vocab_size, units, target, on_progress or _ignore_progress)
        return job.run(tokenizer=given, request_digest=request_digest)


@dataclass(frozen=True)
class _Preparation:
    """One pass from sources to a committed directory."""

    config: DataConfig
    vocab_size: int
    units: list[list[Slice]]
    target: Path
    on_progress: ProgressCallback

    @property
    def staging(self) -> Path:
        return self.target.with_name(f".{self.target.name}.staging")

    @property
    def parts_dir(self) -> Path:
        # Beside the staging directory, not in it: nothing must be deleted from that between its last sync and its name.
        return self.target.with_name(f".{self.target.name}.parts")

    def run(self, *, tokenizer: TextTokenizer | None, request_digest: str) -> PreparedData:
        try:
            for directory in (self.staging, self.parts_dir):
                delete_directory(directory)
                directory.mkdir()
            tokenizer = tokenizer or self._train_tokenizer()
            write_durably(self.staging / TOKENIZER_FILE, tokenizer.to_json().encode())
            accounts = self._tokenize(tokenizer)
            prepared = self._join(tokenizer, accounts)
            write_report(prepared, self.staging, request_digest=request_digest)
            commit_directory(self.staging, self.target)
        finally:
            delete_directory(self.parts_dir)
            delete_directory(self.staging)
        if prepared.bad_rows.total:
            details = prepared.bad_rows.describe()
            logger.warning("left out %d bad rows (%s):\n%s", prepared.bad_rows.total, prepared.report_path, details)
        return prepared

    def _train_tokenizer(self) -> TextTokenizer:
        size_bytes = sum(piece.size_bytes for unit in self.units for piece in unit)
        total = min(size_bytes, _TOKENIZER_SAMPLE_CHARS)

        def texts() -> Iterator[str]:
            done = 0
            for text in sample_texts(self.units, config=self.config, max_chars=_TOKENIZER_SAMPLE_CHARS):
                yield text
                done += len(text)
                self.on_progress("train tokenizer", min(done, total), total)

        self.on_progress("train tokenizer", 0, total)
        tokenizer = train_tokenizer(texts(), vocab_size=self.vocab_size)
        self.on_progress("train tokenizer", total, total)
        return tokenizer

    def _tokenize(self, tokenizer: TextTokenizer) -> list[SliceAccount]:
        """Run all units, and return the accounts of all slices in corpus order."""
        shared: dict[str, Any] = {
            "config_json": self.config.model_dump_json(),
            "parts_dir": str(self.parts_dir),
            "dtype": token_dtype_name(self.vocab_size),
            "tokenizer_path": str(self.staging / TOKENIZER_FILE),
            "tokenizer_digest": tokenizer.digest,
        }
        items = [
            {"unit": index, "slices": json.dumps([asdict(p) for p in unit])} for index, unit in enumerate(self.units)
        ]
        sizes_bytes = [sum(piece.size_bytes for piece in unit) for unit in self.units]
        accounts: dict[int, list[SliceAccount]] = {}
        done_bytes, total_bytes = 0, sum(sizes_bytes)
        self.on_progress("tokenize", 0, total_bytes)
        for row in _map_quietly(items, shared):
            if row["mistake"]:
                raise DataError(row["mistake"])
            accounts[row["unit"]] = [SliceAccount(**fields) for fields in json.loads(row["accounts"])]
            done_bytes += sizes_bytes[row["unit"]]
            self.on_progress("tokenize", done_bytes, total_bytes)
        return [account for index in range(len(self.units)) for account in accounts[index]]

    def _join(self, tokenizer: TextTokenizer, accounts: list[SliceAccount]) -> PreparedData:
        """Join the files of all units, in corpus order, to the two directories of token shards."""
        writers = {
            name: TokenShardWriter(
                self.staging / name,
                tokenizer=tokenizer,
                vocab_size=self.vocab_size,
                shard_tokens=self.config.shard_tokens,
            )
            for name in (TRAIN_DIR, HELD_OUT_DIR)
        }
        for index in range(len(self.units)):
            path = _part_path(self.parts_dir, index)
            with np.load(path, allow_pickle=False) as part:
                for name, writer in writers.items():
                    writer.append(part[f"{name}_tokens"], part[f"{name}_lengths"])
            path.unlink()
            self.on_progress("write", index + 1, len(self.units))
        train, held_out = writers[TRAIN_DIR], writers[HELD_OUT_DIR]
        bad_rows = tally(accounts)
        if not train.num_documents + held_out.num_documents:
            raise DataError(explain_empty(self.config, bad_rows))
        _check_both_have_documents(train.num_documents, held_out.num_documents, ratio=self.config.held_out_ratio)
        for writer in writers.values():
            writer.finish()
        return PreparedData(
            directory=self.target,
            num_train_tokens=train.num_tokens,
            num_held_out_tokens=held_out.num_tokens,
            num_train_documents=train.num_documents,
            num_held_out_documents=held_out.num_documents,
            bad_rows=bad_rows,
            skipped=False,
        )


def _check_both_have_documents(num_train: int, num_held_out: int, *, ratio: float) -> None:
    if not num_held_out:
        raise DataError(
            f"none of the {num_train} documents is held out for evaluation at data.held_out_ratio={ratio}: a hash of "
            "each one's name or content decides. Raise data.held_out_ratio, or give the text as more documents."
        )
    if not num_train:
        raise DataError(
            f"all {num_held_out} documents are held out for evaluation at data.held_out_ratio={ratio}: a hash of each "
            "one's name or content decides. Lower data.held_out_ratio, or give the text as more documents."
        )


def _map_quietly(items: list[dict[str, Any]], shared: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the result of each unit as it comes, with Ray Data's own bars and messages off."""
    if not items:
        return
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with _quiet_ray_data(), ray.data.DataContext.current(context):
        # One row a block, so that each unit is a task of its own.
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        yield from dataset.map(partial(_tokenize_unit, **shared)).iter_rows()


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Keep Ray Data's warnings, but neither its account of each execution nor its regret that bars are off."""
    levels = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
    loggers = [(logging.getLogger(name), logging.getLogger(name).level, level) for name, level in levels.items()]
    for named, _, level in loggers:
        named.setLevel(level)
    try:
        yield
    finally:
        for named, level_before, _ in loggers:
            named.setLevel(level_before)


def _tokenize_unit(
    row: dict[str, Any],
    *,
    config_json: str,
    parts_dir: str,
    dtype: str,
    tokenizer_path: str,
    tokenizer_digest: str,
) -> dict[str, Any]:
    """Tokenize one unit in a Ray worker and leave its tokens in a file."""
    config = DataConfig.model_validate_json(config_json)
    unit = [Slice(**fields) for fields in json.loads(row["slices"])]
    for path in [parts_dir, *(piece.path for piece in unit if piece.size_bytes)]:
        if not os.path.exists(path):
            # Returned and not raised, because Ray Data would dress it in its own words and stacks.
            mistake = f"{path} is not there on node {os.uname().nodename}. Put it on a filesystem that all nodes see."
            return {"unit": row["unit"], "accounts": "[]", "mistake": mistake}
    # A task owns one CPU; the tokenizer's threads would take all of them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = _load_once(tokenizer_path, tokenizer_digest)
    train, held_out, accounts = pack_unit(unit, config=config, tokenizer=tokenizer)
    part_path = _part_path(Path(parts_dir), int(row["unit"]))
    # Ray may run a task twice; a file is whole or not there.
    unfinished = part_path.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as stream:
        np.savez(
            stream,
            train_tokens=train.tokens.astype(dtype),
            train_lengths=train.lengths,
            held_out_tokens=held_out.tokens.astype(dtype),
            held_out_lengths=held_out.lengths,
        )
    unfinished.rename(part_path)
    return {"unit": row["unit"], "accounts": json.dumps([asdict(account) for account in accounts]), "mistake": ""}


@lru_cache(maxsize=1)
def _load_once(path: str, digest: str) -> TextTokenizer:
    """Load the tokenizer once per worker process; the digest tells it from an earlier one of the same path."""
    return load_tokenizer(Path(path))


def _part_path(parts_dir: Path, unit: int) -> Path:
    return parts_dir / f"{unit:06d}.npz"


def _ignore_progress(phase: str, done: int, total: int) -> None:
    """Stand in for a caller who does not ask."""
