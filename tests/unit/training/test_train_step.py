"""One rank trains alone: steps, steps that are skipped, evaluation, and the switches that must not change results."""

import math

import pytest
import torch

from dsmoe_ray.errors import ConfigError, TrainingError
from dsmoe_ray.model.losses import IGNORED_TARGET
from dsmoe_ray.training.batches import BatchReader
from dsmoe_ray.training.train_step import Trainer
from tests.fakes.tiny_run import ALONE, make_shards, make_trainer

# Weights large enough that layers differ in what they do, and a rate at which four steps tell.
LIVELY = ("model.init_std=0.2", "train.lr=0.01")


def losses(config, *, steps=3, data=None) -> list[float]:
    trainer = make_trainer(config, data=data)
    return [trainer.run_step().loss for _ in range(steps)]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def poison(trainer, name):
    with torch.no_grad():
        trainer.model.get_parameter(name).view(-1)[0] = float("nan")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_learns_and_counts_its_steps(tiny_config, dtype):
    config = tiny_config(*LIVELY, f"train.dtype={dtype}")
    trainer = make_trainer(config)
    rows = [trainer.run_step() for _ in range(12)]
    assert [row.step for row in rows] == list(range(1, 13))
    assert trainer.step == 12
    # From no knowledge of 300 tokens on; half a nat is far more than batches differ by.
    assert rows[0].loss > math.log(300) - 0.3
    assert rows[-1].loss < rows[0].loss - 0.5
    assert all(row.tokens == 128 and not row.skipped and row.grad_norm > 0 for row in rows)
    assert all(parameter.dtype is torch.float32 for parameter in trainer.model.parameters())


def test_bfloat16_is_close_to_float32(tiny_config):
    exact, rounded = (losses(tiny_config(*LIVELY, f"train.dtype={dtype}")) for dtype in ("float32", "bfloat16"))
    # 8 bits per operation, averaged over 128 tokens.
    assert rounded == pytest.approx(exact, rel=5e-3)
    assert rounded != exact


def test_a_step_without_finite_loss_changes_nothing_and_is_counted(tiny_config):
    trainer = make_trainer(tiny_config(*LIVELY, "train.max_nonfinite_steps=3"))
    trainer.run_step()
    healthy = weights(trainer)
    poison(trainer, "blocks.1.ffn.experts.w1")
    before = weights(trainer)
    moments = {name: value.clone() for name, value in trainer.checkpoint_state()["optimizer"].items()}
    row = trainer.run_step()
    assert row.skipped and not math.isfinite(row.loss)
    assert trainer.checkpoint_state()["progress"]["nonfinite_steps"] == 1
    for name, value in weights(trainer).items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    for name, value in trainer.checkpoint_state()["optimizer"].items():
        assert torch.equal(value, moments[name]), name
    trainer.model.load_state_dict(healthy)
    assert not trainer.run_step().skipped
    assert trainer.checkpoint_state()["progress"]["nonfinite_steps"] == 0


@pytest.mark.parametrize(
    "name, place",
    [
        ("blocks.1.ffn.experts.w1", "layer 1"),
        ("blocks.0.attention.wq", "layer 0"),
        ("embedding.weight", "the embedding"),
        ("norm.weight", "the last norm"),
        ("head.weight", "the output head"),
    ],
)
def test_a_loss_that_stays_non_finite_ends_the_run_naming_rank_and_place(tiny_config, name, place):
    # Token 0 ends every document, so the first row of the embedding is in every batch.
    trainer = make_trainer(tiny_config("train.max_nonfinite_steps=2"), data=make_shards(length=8, num_documents=100))
    poison(trainer, name)
    assert trainer.run_step().skipped
    with pytest.raises(TrainingError, match=rf"rank 0: .*2 steps in a row.* first non-finite output: {place}\."):
        trainer.run_step()


def test_a_gradient_alone_that_is_not_finite_is_told_apart(tiny_config):
    trainer = make_trainer(tiny_config("train.max_nonfinite_steps=1"))
    trainer.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="none in the forward pass, so the gradient"):
        trainer.run_step()


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("routing", ["{mode: dense}", "{mode: top_k, top_k: 2}"], ids=["dense", "top_k"])
def test_recomputed_activations_change_no_bit_of_the_losses(tiny_config, checkpointing, routing):
    options = (*LIVELY, f"train.routing_ffn={routing}")
    recomputed = losses(tiny_config(*options, f"train.activation_checkpointing={checkpointing}"))
    assert recomputed == losses(tiny_config(*options))


