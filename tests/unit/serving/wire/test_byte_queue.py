"""A queue between threads that knows how many bytes wait in it."""

import threading

from dsmoe_ray.serving.wire.byte_queue import ByteQueue

# Far longer than anything takes; a test that waits for it has failed.
LONG_S = 30.0


def test_items_come_out_in_order_and_a_large_one_fits_alone():
    queue = ByteQueue(10)
    assert queue.put("giant", 100, 0)
    assert not queue.put("next", 1, 0)
    assert queue.get() == "giant"
    assert queue.put("a", 4, 0) and queue.put("b", 6, 0) and not queue.put("c", 1, 0)
    assert [queue.get(0), queue.get(0), queue.get(0)] == ["a", "b", None]


def test_a_sender_waits_until_there_is_room():
    queue, results = ByteQueue(10), []
    queue.put("first", 10, 0)
    sender = threading.Thread(target=lambda: results.append(queue.put("second", 5, LONG_S)))
    sender.start()
    assert queue.get(LONG_S) == "first"
    assert queue.get(LONG_S) == "second"
    sender.join(LONG_S)
    assert results == [True]


def test_closing_wakes_whoever_waits_and_what_was_put_still_comes_out():
    queue, results = ByteQueue(10), []
    queue.put("first", 10, 0)
    sender = threading.Thread(target=lambda: results.append(queue.put("second", 5, None)))
    sender.start()
    queue.close()
    sender.join(LONG_S)
    assert results == [False] and not queue.put("third", 1, LONG_S)
    assert not queue.ended
    assert [queue.get(), queue.get(), queue.get()] == ["first", None, None]
    assert queue.ended


def test_closing_may_drop_what_waits():
    queue = ByteQueue(10)
    queue.put("first", 10, 0)
    queue.close(discard=True)
    assert queue.get() is None and queue.ended
