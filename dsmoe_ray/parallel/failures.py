"""What a failed collective tells a person: its name, the cause, and which ranks were not heard of.

Every rank whose collective fails leaves a note in the rendezvous store and reads the others' for a moment. A rank
without a note is dead, hung, or still waiting in a collective of its own.
"""

import re
from datetime import timedelta
from types import TracebackType

from torch import distributed

from dsmoe_ray import clock
from dsmoe_ray.errors import ExchangeError

_GRACE_S = 0.5
_POLL_S = 0.02
# Words only gloo and NCCL use; their errors have no type of their own.
_SIGNATURES = ("gloo", "NCCL", "pair closure", "Connection closed by peer", "Connection reset by peer")


class FailureBoard:
    """The notes of one world."""

    def __init__(self, store: distributed.Store, *, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size

    def report(self, collective: str, cause: str) -> str:
        """Note that ``collective`` failed here; return the whole message for a person."""
        where = f"{collective} failed on rank {self._rank} of {self._world_size}"
        return f"{where}: {_in_short(cause)}. {self._others(collective)}"

    def _others(self, collective: str) -> str:
        try:
            self._store.set_timeout(timedelta(seconds=_GRACE_S))
            self._store.set(_key(self._rank), collective)
            missing = self._wait_for_notes()
            notes = {rank: self._store.get(_key(rank)).decode() for rank in self._peers() if rank not in missing}
        except RuntimeError as error:
            return f"Rank 0, which keeps the rendezvous store, is lost: it does not answer ({_in_short(str(error))})."
        heard = "; ".join(f"rank {rank} failed in {note}" for rank, note in notes.items())
        lost = f"Not heard of (dead, hung or waiting elsewhere): {', '.join(f'rank {rank}' for rank in missing)}."
        return " ".join(part for part in (f"{heard}." if heard else "", lost if missing else "") if part)

    def _wait_for_notes(self) -> list[int]:
        deadline_s = clock.monotonic_s() + _GRACE_S
        missing = self._peers()
        while missing and clock.monotonic_s() < deadline_s:
            missing = [rank for rank in missing if not self._store.check([_key(rank)])]
            clock.sleep_s(_POLL_S)
        return missing

    def _peers(self) -> list[int]:
        return [rank for rank in range(self._world_size) if rank != self._rank]


class FailuresNamed:
    """A block in which a failed collective becomes an ``ExchangeError``; every other error passes.

    The error tells the collective's name, the cause and the ranks that were not heard of.
    """

    def __init__(self, collective: str, board: FailureBoard | None) -> None:
        self._collective = collective
        self._board = board

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, RuntimeError) or not _is_collective_failure(error):
            return
        # The frames of the failed collective hold its tensors, and through them its connections open.
        error.__traceback__ = None
        del traceback
        if self._board is None:
            raise ExchangeError(f"{self._collective} failed: {_in_short(str(error))}") from None
        raise ExchangeError(self._board.report(self._collective, str(error))) from None


def _is_collective_failure(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or any(word in str(error) for word in _SIGNATURES)


def _in_short(cause: str) -> str:
    """Return the first sentence, without the source file that gloo puts before it."""
    first_line = (cause.splitlines() or ["no cause given"])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", first_line).split(". ")[0].rstrip(".")


def _key(rank: int) -> str:
    return f"failure/{rank}"
