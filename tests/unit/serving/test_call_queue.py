"""Who computes whose calls, seen one step at a time: a computation lasts until the test lets it end."""

import threading
from dataclasses import dataclass

from dsmoe_ray.serving.call_queue import CallQueue, QueuedCall, QueueFullError

WAIT_S = 60.0
"""Far more than anything takes, so that only a deadlock runs into it."""


@dataclass(eq=False, kw_only=True, slots=True)
class Call(QueuedCall):
    name: str


class Computer:
    """Computes when it is told to; ``batches`` are the names that it was given together."""

    def __init__(self, *, max_size=10, max_waiting=8):
        self.batches, self.threads, self.errors = [], [], {}
        self.began, self.may_end = threading.Semaphore(0), threading.Semaphore(0)
        self.queue = CallQueue(self.compute, max_size=max_size, max_waiting=max_waiting)

    def compute(self, batch):
        self.batches.append([call.name for call in batch])
        self.began.release()
        assert self.may_end.acquire(timeout=WAIT_S)
        if batch[0].name in self.errors:
            raise self.errors[batch[0].name]

    def bring(self, name, key="layer 0", size=1):
        """Bring a call on a thread; return once it is computed or waits."""
        num_waiting, is_busy = self.queue.num_waiting, bool(self.threads)
        ends = []

        def run():
            try:
                self.queue.run(Call(key=key, size=size, name=name))
                ends.append("done")
            except (ValueError, QueueFullError) as error:
                ends.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        self.threads.append(thread)
        if not is_busy:
            assert self.began.acquire(timeout=WAIT_S)
        else:
            while thread.is_alive() and self.queue.num_waiting == num_waiting:
                thread.join(0.001)
        return ends

    def end(self, count=1):
        """Let computations end; wait until all threads are out if none begins after them."""
        for _ in range(count):
            self.may_end.release()

    def join(self):
        for thread in self.threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()


def test_a_call_is_computed_in_the_thread_that_brings_it():
    queue = CallQueue(lambda batch: threads.append(threading.current_thread()), max_size=1, max_waiting=1)
    threads = []
    queue.run(Call(key="layer 0", size=1, name="a"))
    queue.run(Call(key="layer 0", size=5, name="b"))
    assert threads == [threading.current_thread()] * 2


def test_waiting_calls_with_one_key_are_computed_together_in_the_order_of_the_oldest():
    computer = Computer()
    ends = [computer.bring("a")]
    ends += [computer.bring(name, key) for name, key in [("b", 1), ("c", 0), ("d", 1), ("e", 2), ("f", 0)]]
    computer.end(4)
    computer.join()
    assert computer.batches == [["a"], ["b", "d"], ["c", "f"], ["e"]]
    assert ends == [["done"]] * 6


def test_calls_are_merged_up_to_a_size_only():
    computer = Computer(max_size=5)
    computer.bring("a")
    for name, size in (("b", 3), ("c", 3), ("d", 2), ("e", 9)):
        computer.bring(name, size=size)
    computer.end(4)
    computer.join()
    assert computer.batches == [["a"], ["b", "d"], ["c"], ["e"]]


def test_an_error_reaches_all_callers_of_its_batch_and_no_others():
    computer = Computer()
    computer.errors["b"] = ValueError("wrong")
    ends = [computer.bring("a"), *(computer.bring(name, key=1) for name in "bc"), computer.bring("d", key=2)]
    computer.end(3)
    computer.join()
    assert ends == [["done"], [computer.errors["b"]], [computer.errors["b"]], ["done"]]


def test_more_calls_than_may_wait_are_refused_at_once():
    computer = Computer(max_waiting=2)
    for name in "abc":
        computer.bring(name)
    [refused] = computer.bring("d")
    assert isinstance(refused, QueueFullError)
    computer.end(2)
    computer.join()
    assert computer.batches == [["a"], ["b", "c"]]
