"""Signals as requests."""

import os
import signal

import pytest

from dsmoe_ray.training.stop_request import StopRequest, StopRequestedError, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_where_it_is_awaited(number):
    stop = StopRequest()
    with stop_on_signals(stop), stop.awaited():
        os.kill(os.getpid(), number)
        assert stop.requested


def test_a_signal_ends_what_does_not_await_it():
    stop = StopRequest()
    with pytest.raises(StopRequestedError), stop_on_signals(stop):
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_begins_after_the_request_does_not_begin():
    stop = StopRequest()
    with pytest.raises(StopRequestedError):
        stop.request()
    with pytest.raises(StopRequestedError), stop.awaited():
        pass


def test_a_second_signal_ends_the_process():
    pid = os.fork()
    if pid == 0:
        stop = StopRequest()
        with stop_on_signals(stop), stop.awaited():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGTERM


def test_the_handlers_from_before_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals(StopRequest()):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
