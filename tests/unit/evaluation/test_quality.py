"""What an evaluation measures, against direct computations."""

import copy
import functools
import math

import numpy as np
import pytest
import torch

from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.errors import DataError, UserError
from dsmoe_ray.evaluation.quality import Windows, measure_quality, plan_windows
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer
from tests.fakes.tiny_artifact import NUM_EXPERTS, make_config

VOCAB_SIZE, SEQ_LEN = 300, 16


@functools.cache
def make_model(ffn: str = "moe") -> Transformer:
    changes = {} if ffn == "moe" else {"ffn": {"kind": "dense", "d_ff": 8}}
    config = make_config(**changes)
    model = Transformer(config)
    initialize(model, config, seed=1)
    return model.requires_grad_(False)


def make_shards(num_tokens=400) -> TokenShards:
    return TokenShards.from_documents(
        [np.random.default_rng(0).integers(0, VOCAB_SIZE, num_tokens)], vocab_size=VOCAB_SIZE
    )


def measure(*specs, model=None, batch_tokens=64, max_tokens=None, on_progress=None):
    model, shards = model or make_model(), make_shards()
    windows = plan_windows(shards, seq_len=SEQ_LEN, batch_tokens=batch_tokens, max_tokens=max_tokens)
    rules = {spec: resolve_routing(spec, model.config) for spec in specs}
    report = measure_quality(model, shards, rules, windows=windows, on_progress=on_progress)
    return {setting.routing: setting for setting in report.settings}, report


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = copy.deepcopy(make_model())
    model.head.weight.zero_()
    found, _ = measure("dense", "top_k=1", model=model)
    # Float32 logarithms of 300 carry 2e-7 of their value, which is 6 in the exponent.
    for setting in found.values():
        assert setting.perplexity == pytest.approx(VOCAB_SIZE, rel=2e-6)


def test_the_loss_is_the_mean_over_every_next_token_of_the_windows():
    found, report = measure("top_k=2")
    model, tokens = copy.deepcopy(make_model()), torch.from_numpy(make_shards()._read_tokens(0, 400))
    rules = resolve_routing("top_k=2", model.config)
    losses = []
    for start in range(0, 400 - SEQ_LEN, SEQ_LEN):
        window = tokens[start : start + SEQ_LEN + 1]
        log_probs_SV = model(window[None, :-1], routing=rules).logits_BSV[0].double().log_softmax(-1)
        losses += [-log_probs_SV[place, target].item() for place, target in enumerate(window[1:])]
    assert report.num_tokens == len(losses) == 384
    # Float32 logits of size ten carry some 1e-6, and their sum is kept in float32 within a batch.
    assert found["top_k=2"].loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)


def test_batches_do_not_change_what_is_measured():
    specs = ("dense", "top_k=2", "threshold=0.9", "top_p=0.5")
    (whole, _), (small, _) = measure(*specs, batch_tokens=10_000), measure(*specs, batch_tokens=5 * SEQ_LEN)
    for spec in specs:
        assert small[spec].loss == pytest.approx(whole[spec].loss, rel=1e-5)
        assert small[spec].kept_ffn_experts == pytest.approx(whole[spec].kept_ffn_experts, rel=1e-12)


def test_top_k_with_all_experts_is_dense():
    found, _ = measure("dense", f"top_k={NUM_EXPERTS}", "threshold=0")
    for setting in found.values():
        assert setting.loss == pytest.approx(found["dense"].loss, rel=1e-6)
        assert setting.active == found["dense"].active


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_keeps_k_experts_and_counts_their_parameters(top_k):
    found, report = measure(f"top_k={top_k}")
    setting = found[f"top_k={top_k}"]
    assert setting.kept_ffn_experts == [top_k, top_k]
    assert setting.kept_attention_experts == [2, 2]
    assert setting.active.ffn == report.parameters.ffn * top_k // NUM_EXPERTS
    assert report.parameters.total - setting.active.total == report.parameters.ffn - setting.active.ffn


def test_thresholds_keep_what_a_direct_computation_in_float64_keeps():
    threshold = 0.9
    found, _ = measure(f"threshold={threshold}")
    model = copy.deepcopy(make_model()).double()
    model.compute_dtype = torch.float64
    inputs = {0: [], 1: []}
    for layer, block in enumerate(model.blocks):
        block.ffn.router.register_forward_pre_hook(lambda _, args, layer=layer: inputs[layer].append(args[0]))
    tokens = torch.from_numpy(make_shards()._read_tokens(0, 384)).view(24, SEQ_LEN)
    model(tokens, routing=resolve_routing(f"threshold={threshold}", model.config))
    for layer, block in enumerate(model.blocks):
        scores_TE = np.exp(torch.cat(inputs[layer]).numpy() @ block.ffn.router.proj.weight.numpy().T)
        kept_TE = NUM_EXPERTS * scores_TE / scores_TE.sum(-1, keepdims=True) > threshold
        assert 0 < kept_TE.mean() < 1
        assert found[f"threshold={threshold}"].kept_ffn_experts[layer] == pytest.approx(
            kept_TE.sum(-1).mean(), abs=1e-12
        )


