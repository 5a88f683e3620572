"""Choosing tokens: greedy, truncated, penalised, scored; each row for itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_ray.errors import DsmoeError
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.sampling import RowSampling, compute_logprobs, sample_batch
from dsmoe_ray.inference.sampling_config import GREEDY, SampledToken, SamplingConfig
from dsmoe_ray.inference.token_counts import TokenCounts

PROBS = [0.05, 0.4, 0.1, 0.3, 0.15]
LOGITS = torch.log(torch.tensor(PROBS))
NUM_DRAWS = 4000


def sample(logits, sampling, *, seed=0, position=0, token_counts=None):
    logits_RV = torch.as_tensor(logits, dtype=torch.float32)[None]
    (sampled,) = sample_batch(logits_RV, [RowSampling(sampling, seed, position, token_counts)])
    return sampled


def draw_many(sampling, logits_V=LOGITS, *, vary="seed"):
    """Count the tokens of many seeds, or of many positions."""
    rows = [RowSampling(sampling, **{"seed": 3, "position": 7, vary: value}) for value in range(NUM_DRAWS)]
    sampled = sample_batch(logits_V.expand(NUM_DRAWS, -1).contiguous(), rows)
    return np.bincount([token.token_id for token in sampled], minlength=len(logits_V))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("changed", [math.inf, -math.inf, math.nan], ids=str)
def test_a_row_that_is_not_finite_after_its_penalties_is_an_error_of_that_row_only(changed, temperature):
    class Overflowing(TokenCounts):
        def penalize(self, logits_V, sampling):
            logits_V[:] = changed

    sampling = SamplingConfig(temperature=temperature, presence_penalty=1.0)
    rows = [RowSampling(sampling, 0, 7, counts([1])) for counts in (TokenCounts, Overflowing, TokenCounts)]
    first, broken, last = sample_batch(LOGITS.expand(3, -1).contiguous(), rows)
    assert isinstance(broken, DsmoeError)
    assert "the logits at position 7 are not finite after logit_bias and penalties" in str(broken)
    assert isinstance(first, SampledToken) and first == last


@pytest.mark.parametrize("penalty", [0.01, 100.0])
@pytest.mark.parametrize("temperature", [0.0, 1e-310, 1.0])
def test_the_largest_penalties_and_logits_leave_something_to_choose(penalty, temperature):
    largest = torch.finfo(torch.float32).max
    for logits in ([largest, -largest, 0.0], [-largest] * 3, [-math.inf, -largest, -math.inf]):
        sampling = SamplingConfig(temperature=temperature, repetition_penalty=penalty, logit_bias={0: 100})
        sampled = sample(logits, sampling, token_counts=TokenCounts([0, 1, 2]))
        assert logits[sampled.token_id] > -math.inf


def define_probs(logits_V, sampling):
    """Compute in float64, step by step and in order, the distribution that is to be drawn from."""
    logits = np.asarray(logits_V, dtype=np.float64) / sampling.temperature
    order = sorted(range(len(logits)), key=lambda token_id: (-logits[token_id], token_id))
    order = order[: sampling.top_k]
    probs = np.exp(logits - logits.max())
    probs /= probs[order].sum()
    nucleus, reached = [], 0.0
    for token_id in order:
        if reached >= sampling.top_p:
            break
        nucleus.append(token_id)
        reached += probs[token_id]
    kept = [token_id for token_id in nucleus if probs[token_id] >= sampling.min_p * probs[order[0]]]
    expected = np.zeros(len(logits))
    expected[kept] = probs[kept] / probs[kept].sum()
    return expected


def check_counts(counts, expected):
    """Assert that counts are as likely as one in ten thousand, and that what cannot be drawn was not."""
    possible = expected > 0
    assert counts[~possible].sum() == 0
    wanted = expected[possible] * counts.sum()
    chi_square = ((counts[possible] - wanted) ** 2 / wanted).sum()
    # With d degrees of freedom, chi square exceeds d + 2 sqrt(d x) + 2 x with a probability of at most exp(-x)
    # (Laurent and Massart 2000, lemma 1).
    d, x = int(possible.sum()) - 1, math.log(1e4)
    assert chi_square <= d + 2 * math.sqrt(d * x) + 2 * x


def test_greedy_takes_the_largest_logit_and_the_lower_id_of_two():
    assert sample([0.0, 3.0, 1.0, 3.0], GREEDY) == SampledToken(1)


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_frequencies_are_the_models_probabilities(vary):
    check_counts(draw_many(SamplingConfig(temperature=1.0), vary=vary), np.array(PROBS))


def test_temperature_raises_probabilities_to_its_inverse():
    expected = np.square(PROBS)
    check_counts(draw_many(SamplingConfig(temperature=0.5)), expected / expected.sum())


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 0.95, "top_k": 3}, [1, 3, 4]),
        ({"top_p": 0.3, "top_k": 3}, [1]),
        ({"top_p": 0.75, "top_k": 3}, [1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.3}, [1, 3, 4]),
        ({"min_p": 1.0}, [1]),
        ({"min_p": 0.5, "top_p": 0.95}, [1, 3]),
        ({"min_p": 0.2, "top_k": 4, "top_p": 0.89}, [1, 3, 4]),
    ],
    ids=str,
)
def test_truncation_draws_from_the_most_likely_tokens_in_their_proportions(truncation, kept):
    expected = np.zeros(5)
    expected[kept] = np.array(PROBS)[kept]
    check_counts(draw_many(SamplingConfig(temperature=1.0, **truncation)), expected / expected.sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(temperature=0.7, top_p=0.8),
        SamplingConfig(temperature=1.5, top_k=9),
        SamplingConfig(temperature=1.0, min_p=0.1),
        SamplingConfig(temperature=1.3, top_k=15, top_p=0.9, min_p=0.05),
        SamplingConfig(temperature=1.0, top_p=0.999),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_definition_in_float64(sampling, seed):
    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 2
    check_counts(draw_many(sampling, logits_V), define_probs(logits_V, sampling))


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), min_size=1, max_size=12),
    st.builds(
        SamplingConfig,
        temperature=st.sampled_from([0.5, 1.0, 2.0]),
        top_k=st.none() | st.integers(1, 12),
        top_p=st.floats(0.01, 1.0),
        min_p=st.sampled_from([0.0, 0.05, 0.3]),
    ),
    st.integers(0, 1000),
)
def test_of_equally_likely_tokens_the_lower_ids_are_kept(logits, sampling, seed):
    expected = define_probs(logits, sampling)
    assert expected[sample(logits, sampling, seed=seed).token_id] > 0


@settings(deadline=None)
@given(st.lists(st.floats(-60, 60), min_size=1, max_size=20), st.floats(1e-6, 1e3), st.integers(0, 100))
def test_a_token_that_cannot_be_drawn_never_is(logits, temperature, seed):
    token = sample([*logits, -math.inf], SamplingConfig(temperature=temperature), seed=seed)
    assert 0 <= token.token_id < len(logits)


def test_a_temperature_near_zero_is_greedy_and_not_an_overflow():
    for truncation in ({}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}):
        assert sample([1.0, 80.0, 79.0], SamplingConfig(temperature=1e-300, **truncation)).token_id == 1


def test_bias_comes_before_penalties_and_these_before_temperature():
    # Token 0: (1 + 3) / 2 - 1 = 1 beside 1.5; without the bias 1 / 2 - 1, with the bias last 2.5.
    sampling = SamplingConfig(logit_bias={0: 3.0}, repetition_penalty=2.0, frequency_penalty=1.0)
    counts = TokenCounts([], [0])
    assert sample([1.0, 1.5], sampling, token_counts=counts).token_id == 1
    assert sample([1.0, 0.5], sampling, token_counts=counts).token_id == 0
    warm = SamplingConfig(**{**vars(sampling), "temperature": 0.5})
    rows = [RowSampling(warm, seed, 0, counts) for seed in range(NUM_DRAWS)]
    drawn = np.array([token.token_id for token in sample_batch(torch.tensor([[1.0, 1.5]] * NUM_DRAWS), rows)])
    check_counts(np.bincount(drawn), define_probs([1.0, 1.5], warm))


def test_a_bias_of_a_hundred_forces_a_token_and_of_minus_hundred_forbids_it():
    assert sample([9.0, 0.0, 0.0], SamplingConfig(logit_bias={2: 100})).token_id == 2
    assert sample([9.0, 0.0, -1.0], SamplingConfig(logit_bias={0: -100})).token_id == 1


def test_penalties_without_the_tokens_so_far_are_a_bug():
    with pytest.raises(ValueError, match="token_counts"):
        sample([0.0, 1.0], SamplingConfig(presence_penalty=1.0))


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingConfig(logit_bias={1: 50.0}, repetition_penalty=1.7),
        SamplingConfig(temperature=3.0, top_k=2, top_p=0.5),
    ],
    ids=["greedy", "changed logits", "truncated"],
)
def test_logprobs_are_of_the_models_own_distribution_whatever_the_sampling(sampling):
    logits_V = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 4
    expected_V = logits_V.double().log_softmax(dim=0)
    scored = sample(logits_V, SamplingConfig(**{**vars(sampling), "logprobs": 5}), token_counts=TokenCounts([3], [4]))
    plain = sample(logits_V, sampling, token_counts=TokenCounts([3], [4]))
    assert scored.token_id == plain.token_id and plain.logprob is None and not plain.top_logprobs
    # Both are float64; only the order of additions differs.
    assert scored.logprob == pytest.approx(expected_V[scored.token_id].item(), abs=1e-12)
    values, ids = expected_V.topk(5)
    assert [token_id for token_id, _ in scored.top_logprobs] == ids.tolist()
    assert [logprob for _, logprob in scored.top_logprobs] == pytest.approx(values.tolist(), abs=1e-12)


def test_no_alternatives_are_told_when_only_the_tokens_own_logprob_is_wanted():
    scored = sample([0.0, 0.0], SamplingConfig(logprobs=0))
    assert scored.token_id == 0 and scored.logprob == pytest.approx(-math.log(2)) and scored.top_logprobs == ()


def test_alternatives_of_equal_likelihood_come_in_the_order_of_their_ids():
    scored = sample([1.0, 2.0, 1.0, 2.0, 1.0], SamplingConfig(logprobs=4))
    assert [token_id for token_id, _ in scored.top_logprobs] == [1, 3, 0, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "sampling", [GREEDY, SamplingConfig(temperature=1.0), SamplingConfig(logprobs=1)], ids=["greedy", "drawn", "scored"]
)
def test_a_broken_row_is_an_error_of_that_row_alone(bad, sampling):
    logits_RV = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 1.0], [3.0, 1.0, 2.0]])
    rows = [RowSampling(GREEDY, 0, 2), RowSampling(sampling, 0, 3), RowSampling(GREEDY, 0, 4)]
    first, broken, last = sample_batch(logits_RV, rows)
    assert (first, last) == (SampledToken(2), SampledToken(0))
    assert isinstance(broken, DsmoeError) and "position 3 are not finite" in str(broken)


def make_mixed_rows(num_rows):
    makers = [
        lambda: GREEDY,
        lambda: SamplingConfig(temperature=1.0),
        lambda: SamplingConfig(temperature=0.9, top_p=0.9, logprobs=3),
        lambda: SamplingConfig(temperature=1.2, top_k=7, min_p=0.01),
        lambda: SamplingConfig(temperature=0.8, frequency_penalty=0.5, repetition_penalty=1.2, top_p=0.95),
        lambda: SamplingConfig(logit_bias={5: 2.0}, logprobs=0),
    ]
    return [
        RowSampling(makers[index % len(makers)](), index, 100 + index, TokenCounts([1, 2, 3], [index, 9]))
        for index in range(num_rows)
    ]


@pytest.mark.parametrize("vocab_size", [33, 1000])
def test_a_row_has_the_same_result_alone_and_in_any_crowd(vocab_size):
    logits_RV = torch.randn(24, vocab_size, generator=torch.Generator().manual_seed(2)) * 3
    rows = make_mixed_rows(24)
    crowd = sample_batch(logits_RV, rows)
    alone = [sample_batch(logits_RV[index : index + 1].clone(), [row])[0] for index, row in enumerate(rows)]
    reversed_crowd = sample_batch(logits_RV.flip(0), rows[::-1])[::-1]
    assert crowd == alone == reversed_crowd
    assert len({token.token_id for token in crowd}) > 8


def run_request(request, *, vocab_size=60):
    """Generate all tokens of each sequence from made-up logits that depend on the last token."""
    table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(6)) * 2
    sequences = []
    for sequence_idx in range(request.n):
        ids, counts = list(request.generated_ids), TokenCounts(request.prompt_ids, request.generated_ids)
        while len(ids) < request.max_tokens:
            so_far = [*request.prompt_ids, *ids]
            row = RowSampling(request.sampling, request.seed_of(sequence_idx), len(so_far), counts)
            (sampled,) = sample_batch(table[so_far[-1:]], [row])
            counts.push(sampled.token_id)
            ids.append(sampled.token_id)
        sequences.append(ids)
    return sequences


def test_a_sequence_continued_elsewhere_goes_on_with_the_same_tokens_penalties_included():
    sampling = SamplingConfig(temperature=0.9, top_p=0.9, frequency_penalty=1.0, repetition_penalty=1.3, seed=5)
    request = GenerationRequest(prompt_ids=[1, 2, 3], max_tokens=30, n=3, sampling=sampling)
    whole = run_request(request)
    assert len({tuple(ids) for ids in whole}) == 3
    assert run_request(request.continue_sequence(0, [])) == whole[:1]
    for sequence_idx, ids in enumerate(whole):
        for so_far in (1, 13, 29):
            assert run_request(request.continue_sequence(sequence_idx, ids[:so_far])) == [ids]
    # If the tokens so far were taken for prompt, they would count for one penalty only.
    forgetful = GenerationRequest(prompt_ids=[1, 2, 3, *whole[0][:13]], max_tokens=17, sampling=sampling)
    assert run_request(forgetful) != [whole[0][13:]]


def test_logits_are_not_changed_by_sampling():
    logits_RV = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    before = logits_RV.clone()
    sample_batch(logits_RV, make_mixed_rows(6))
    assert torch.equal(logits_RV, before)


def test_logprobs_of_a_prompt_are_those_that_its_tokens_would_have_had_if_chosen():
    logits_RV = torch.randn(5, 30, generator=torch.Generator().manual_seed(4))
    rows = [RowSampling(SamplingConfig(logprobs=2), 0, 0) for _ in range(5)]
    chosen = sample_batch(logits_RV, rows)
    scored = compute_logprobs(logits_RV, [token.token_id for token in chosen], num_top=2, first_position=1)
    assert scored == chosen
    others = compute_logprobs(logits_RV, [3, 1, 4, 1, 5], num_top=0, first_position=1)
    expected_RV = logits_RV.double().log_softmax(dim=1)
    assert [token.logprob for token in others] == pytest.approx(
        [expected_RV[row, token_id].item() for row, token_id in enumerate([3, 1, 4, 1, 5])], abs=1e-12
    )


def test_a_prompt_that_breaks_the_model_is_an_error_that_names_the_position():
    logits_RV = torch.tensor([[0.0, 1.0], [math.nan, 1.0]])
    with pytest.raises(DsmoeError, match="position 8 are not finite"):
        compute_logprobs(logits_RV, [0, 1], num_top=0, first_position=7)
