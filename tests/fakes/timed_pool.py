"""Routers that take the same time for everyone, however many there are: what remains is the gateway's own."""

import asyncio

from tests.fakes.scripted_pool import make_output


class TimedPool:
    """Implements ``GenerationPool``: the first token comes after ``first_s``, the others every ``next_s``."""

    def __init__(self, *, first_s, next_s):
        self._first_s, self._next_s = first_s, next_s
        self.num_under_way = self.most_under_way = 0

    async def generate(self, request_id, request, *, deadline_s=None):
        self.num_under_way += request.n
        self.most_under_way = max(self.most_under_way, self.num_under_way)
        try:
            for number in range(1, request.max_tokens + 1):
                await asyncio.sleep(self._first_s if number == 1 else self._next_s)
                for idx in range(request.n):
                    ended = {"finish_reason": "length"} if number == request.max_tokens else {}
                    yield make_output(5, "x", idx=idx, **ended)
        finally:
            self.num_under_way -= request.n

    def close(self):
        assert not self.num_under_way
