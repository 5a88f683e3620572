"""What may be asked of sampling, and what is refused."""

import math
import pickle

import numpy as np
import pytest

from dsmoe_ray.errors import RequestError, UserError
from dsmoe_ray.inference.sampling_config import GREEDY, MAX_LOGIT_BIASES, SamplingConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be finite and at least 0; found -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "temperature must be a number; found 'hot'"),
        ({"temperature": True}, "temperature must be a number; found True"),
        ({"top_k": 0}, "top_k must be at least 1; found 0"),
        ({"top_k": 2.0}, "top_k must be an integer; found 2.0"),
        ({"top_k": True}, "top_k must be an integer; found True"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; found 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p must be at least 0 and at most 1; found -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be at least 0.01 and at most 100; found 0"),
        ({"repetition_penalty": 1e-310}, "repetition_penalty must be at least 0.01 and at most 100; found 1e-310"),
        ({"repetition_penalty": 1e300}, "repetition_penalty must be at least 0.01 and at most 100; found 1e\\+300"),
        ({"presence_penalty": 2.5}, "presence_penalty must be at least -2 and at most 2; found 2.5"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 1.5}, "seed must be an integer; found 1.5"),
        ({"seed": 2**64}, "seed must be -9223372036854775808 to 18446744073709551615; found 18446744073709551616"),
        ({"seed": -(2**63) - 1}, "seed must be -9223372036854775808"),
        ({"logprobs": 21}, "logprobs must be 0 to 20; found 21"),
        ({"logprobs": -1}, "logprobs"),
        ({"logit_bias": [3]}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias has the key '3', which is no token id"),
        ({"logit_bias": {3: 101}}, "logit_bias of token 3 must be a number from -100 to 100; found 101"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of token 3"),
        ({"logit_bias": {3: None}}, "logit_bias of token 3"),
        ({"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 1.0)}, "at most 1024 are allowed"),
    ],
    ids=str,
)
def test_impossible_settings_are_a_users_mistake_that_names_the_field(settings, message):
    with pytest.raises(UserError, match=message) as raised:
        SamplingConfig(**settings)
    assert isinstance(raised.value, RequestError) and raised.value.param == next(iter(settings))


@pytest.mark.parametrize("field", ["seed", "temperature", "presence_penalty", "logprobs", "logit_bias"])
def test_a_number_too_long_to_be_written_out_is_refused_like_any_other(field):
    # In the parameters it would be in the test's name.
    number = -(10**5000)
    with pytest.raises(RequestError, match="found a number of 16610 bits") as raised:
        SamplingConfig(**{field: {3: number} if field == "logit_bias" else number})
    assert raised.value.param == field
    with pytest.raises(RequestError, match="temperature must be finite"):
        SamplingConfig(temperature=10**400)


def test_bounds_are_allowed():
    for seed, penalty in ((-(2**63), 0.01), (2**64 - 1, 100)):
        sampling = SamplingConfig(seed=seed, repetition_penalty=penalty)
        assert (sampling.seed, sampling.repetition_penalty) == (seed, penalty)


def test_a_request_error_keeps_its_field_across_processes():
    error = pickle.loads(pickle.dumps(RequestError("n must be at least 1", param="n")))
    assert (type(error), str(error), error.param) == (RequestError, "n must be at least 1", "n")


def test_a_bias_cannot_be_changed_from_outside():
    bias = {np.int64(3): 1}
    sampling = SamplingConfig(logit_bias=bias)
    bias[5] = 2
    assert sampling.logit_bias == {3: 1.0} and hash(sampling) == hash(SamplingConfig(logit_bias={3: 1.0}))


@pytest.mark.parametrize(
    ("settings", "is_plain", "changes"),
    [
        ({}, True, False),
        ({"top_p": 0.5, "seed": 3}, True, False),
        ({"temperature": 1.0}, False, False),
        ({"logprobs": 0}, False, False),
        ({"logit_bias": {1: 1.0}}, False, True),
        ({"presence_penalty": 0.1}, False, True),
        ({"repetition_penalty": 0.9}, False, True),
    ],
    ids=str,
)
def test_only_plain_greedy_sampling_is_taken_for_it(settings, is_plain, changes):
    sampling = SamplingConfig(**settings)
    assert (sampling.is_plain_greedy, sampling.changes_logits) == (is_plain, changes)
    assert GREEDY.is_plain_greedy
