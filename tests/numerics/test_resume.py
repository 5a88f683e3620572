"""A resumed run is the uninterrupted one: bit for bit on the same ranks, to rounding on others; and where a run starts
from an artifact, it starts at that artifact's loss.
"""

import dataclasses

import pytest
import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.errors import CheckpointError, ConfigError
from dsmoe_ray.inference.loading import load_model
from dsmoe_ray.training.batches import BatchReader
from dsmoe_ray.training.checkpoint import CheckpointWriter
from dsmoe_ray.training.checkpoint_commit import commit_checkpoint
from tests.fakes.tiny_artifact import write_tiny_artifact
from tests.fakes.tiny_run import ALONE, make_shards, make_trainer
from tests.numerics.ranks import run_in_world

# Everything that depends on the step: data over two epochs, warm-up, routing that is drawn and one that anneals,
# several micro-steps.
RECIPE = (
    "model.init_std=0.2",
    "train.steps=8",
    "train.lr=0.01",
    "train.lr_schedule.warmup_steps=5",
    "train.num_tokens_per_step=256",
    "train.num_tokens_per_micro_step=64",
    "train.routing_ffn={mode: random_k, top_k: 1}",
    "train.routing_attention={mode: anneal, top_k: 1, start_step: 1, end_step: 6}",
)
SAVED_AT, LAST = 4, 8


def run_part(world, config, start, save, steps, digest="d"):
    """Train from a checkpoint or from the seed; return what steps measured and what was saved, by step.

    ``save`` is a directory and the step after which to save there; the run goes on beside the writing.
    """
    trainer = make_trainer(config, world=world, data=make_shards(num_documents=5, digest=digest))
    if start is not None:
        trainer.restore(start)
    directory, save_at = save or (None, None)
    writer, handle, rows = CheckpointWriter(directory, mesh=world.mesh), None, []
    for _ in range(steps):
        # How long a step took is the one thing that may differ.
        rows.append(dataclasses.replace(trainer.run_step(), step_time_s=0.0))
        if trainer.step == save_at:
            handle = writer.start_save(trainer.checkpoint_state(), step=save_at)
    part = None if handle is None else handle.result(30)
    writer.close()
    return rows, part


def run(config, *, start=None, save=None, steps, digest="d"):
    """Train on the ranks of the config; return the steps and the checkpoint."""
    arguments = (config, start, save, steps, digest)
    alone = config.parallel.world_size == 1
    results = [run_part(ALONE, *arguments)] if alone else run_in_world(run_part, config.parallel, *arguments)
    rows, parts = results[0][0], [part for _, part in results]
    assert all(found == rows for found, _ in results), "ranks disagree about what they measured"
    if save is None:
        return rows, None
    directory, step = save
    return rows, commit_checkpoint(directory, step=step, parts=parts, config_digest="", mesh={}, keep=9)


@pytest.mark.parametrize("mesh", [(), ("parallel.ep=2",)], ids=["one", "ep=2"])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_last_bit(tiny_config, tmp_path, mesh):
    config = tiny_config(*RECIPE, *mesh)
    uninterrupted, checkpoint = run(config, save=(tmp_path, SAVED_AT), steps=LAST)
    resumed, _ = run(config, start=checkpoint, steps=LAST - SAVED_AT)
    assert resumed == uninterrupted[SAVED_AT:]
    assert uninterrupted[-1].loss < uninterrupted[0].loss - 0.1, "a run that learns nothing compares nothing"


def test_saving_does_not_disturb_the_run(tiny_config, tmp_path):
    config = tiny_config(*RECIPE)
    assert run(config, save=(tmp_path, SAVED_AT), steps=LAST)[0] == run(config, steps=LAST)[0]


