"""Our delays against Ray Serve's own: the same wishes at the same times lead to the same numbers of replicas."""

from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve.autoscaling_policy import _apply_delay_logic
from ray.serve.config import AutoscalingConfig

from dsmoe_ray.serving.autoscaling import HostPoolObservation, HostPoolState, decide_hosts
from dsmoe_ray.serving.config import ExpertHostsConfig, ExpertScalingConfig

DELAYS = {"upscale_delay_s": 1.0, "downscale_delay_s": 2.5}
SERVE = AutoscalingConfig(min_replicas=0, initial_replicas=0, max_replicas=9, **DELAYS)
OURS = ExpertScalingConfig(target_utilization=1.0, downscale_margin_ratio=0.0, **DELAYS)
POOL = ExpertHostsConfig(count=0, max_count=9)

wishes = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12)), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(wishes, st.integers(0, 5))
def test_the_same_wishes_lead_to_the_same_replicas_as_in_ray_serve(sequence, start):
    state, current, policy_state, now_s = HostPoolState(num_hosts=start), start, {}, 100.0
    for wanted, quarters in sequence:
        for _ in range(quarters):
            now_s += 0.25
            state, ours = decide_hosts(state, HostPoolObservation(utilizations=(float(wanted),)), POOL, OURS, now_s)
            if current == 0 and wanted > 0:
                # Serve goes around its delays from zero.
                current = wanted
            else:
                current, policy_state = _apply_delay_logic(wanted, current, SERVE, policy_state, _now=now_s)
            assert ours == current
