"""Account for what a corpus could not use: counts by reason, with a few examples that a person can look up.

A slice is read apart from the rest of its file, so its account numbers rows from its own start; ``tally`` puts the
accounts of a corpus together in order and turns them into row numbers of the file.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsmoe_ray.data.config import TextFormat
from dsmoe_ray.data.documents import BadRow, BadRowReason, Document, Slice, read_slice

_NUM_EXAMPLES = 3


@dataclass
class SliceAccount:
    """What reading one slice came to."""

    path: str
    is_whole_file: bool
    """The slice is one document, so that a row number would say nothing."""
    num_rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: list[tuple[str, int, str]] = field(default_factory=list)
    """The first few of each reason: reason, row in this slice from 1, and what was wrong."""

    def add(self, bad: BadRow) -> None:
        """Count the row that was read last."""
        self.counts[bad.reason] = self.counts.get(bad.reason, 0) + 1
        if self.counts[bad.reason] <= _NUM_EXAMPLES:
            self.examples.append((str(bad.reason), self.num_rows, bad.detail))


@dataclass
class BadRows:
    """Rows and files that were left out of a corpus."""

    counts: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason (a value of ``BadRowReason``)."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each reason, as ``PATH:ROW: what was wrong``."""

    @property
    def total(self) -> int:
        """Return how many rows were left out."""
        return sum(self.counts.values())

    def describe(self) -> str:
        """Return one line per reason, with its first example."""
        return "\n".join(f"  {count} x {reason}: {self.examples[reason][0]}" for reason, count in self.counts.items())

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"counts": self.counts, "examples": self.examples}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "BadRows":
        """Take back what ``to_fields`` gave."""
        return cls(dict(fields["counts"]), {reason: list(kept) for reason, kept in fields["examples"].items()})


def read_documents(
    piece: Slice, *, text_format: TextFormat, field: str, accounts: list[SliceAccount]
) -> Iterator[Document]:
    """Yield the documents of a slice; its account is appended and grows while reading."""
    account = SliceAccount(piece.path, is_whole_file=text_format == "text")
    accounts.append(account)
    for item in read_slice(piece, text_format=text_format, field=field):
        account.num_rows += 1
        if isinstance(item, BadRow):
            account.add(item)
        elif item is not None:
            yield item


def tally(accounts: Iterable[SliceAccount]) -> BadRows:
    """Put the accounts of consecutive slices together."""
    bad_rows = BadRows()
    path, num_rows_before = "", 0
    for account in accounts:
        if account.path != path:
            path, num_rows_before = account.path, 0
        for reason, count in account.counts.items():
            bad_rows.counts[reason] = bad_rows.counts.get(reason, 0) + count
        for reason, row, detail in account.examples:
            kept = bad_rows.examples.setdefault(reason, [])
            if len(kept) < _NUM_EXAMPLES:
                of_file = account.is_whole_file or reason == BadRowReason.UNREADABLE
                place = path if of_file else f"{path}:{num_rows_before + row}"
                kept.append(f"{place}: {detail}" if detail else place)
        num_rows_before += account.num_rows
    return bad_rows
