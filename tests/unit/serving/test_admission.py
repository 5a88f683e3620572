import pytest

from dsmoe_ray.serving.admission import Admission
from dsmoe_ray.serving.openai_api.errors import ApiError
from tests.fakes.fake_clock import FakeClock


def make(max_tokens=100, max_sequences=4, clock=None):
    clock = clock or FakeClock()
    return Admission(max_tokens=max_tokens, max_sequences=max_sequences, now_s=clock)


def refused(admission, num_tokens=1, num_sequences=1):
    with pytest.raises(ApiError) as caught, admission.take(num_tokens, num_sequences):
        pass
    return caught.value


def test_what_is_taken_comes_back():
    admission = make()
    with admission.take(60, 2), admission.take(40, 1):
        assert (admission.num_tokens, admission.num_sequences) == (100, 3)
        assert refused(admission).status == 429
    assert (admission.num_tokens, admission.num_sequences) == (0, 0)
    with pytest.raises(ZeroDivisionError), admission.take(100, 4):
        _ = 1 / 0
    assert (admission.num_tokens, admission.num_sequences) == (0, 0)


def test_a_call_with_many_texts_starts_while_there_is_any_room():
    admission = make()
    with admission.take(1, 3), admission.take(1, 9):
        assert refused(admission).status == 429
        with pytest.raises(ApiError):
            admission.check_open()


def test_a_call_larger_than_everything_is_wrong_and_not_early():
    error = refused(make(), num_tokens=101)
    assert error.status == 400 and error.param == "max_tokens" and error.retry_after_s is None


def test_the_time_to_come_again_follows_how_fast_room_came_back():
    clock = FakeClock()
    admission = make(clock=clock)
    with admission.take(100, 1):
        assert refused(admission).retry_after_s == 1
    clock.advance(100.0)
    for _ in range(30):
        clock.advance(1.0)
        with admission.take(5, 1):
            pass
    # Five tokens a second have come back lately.
    with admission.take(100, 1):
        assert 9 <= refused(admission, num_tokens=50).retry_after_s <= 12
        assert refused(admission, num_tokens=1).retry_after_s == 1


def test_room_follows_the_routers():
    admission = make(max_sequences=1)
    with admission.take(1, 1):
        assert refused(admission).status == 429
        admission.set_max_sequences(2)
        with admission.take(1, 1):
            assert refused(admission).status == 429
