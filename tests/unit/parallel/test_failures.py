"""What a failed collective tells."""

import weakref

import pytest
from torch import distributed

from dsmoe_ray.errors import ExchangeError
from dsmoe_ray.parallel import failures
from dsmoe_ray.parallel.failures import FailureBoard, FailuresNamed

GLOO_ERROR = (
    "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. "
    "This is typically caused by a remote worker crashing."
)


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch):
    monkeypatch.setattr(failures, "_GRACE_S", 0.01)


def _fail(message):
    raise RuntimeError(message)


def _message(board, collective="gather of tokens"):
    with pytest.raises(ExchangeError) as caught, FailuresNamed(collective, board):
        _fail(GLOO_ERROR)
    return str(caught.value)


def test_ranks_without_a_note_are_named_and_those_with_one_tell_where_they_failed():
    store = distributed.HashStore()
    FailureBoard(store, rank=2, world_size=1).report("return of outputs", "gloo")
    message = _message(FailureBoard(store, rank=0, world_size=3))
    assert message.startswith("gather of tokens failed on rank 0 of 3: Connection closed by peer [127.0.0.1]:1. ")
    assert "rank 2 failed in return of outputs." in message
    assert message.endswith("Not heard of (dead, hung or waiting elsewhere): rank 1.")


class _DeadStore:
    def set_timeout(self, timeout):
        pass

    def set(self, key, value):
        raise distributed.DistNetworkError("Broken pipe")


def test_a_store_that_does_not_answer_points_at_rank_0():
    message = _message(FailureBoard(_DeadStore(), rank=1, world_size=2))
    assert "Rank 0, which keeps the rendezvous store, is lost: it does not answer (Broken pipe)." in message


def test_an_error_that_is_no_failed_collective_passes_unchanged():
    with pytest.raises(RuntimeError, match="size mismatch"), FailuresNamed("gather of tokens", None):
        _fail("size mismatch")


class _Connection:
    pass


def _fail_holding(connection):
    _fail(GLOO_ERROR)


def test_the_failed_collective_is_not_kept_alive_by_its_error():
    connection = _Connection()
    alive = weakref.ref(connection)
    try:
        with FailuresNamed("gather of tokens", None):
            _fail_holding(connection)
    except ExchangeError as error:
        kept = error
    del connection
    assert str(kept) == "gather of tokens failed: Connection closed by peer [127.0.0.1]:1"
    assert alive() is None
