"""Waiting for shards: until they answer, until one is found to be gone or hung, or until the run is told to stop."""

from collections.abc import Sequence
from typing import Any

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.training.policies import find_hung_ranks
from dsmoe_ray.training.shard_group import ShardGroup
from dsmoe_ray.training.states import Replies
from dsmoe_ray.training.stop_request import StopRequest, StopRequestedError

POLL_S = 0.1
SILENCE_S = 10.0
"""A process that does not answer a ping for this long hangs; it answers beside its work."""


class ShardFailureError(Exception):
    """A call cannot succeed any more."""

    def __init__(self, replies: Replies) -> None:
        super().__init__(str(replies))
        self.replies = replies


class ShardCalls:
    """Asks all shards of a run and waits for them."""

    def __init__(self, shards: ShardGroup, stop: StopRequest, *, timeout_s: float) -> None:
        """``timeout_s`` is how long a single step may take."""
        self._shards, self._stop, self._timeout_s = shards, stop, timeout_s
        self._last_reply_s = monotonic_s()

    def gather(
        self, method: str, *arguments: Any, ranks: Sequence[int] | None = None, deadline_s: float
    ) -> dict[int, Any]:
        """Ask, and wait for the answer of each rank; nothing else goes on meanwhile.

        Raises:
            ShardFailureError: a rank failed, or did not answer within ``deadline_s``.
            StopRequestedError: the run is to stop.
        """
        call = self._shards.ask(method, *arguments, ranks=ranks)
        end_s = monotonic_s() + deadline_s
        while True:
            replies = call.poll(POLL_S)
            if self.is_answered(replies, watch=False):
                return dict(sorted(replies.values.items()))
            if self._stop.requested:
                raise StopRequestedError
            if monotonic_s() > end_s:
                late = {rank: f"did not answer {method!r} within {deadline_s:g} s" for rank in replies.waiting}
                raise ShardFailureError(Replies(lost=late))

    def is_answered(self, replies: Replies, *, watch: bool = True) -> bool:
        """Return whether every rank has answered.

        Args:
            replies: What is known of a call.
            watch: Look after the shards when none has answered anything for long: only a ping tells a long step from a
                hung process.

        Raises:
            ShardFailureError: a rank failed or hangs.
        """
        if replies.failed:
            raise ShardFailureError(replies)
        if not replies.waiting:
            self._last_reply_s = monotonic_s()
            return True
        if watch and monotonic_s() - self._last_reply_s > self._timeout_s:
            self._last_reply_s = monotonic_s()
            lost = self.find_lost(Replies())
            if lost:
                raise ShardFailureError(Replies(lost=lost))
        return False

    def find_lost(self, replies: Replies) -> dict[int, str]:
        """Return the ranks that are gone or hang, and why: those known from ``replies``, and those found by a ping."""
        others = [rank for rank in range(self._shards.num_shards) if rank not in replies.lost]
        if not others:
            return dict(replies.lost)
        silence_s = min(SILENCE_S, self._timeout_s)
        pinged = self._shards.ask("ping", ranks=others).poll(silence_s)
        hung = find_hung_ranks(pinged.values, pinged.waiting, timeout_s=self._timeout_s, silence_s=silence_s)
        return {**hung, **pinged.lost, **replies.lost}