def test_distinct_experts_are_those_that_sequences_in_step_use_together():
    found, report = measure("dense", "top_k=1", "top_k=2")
    model, tokens = make_model(), torch.from_numpy(make_shards()._read_tokens(0, 384)).view(24, SEQ_LEN)
    decisions = model(tokens, routing=resolve_routing("top_k=1", model.config)).ffn_routings
    for layer, decision in enumerate(decisions):
        chosen = decision.selected_TE.float().argmax(-1).view(-1, report.batch_sequences, SEQ_LEN).tolist()
        counts = [len({row[place] for row in batch}) for batch in chosen for place in range(SEQ_LEN)]
        assert found["top_k=1"].distinct_ffn_experts[layer] == pytest.approx(np.mean(counts))
        assert 1 < found["top_k=1"].distinct_ffn_experts[layer] < found["top_k=2"].distinct_ffn_experts[layer]
    assert found["dense"].distinct_ffn_experts == [NUM_EXPERTS, NUM_EXPERTS]


def test_a_smaller_last_batch_does_not_count_as_a_batch_of_distinct_experts():
    found, report = measure("top_k=1", batch_tokens=23 * SEQ_LEN)
    assert (report.batch_sequences, report.num_tokens) == (23, 24 * SEQ_LEN)
    one_batch, _ = measure("top_k=1", batch_tokens=24 * SEQ_LEN)
    # The sequence on its own in the last batch uses one expert a step, which would pull the mean down by a third.
    assert found["top_k=1"].distinct_ffn_experts == pytest.approx(one_batch["top_k=1"].distinct_ffn_experts, rel=0.05)


def test_a_model_without_ffn_experts_uses_all_of_itself():
    found, report = measure("dense", "deployed", model=make_model("dense"))
    assert found["dense"].kept_ffn_experts == [] and found["dense"].distinct_ffn_experts == []
    assert found["dense"].active == report.parameters
    assert found["deployed"].loss == found["dense"].loss


def test_progress_counts_every_batch_of_every_setting():
    calls = []
    measure("dense", "top_k=1", on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 12) for done in range(1, 13)]


def test_windows_are_the_same_ones_every_time_and_spread_over_the_text():
    shards = make_shards(100 * SEQ_LEN + 1)
    first, again = (plan_windows(shards, seq_len=SEQ_LEN, max_tokens=20 * SEQ_LEN + 5) for _ in range(2))
    assert first == again
    assert len(set(first.indices)) == 20 and first.indices == sorted(first.indices)
    # A prefix would end at 19.
    assert first.indices[-1] > 70 and first.indices[0] < 30


@pytest.mark.parametrize(
    ("num_tokens", "limits", "expected"),
    [
        (400, {}, Windows(list(range(24)), seq_len=16, batch_sequences=24)),
        (400, {"batch_tokens": 50}, Windows(list(range(24)), seq_len=16, batch_sequences=3)),
        (400, {"batch_tokens": 5}, Windows(list(range(24)), seq_len=16, batch_sequences=1)),
        (17, {}, Windows([0], seq_len=16, batch_sequences=1)),
        (9, {}, Windows([0], seq_len=8, batch_sequences=1)),
        (2, {}, Windows([0], seq_len=1, batch_sequences=1)),
    ],
)
def test_windows_fit_the_text(num_tokens, limits, expected):
    assert plan_windows(make_shards(num_tokens), seq_len=SEQ_LEN, **limits) == expected


def test_fewer_tokens_than_a_window_are_rounded_up_to_one():
    windows = plan_windows(make_shards(), seq_len=SEQ_LEN, max_tokens=3)
    assert windows.num_tokens == SEQ_LEN


def test_a_text_without_a_next_token_is_refused():
    with pytest.raises(DataError, match="fewer than two tokens"):
        plan_windows(make_shards(1), seq_len=SEQ_LEN)
    with pytest.raises(UserError, match="max_tokens must be at least 1; found 0"):
        plan_windows(make_shards(), seq_len=SEQ_LEN, max_tokens=0)