def test_with_document_boundaries_the_loss_is_the_mean_over_targets_within_documents(tiny_config):
    data = make_shards(length=8, num_documents=120)
    trainer = make_trainer(tiny_config(*LIVELY, "data.document_boundaries=true"), data=data)
    # Documents of 8 tokens in samples of 16: two targets of each sample begin another document.
    [batch] = BatchReader(trainer.config, data, rank=0, device=ALONE.device).read_step(0)
    assert int((batch.targets_BS == IGNORED_TARGET).sum()) == 16
    with torch.no_grad():
        logits_BSV = trainer.model(batch.tokens_BS, document_ids_BS=batch.document_ids_BS).logits_BSV
    expected = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), batch.targets_BS.flatten())
    # Sums of a hundred float32 terms.
    assert trainer.run_step().loss == pytest.approx(expected.item(), rel=1e-6)


def test_micro_steps_add_up_with_document_boundaries(tiny_config):
    """Micro-steps hold different numbers of targets, so dividing each by its own count would show."""
    options = (*LIVELY, "data.document_boundaries=true", "train.loss={}")
    data = make_shards(length=7, num_documents=150)
    whole = losses(tiny_config(*options), data=data)
    parts = losses(tiny_config(*options, "train.num_tokens_per_micro_step=32"), data=data)
    # Float32 sums in another order, fed back through two updates.
    assert parts == pytest.approx(whole, rel=1e-5)


def test_the_training_routing_is_what_is_trained_with(tiny_config):
    rows = {}
    for mode in ("dense", "top_k", "random_k"):
        routing = "{mode: dense}" if mode == "dense" else f"{{mode: {mode}, top_k: 1}}"
        rows[mode] = losses(tiny_config(*LIVELY, f"train.routing_ffn={routing}"), steps=2)
    assert len({tuple(found) for found in rows.values()}) == 3


def test_router_losses_join_the_total(tiny_config):
    row = make_trainer(tiny_config(*LIVELY, "train.loss={mutual_information_ffn: 0.5, router_z: 0.1}")).run_step()
    assert row.loss_total == pytest.approx(row.loss + 2 * (0.5 * row.mi_ffn + 0.1 * row.router_z))
    assert row.mi_ffn < 0 < row.router_z


def evaluate(config, **held_out):
    return make_trainer(config, held_out=make_shards(num_documents=4, **held_out)).evaluate()


def test_an_evaluation_with_all_experts_kept_is_the_dense_one(tiny_config):
    def deployed(ffn, attention):
        return (
            f"model.ffn.router.inference={{mode: top_k, top_k: {ffn}}}",
            f"model.attention.router.inference={{mode: top_k, top_k: {attention}}}",
        )

    metrics = evaluate(tiny_config(*LIVELY, *deployed(4, 2)))
    assert metrics.loss_sparse == metrics.loss_dense
    sparse = evaluate(tiny_config(*LIVELY, *deployed(1, 1)))
    assert sparse.loss_dense == metrics.loss_dense
    assert sparse.loss_sparse != sparse.loss_dense
    assert [sum(shares) for shares in sparse.load_share] == pytest.approx([1.0, 1.0])


def test_an_evaluation_changes_nothing_and_repeats_itself(tiny_config):
    config = tiny_config(*LIVELY)
    trainer = make_trainer(config, held_out=make_shards(num_documents=4))
    first = trainer.run_step()
    assert trainer.evaluate() == trainer.evaluate()
    assert [first.loss, trainer.run_step().loss] == losses(config, steps=2)


def test_an_evaluation_without_held_out_text_is_refused(tiny_config):
    with pytest.raises(ConfigError, match="no held-out text"):
        make_trainer(tiny_config()).evaluate()


def test_forced_balance_loads_all_experts_alike(tiny_config):
    options = (*LIVELY, "debug.force_balanced_routing=true")
    sparse = make_trainer(tiny_config(*options, "train.routing_ffn={mode: top_k, top_k: 1}")).run_step()
    dense = make_trainer(tiny_config(*options)).run_step()
    assert sparse.balance == dense.balance == pytest.approx(1.0)
    assert sparse.load_balance == pytest.approx(1.0)


def test_the_learning_rate_follows_the_schedule(tiny_config):
    trainer = Trainer(tiny_config("train.lr=0.01", "train.lr_schedule.warmup_steps=2"), world=ALONE, data=make_shards())
    assert [trainer.run_step().lr for _ in range(3)] == pytest.approx([0.005, 0.01, 0.01])
    assert all(group["lr"] == pytest.approx(0.01) for group in trainer.optimizer.param_groups)
