import threading

from dsmoe_ray.errors import ControllerUnavailableError
from dsmoe_ray.serving.control_agent import ControlAgent

WAIT_S = 30.0


def test_a_process_goes_on_reporting_while_nobody_answers(caplog):
    turns, done = [], threading.Event()

    def turn():
        turns.append(len(turns))
        if len(turns) in (2, 3):
            raise ControllerUnavailableError("nobody is there")
        if len(turns) == 5:
            done.set()

    agent = ControlAgent("host-1", turn, interval_s=0.001)
    assert done.wait(WAIT_S)
    assert agent.is_running
    agent.close()
    told = [record.message for record in caplog.records if "nobody is there" in record.message]
    assert len(told) == 1 and "host-1" in told[0]


def test_waking_brings_the_next_turn_at_once():
    turns = threading.Semaphore(0)
    agent = ControlAgent("router-1", turns.release, interval_s=3600.0)
    assert turns.acquire(timeout=WAIT_S)
    agent.wake()
    assert turns.acquire(timeout=WAIT_S)
    agent.close()