@pytest.mark.slow
def test_a_run_goes_on_over_two_one_and_four_ranks(tiny_config, tmp_path):
    # Dense, since near a tie between experts rounding may decide and the runs would part.
    recipe = (*RECIPE, "train.routing_ffn={mode: dense}", "train.routing_attention={mode: dense}")
    two, one, four = (tiny_config(*recipe, f"parallel.ep={ep}") for ep in (2, 1, 4))
    expected, _ = run(one, steps=LAST)
    rows, checkpoint = run(two, save=(tmp_path / "two", 3), steps=3)
    more, checkpoint = run(one, start=checkpoint, save=(tmp_path / "one", 6), steps=3)
    last, _ = run(four, start=checkpoint, steps=2)
    found = rows + more + last
    assert [row.step for row in found] == list(range(1, LAST + 1))
    # Experts' partial outputs are added in another order, 6e-8 each, and AdamW magnifies it where gradients are tiny.
    # Micro-steps of 64 tokens a rank also divide the step otherwise, which the router losses (1e-3) feel.
    assert [row.loss for row in found] == pytest.approx([row.loss for row in expected], rel=1e-4)
    assert [row.lr for row in found] == [row.lr for row in expected]


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    return run(tiny_config(), save=(tmp_path / "checkpoints", 1), steps=1)[1]


def test_a_checkpoint_of_other_tokens_is_refused(tiny_config, checkpoint):
    with pytest.raises(CheckpointError, match="of a run on other tokens"):
        run(tiny_config(), start=checkpoint, steps=1, digest="other")


@pytest.mark.parametrize(
    "change, message",
    [
        ("model.d_model=16", "Check the model section"),
        ("model.ffn.num_experts=8", "Check the model section"),
        ("model.num_layers=1", "which the model of this run lacks"),
        ("model.num_layers=3", "which the model of this run has"),
        ("model.tie_embeddings=true", "which the model of this run lacks"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tiny_config, checkpoint, change, message):
    with pytest.raises(CheckpointError, match=message):
        run(tiny_config(change), start=checkpoint, steps=1)


@pytest.fixture
def artifact(tmp_path):
    return write_tiny_artifact(tmp_path / "artifact")


@pytest.fixture
def fine_tuning(tiny_config, artifact):
    """Return a maker of runs that start from the artifact; a change may undo what makes the models equal."""
    model = load_artifact(artifact).model_config.model_dump(mode="json", exclude={"init_std"}, exclude_none=True)

    def make(*changes):
        return tiny_config(f"model={model}", f"model.init_from={artifact}", *changes)

    return make


def artifact_loss(artifact, config) -> float:
    """Return the published model's mean loss over the first step's batch."""
    [batch] = BatchReader(config, make_shards(num_documents=5), rank=0, device=ALONE.device).read_step(0)
    with torch.no_grad():
        output = load_model(load_artifact(artifact))(batch.tokens_BS, targets_BS=batch.targets_BS)
    return output.loss_sum.item() / batch.tokens_BS.numel()


@pytest.mark.parametrize("ep", [1, 2])
def test_fine_tuning_starts_at_the_loss_of_the_artifact(artifact, fine_tuning, ep):
    [row], _ = run(fine_tuning(f"parallel.ep={ep}"), steps=1)
    expected = artifact_loss(artifact, fine_tuning())
    # On two ranks the same sums are added in another order.
    assert row.loss == (expected if ep == 1 else pytest.approx(expected, rel=1e-6))
    # Not by chance: weights from the seed are worse by far or better by far.
    [fresh], _ = run(fine_tuning("model.init_from=null", "model.init_std=0.3"), steps=1)
    assert abs(fresh.loss - expected) > 1e-3


def test_fine_tuning_may_change_what_weights_do_not_depend_on(artifact, fine_tuning):
    free = ("model.max_seq_len=64", "model.init_std=0.5", "model.ffn.router.inference={mode: dense}")
    [row], _ = run(fine_tuning(*free), steps=1)
    assert row.loss == artifact_loss(artifact, fine_tuning())


@pytest.mark.parametrize(
    "change, message",
    [
        ("model.d_model=32", "d_model is 16 there and 32 here"),
        ("model.num_layers=1", "num_layers is 2 there and 1 here"),
        ("model.ffn.num_experts=8", r"ffn\.num_experts is 4 there and 8 here"),
        ("model.attention.head_dim=4", r"attention\.head_dim is 8 there and 4 here"),
        ("model.ffn.router.gate_scale=2.0", r"ffn\.router\.gate_scale is 4.0 there and 2.0 here"),
        ("model.tie_embeddings=true", "tie_embeddings is False there and True here"),
    ],
)
def test_fine_tuning_another_model_is_refused(fine_tuning, change, message):
    with pytest.raises(ConfigError, match=message):
        run(fine_tuning(change), steps=1)
