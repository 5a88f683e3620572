"""One real engine on a thread, as the gateway sees its routers."""

import asyncio
import queue
import threading

from dsmoe_ray.inference.outputs import SequenceOutput

_STOP = None


class EnginePool:
    """Implements ``GenerationPool``. ``hold`` keeps the engine from its next step until it is set again."""

    def __init__(self, engine):
        self.engine = engine
        self.canceled: list[str] = []
        self.requests = {}
        self.failure: Exception | None = None
        self.hold = threading.Event()
        self.hold.set()
        self._inbox: queue.Queue = queue.Queue()
        self._readers = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    async def generate(self, request_id, request, *, deadline_s=None):
        self.requests[request_id] = request
        if self.failure is not None:
            raise self.failure
        loop, outputs = asyncio.get_running_loop(), asyncio.Queue()

        def put(found):
            loop.call_soon_threadsafe(outputs.put_nowait, found)

        self._inbox.put((request_id, request, put))
        num_left = request.n
        try:
            while num_left:
                found = await outputs.get()
                if not isinstance(found, SequenceOutput):
                    raise found
                num_left -= found.finish_reason is not None
                yield found
        finally:
            self._inbox.put((request_id, None, put))
            if num_left:
                self.canceled.append(request_id)

    def close(self):
        self.hold.set()
        self._inbox.put(_STOP)
        self._thread.join()

    @property
    def num_under_way(self):
        return self.engine.status.num_running + self.engine.status.num_waiting

    def _run(self):
        while self._take_messages():
            if self.engine.has_work and self.hold.is_set():
                for output in self.engine.step():
                    self._readers[output.request_id](output)

    def _take_messages(self):
        idle = not self.engine.has_work or not self.hold.is_set()
        try:
            message = self._inbox.get(timeout=0.01 if idle else 0)
            while message is not _STOP:
                self._take(*message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return True
        return False

    def _take(self, request_id, request, put):
        if request is None:
            self.engine.cancel(request_id)
            self._readers.pop(request_id, None)
            return
        self._readers[request_id] = put
        try:
            self.engine.add(request_id, request)
        except Exception as error:
            put(error)
