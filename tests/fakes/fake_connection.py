"""One end of a connection whose other end is the test."""

import queue
import threading

from dsmoe_ray.errors import ConnectionLostError

LONG_S = 30.0


class FakeConnection:
    """What is sent is kept for ``next_sent``; what is received comes from ``deliver``. ``stall`` blocks senders."""

    def __init__(self, **peer):
        self.peer = peer
        self.is_closed = threading.Event()
        self._is_asking = threading.Semaphore(0)
        self._sent = queue.SimpleQueue()
        self._received = queue.SimpleQueue()
        self._may_send = threading.Event()
        self._may_send.set()

    def stall(self):
        self._may_send.clear()

    def deliver(self, frame):
        """Let the other end receive a frame; return when it has dealt with it."""
        self._wait_until_asking()
        self._received.put(frame)
        self._wait_until_asking()
        self._is_asking.release()

    def _wait_until_asking(self):
        assert self._is_asking.acquire(timeout=LONG_S)

    def next_sent(self, *kinds):
        """Return the next frame that was sent, of these kinds if some are given."""
        while True:
            frame = self._sent.get(timeout=LONG_S)
            if not kinds or frame.kind in kinds:
                return frame

    def send(self, frame):
        self._may_send.wait()
        if self.is_closed.is_set():
            raise ConnectionLostError("the test has closed it")
        self._sent.put(frame)

    def receive(self, timeout_s=None):
        self._is_asking.release()
        try:
            frame = self._received.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if frame is None:
            raise ConnectionLostError("the test has closed it")
        return frame

    def close(self):
        self.is_closed.set()
        self._may_send.set()
        self._received.put(None)
        self._is_asking.release()
