"""Random numbers that depend on nothing but a seed and a place."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_ray.inference.seeds import derive_seed, draw_uniform


def test_random_numbers_are_the_same_on_every_machine_and_in_every_release():
    # A change here would make a stream that is resumed by another version go on with other tokens.
    assert draw_uniform(0, 0) == 0.9676516693094542
    assert draw_uniform(1, 0) != draw_uniform(0, 1)
    assert derive_seed(3, 1) == 7042531917798661023


@settings(deadline=None)
@given(st.integers(), st.integers(0, 10**9))
def test_random_numbers_lie_in_the_unit_interval(seed, position):
    assert 0.0 <= draw_uniform(seed, position) < 1.0


def test_the_first_sequence_of_a_request_has_its_seed_and_the_others_have_their_own():
    seeds = {derive_seed(seed, sequence_idx) for seed in range(20) for sequence_idx in range(20)}
    assert derive_seed(17, 0) == 17 and len(seeds) == 400
    assert all(0 <= seed < 1 << 63 for seed in seeds)
