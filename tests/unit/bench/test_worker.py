"""Peak memory of steps as a bench's process sees its own."""

import pytest
import torch

from dsmoe_ray.bench import worker

MIB = 2**20


class Allocating:
    """Holds some memory during a step and none after it."""

    def run(self, num_steps):
        for _ in range(num_steps):
            torch.ones(64 * MIB // 4)


@pytest.mark.skipif(not worker._RESET_PEAK.exists(), reason="peaks are read from Linux's /proc")
def test_the_peak_is_what_steps_hold_on_top_of_what_was_held_before():
    device = torch.device("cpu")
    Allocating().run(1)
    found = worker.measure_peak(Allocating(), 2, device)
    # Pages of a 64 MiB tensor; a few more of the libraries' may be touched meanwhile.
    assert found["peak_bytes"] - found["before_bytes"] == pytest.approx(64 * MIB, rel=0.2)
