"""Penalties from counts that are kept token by token, against their definition on the whole sequence."""

import dataclasses
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_ray.inference.sampling_config import SamplingConfig
from dsmoe_ray.inference.token_counts import TokenCounts

VOCAB = 200
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=150)
PENALTIES = st.builds(
    SamplingConfig,
    repetition_penalty=st.floats(0.5, 2.0),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
)


def penalize_directly(logits_V, prompt_ids, generated_ids, sampling):
    """The definition: repetition as in Hugging Face's transformers, the other two as OpenAI tells them."""
    counts, seen = Counter(generated_ids), {*prompt_ids, *generated_ids}
    penalized = logits_V.tolist()
    for token_id in seen:
        factor = sampling.repetition_penalty
        penalized[token_id] *= factor if penalized[token_id] < 0 else 1 / factor
        penalized[token_id] -= counts[token_id] * sampling.frequency_penalty
        penalized[token_id] -= float(counts[token_id] > 0) * sampling.presence_penalty
    return np.array(penalized)


def penalize(logits_V, counts, sampling):
    logits_V = logits_V.copy()
    counts.penalize(logits_V, sampling)
    return logits_V


@settings(deadline=None)
@given(TOKENS, TOKENS, PENALTIES, st.integers(0, 2**32 - 1))
def test_penalties_are_those_of_their_definition(prompt_ids, generated_ids, sampling, seed):
    logits_V = np.random.default_rng(seed).normal(size=VOCAB) * 5
    found = penalize(logits_V, TokenCounts(prompt_ids, generated_ids), sampling)
    # A quotient and a product with the inverse differ in the last bit.
    expected = penalize_directly(logits_V, prompt_ids, generated_ids, sampling)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(TOKENS, TOKENS, PENALTIES)
def test_counting_token_by_token_is_counting_all_at_once(prompt_ids, generated_ids, sampling):
    logits_V = np.linspace(-3, 3, VOCAB)
    growing = TokenCounts(prompt_ids)
    for token_id in generated_ids:
        growing.push(token_id)
    at_once = TokenCounts(prompt_ids, generated_ids)
    np.testing.assert_array_equal(penalize(logits_V, growing, sampling), penalize(logits_V, at_once, sampling))


def test_a_prompt_counts_for_repetition_only():
    logits_V = np.array([1.0, -1.0, 2.0])
    counts = TokenCounts([0, 1])
    others = SamplingConfig(presence_penalty=1.0, frequency_penalty=1.0)
    np.testing.assert_array_equal(penalize(logits_V, counts, others), logits_V)
    repetition = dataclasses.replace(others, repetition_penalty=2.0)
    np.testing.assert_array_equal(penalize(logits_V, counts, repetition), [0.5, -2.0, 2.0])


def test_a_forbidden_token_stays_forbidden():
    logits_V = np.array([-np.inf, 0.0])
    sampling = SamplingConfig(repetition_penalty=0.5, frequency_penalty=-2.0)
    assert penalize(logits_V, TokenCounts([0], [0, 0]), sampling)[0] == -np.inf
