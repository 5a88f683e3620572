"""Documents out of text, JSONL and parquet files, and an account of every row that is not one.

A corpus is cut into slices (a text file, a byte range of a JSONL file, a row group of a parquet file) and slices are
grouped into units, the pieces of work that are read and tokenized apart. The cut depends on the listing alone. Nothing
bad in a row or a file raises here: it becomes a ``BadRow``, which the caller counts. Knows no tokenizer and no Ray.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsmoe_ray.data.config import TextFormat
from dsmoe_ray.data.sources import SourceFile
from dsmoe_ray.errors import DataError


class BadRowReason(StrEnum):
    """Why a row or a file gave no document."""

    UNREADABLE = "unreadable file"
    NOT_UTF8 = "not valid UTF-8"
    NOT_JSON = "not valid JSON"
    NOT_AN_OBJECT = "not a JSON object"
    MISSING_FIELD = "field missing"
    NULL = "field is null"
    NOT_A_STRING = "field is not a string"
    EMPTY = "empty text"


@dataclass(frozen=True)
class Document:
    """One text and what decides whether it is held out: the name of its file, or its content if it is a row."""

    text: str
    identity: bytes


@dataclass(frozen=True)
class BadRow:
    """A row or file that is left out, and what was wrong with it."""

    reason: BadRowReason
    detail: str = ""


@dataclass(frozen=True)
class Slice:
    """A part of one source file that is read in one go.

    ``start`` and ``stop`` are bytes of a JSONL file (a line belongs to the slice it begins in), row groups of a parquet
    file, and mean nothing for a text file.
    """

    path: str
    name: str
    start: int
    stop: int
    size_bytes: int


def plan_units(
    sources: Sequence[SourceFile], *, text_format: TextFormat, field: str, unit_bytes: int
) -> list[list[Slice]]:
    """Cut the sources into units of about ``unit_bytes``, in corpus order.

    Raises:
        DataError: a parquet file has no column ``field``, or one that holds no strings.
    """
    units: list[list[Slice]] = []
    room_bytes = 0
    for source in sources:
        for piece in _cut(source, text_format=text_format, field=field, slice_bytes=unit_bytes):
            if room_bytes <= 0:
                units.append([])
                room_bytes = unit_bytes
            units[-1].append(piece)
            room_bytes -= piece.size_bytes
    return units


def read_slice(piece: Slice, *, text_format: TextFormat, field: str) -> Iterator[Document | BadRow | None]:
    """Yield what each row of a slice holds, in order; None for a blank line, which is no row but has a number."""
    try:
        if text_format == "text":
            yield _read_text(piece)
        elif text_format == "jsonl":
            yield from _read_jsonl(piece, field=field)
        else:
            yield from _read_parquet(piece, field=field)
    except (OSError, pa.ArrowException) as error:
        yield BadRow(BadRowReason.UNREADABLE, _shorten(str(error)))


def _cut(source: SourceFile, *, text_format: TextFormat, field: str, slice_bytes: int) -> Iterator[Slice]:
    if text_format == "parquet":
        yield from _cut_parquet(source, field=field)
        return
    step = slice_bytes if text_format == "jsonl" else max(source.size_bytes, 1)
    for start in range(0, max(source.size_bytes, 1), step):
        stop = min(start + step, source.size_bytes)
        yield Slice(source.path, source.name, start=start, stop=stop, size_bytes=stop - start)


def _cut_parquet(source: SourceFile, *, field: str) -> Iterator[Slice]:
    try:
        with pq.ParquetFile(source.path) as parquet:
            _check_column(parquet.schema_arrow, field=field, path=source.path)
            num_row_groups = parquet.metadata.num_row_groups
    except (OSError, pa.ArrowException):
        # Not a parquet file: reading the slice fails the same way and counts it.
        yield Slice(source.path, source.name, start=0, stop=1, size_bytes=source.size_bytes)
        return
    for group in range(num_row_groups):
        # Shares of the file, so that the sizes of all slices add up to what was listed.
        start_bytes = source.size_bytes * group // num_row_groups
        stop_bytes = source.size_bytes * (group + 1) // num_row_groups
        yield Slice(source.path, source.name, start=group, stop=group + 1, size_bytes=stop_bytes - start_bytes)


def _check_column(schema: pa.Schema, *, field: str, path: str) -> None:
    if field not in schema.names:
        raise DataError(
            f"{path} has no column {field!r}; it has {', '.join(schema.names)}. Set data.field to one of them."
        )
    kind = schema.field(field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (_is_text(kind) or pa.types.is_null(kind)):
        raise DataError(f"column {field!r} of {path} holds {kind}, not strings. Set data.field to a column of text.")


def _is_text(kind: pa.DataType) -> bool:
    return any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    )


def _read_text(piece: Slice) -> Document | BadRow:
    with open(piece.path, "rb") as stream:
        data = stream.read()
    return _to_document(data, identity=os.fsencode(piece.name))


def _read_jsonl(piece: Slice, *, field: str) -> Iterator[Document | BadRow | None]:
    for line in _iterate_lines(piece):
        yield _parse_line(line, field=field) if line.strip() else None


def _iterate_lines(piece: Slice) -> Iterator[bytes]:
    with open(piece.path, "rb") as stream:
        if piece.start:
            # From one byte earlier, so that a line that begins exactly at the start is kept.
            stream.seek(piece.start - 1)
            stream.readline()
        position = stream.tell()
        while position < piece.stop and (line := stream.readline()):
            position += len(line)
            yield line


def _parse_line(line: bytes, *, field: str) -> Document | BadRow:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(BadRowReason.NOT_UTF8, _shorten(str(error)))
    except (ValueError, RecursionError) as error:
        return BadRow(BadRowReason.NOT_JSON, _shorten(str(error)))
    if not isinstance(value, dict):
        return BadRow(BadRowReason.NOT_AN_OBJECT, f"it is a {type(value).__name__}")
    if field not in value:
        return BadRow(BadRowReason.MISSING_FIELD, _shorten(f"it has {', '.join(value) or 'no fields'}"))
    return _check_value(value[field])


def _check_value(value: Any) -> Document | BadRow:
    if value is None:
        return BadRow(BadRowReason.NULL)
    if not isinstance(value, str):
        return BadRow(BadRowReason.NOT_A_STRING, f"it is a {type(value).__name__}")
    try:
        # JSON can spell half of a surrogate pair, which no tokenizer takes.
        data = value.encode("utf-8")
    except UnicodeEncodeError as error:
        return BadRow(BadRowReason.NOT_UTF8, _shorten(str(error)))
    return _to_document(data)


def _read_parquet(piece: Slice, *, field: str) -> Iterator[Document | BadRow]:
    with pq.ParquetFile(piece.path) as parquet:
        batches = parquet.iter_batches(batch_size=256, row_groups=range(piece.start, piece.stop), columns=[field])
        for batch in batches:
            # As bytes, so that one string that is not UTF-8 costs a row and not the file.
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            for value in column.cast(pa.large_binary()).to_pylist():
                yield BadRow(BadRowReason.NULL) if value is None else _to_document(value)


def _to_document(data: bytes, *, identity: bytes | None = None) -> Document | BadRow:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadRow(BadRowReason.NOT_UTF8, _shorten(str(error)))
    if not text:
        return BadRow(BadRowReason.EMPTY)
    return Document(text, data if identity is None else identity)


def _shorten(text: str, *, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
