"""Routers that say what a test tells them to."""

import asyncio

from dsmoe_ray.inference.outputs import SequenceOutput
from dsmoe_ray.inference.sampling_config import SampledToken


def make_output(token_id=None, text="", *, idx=0, **fields):
    token = None if token_id is None else SampledToken(token_id, fields.pop("logprob", None), fields.pop("top", ()))
    return SequenceOutput(request_id="any", sequence_idx=idx, token=token, text=text, **fields)


class ScriptedPool:
    """Every request reads its outputs, or the error it ends with, from a queue of its own."""

    def __init__(self):
        self.queues: list[asyncio.Queue] = []
        self.requests = []
        self.deadlines_s = []
        self.closed: list[int] = []

    async def generate(self, request_id, request, *, deadline_s=None):
        number, queue = len(self.queues), asyncio.Queue()
        self.queues.append(queue)
        self.requests.append((request_id, request))
        self.deadlines_s.append(deadline_s)
        try:
            while (found := await queue.get()) is not None:
                if isinstance(found, Exception):
                    raise found
                yield found
        finally:
            self.closed.append(number)

    def say(self, *found, number=0):
        for one in found:
            self.queues[number].put_nowait(one)
