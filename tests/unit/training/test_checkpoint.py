"""Saving and loading the state of one rank: copies, optimizer state, fit of names and shapes, damage."""

import threading

import pytest
import torch
from torch import nn

from dsmoe_ray.errors import CheckpointError
from dsmoe_ray.training import checkpoint
from dsmoe_ray.training.checkpoint import CheckpointWriter, collect_state, load_checkpoint, read_model_tensors
from dsmoe_ray.training.checkpoint_commit import commit_checkpoint


@pytest.fixture
def writer(tmp_path):
    writer = CheckpointWriter(tmp_path)
    yield writer
    writer.close()


@pytest.fixture
def save(tmp_path, writer):
    def run(state, step=1, keep=5):
        part = writer.start_save(state, step=step).result(10)
        return commit_checkpoint(tmp_path, step=step, parts=[part], config_digest="", mesh={}, keep=keep)

    return run


def make_model(width=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 3), nn.Linear(3, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)


def train(model, optimizer, steps=2):
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 4), float(step + 1))).square().sum().backward()
        optimizer.step()


def test_a_restored_run_takes_the_same_next_step_bit_for_bit(save):
    model, optimizer = make_model()
    train(model, optimizer)
    kept = {"position": 12, "note": "x", "best": 0.1, "none": None}
    path = save({**collect_state(model, optimizer), "counters": kept})
    other, other_optimizer = make_model()
    counters = {"position": 0, "note": "", "best": 0.0, "none": 3}
    load_checkpoint(path, {**collect_state(other, other_optimizer), "counters": counters})
    assert counters == kept
    train(model, optimizer)
    train(other, other_optimizer)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_state_of_an_optimizer_that_never_stepped_does_not_change_its_first_step(save):
    model, optimizer = make_model()
    model(torch.ones(1, 4)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    path = save(collect_state(model, optimizer), step=0)
    for parameter, gradient, value in zip(model.parameters(), gradients, before, strict=True):
        assert torch.equal(parameter.grad, gradient)
        assert torch.equal(parameter, value)
    restored, restored_optimizer = make_model()
    load_checkpoint(path, collect_state(restored, restored_optimizer))
    fresh, fresh_optimizer = make_model()
    for each, its_optimizer in ((model, optimizer), (restored, restored_optimizer), (fresh, fresh_optimizer)):
        train(each, its_optimizer)
    for one, two, three in zip(model.parameters(), restored.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, three)
        assert torch.equal(two, three)


def test_changes_after_the_call_do_not_reach_the_files(tmp_path, writer, monkeypatch):
    gate = threading.Event()
    write_chunks = checkpoint._write_chunks

    def wait_then_write(*args):
        assert gate.wait(10)
        write_chunks(*args)

    monkeypatch.setattr(checkpoint, "_write_chunks", wait_then_write)
    state = {"model": {"weight": torch.ones(3)}}
    handle = writer.start_save(state, step=1)
    state["model"]["weight"].zero_()
    assert not handle.done()
    with pytest.raises(TimeoutError):
        handle.result(0.01)
    gate.set()
    path = commit_checkpoint(tmp_path, step=1, parts=[handle.result(10)], config_digest="", mesh={}, keep=1)
    load_checkpoint(path, state)
    assert torch.equal(state["model"]["weight"], torch.ones(3))


def test_a_second_save_waits_for_the_first_and_both_hold_their_own_values(tmp_path, writer):
    weight = torch.zeros(200_000)
    handles = []
    for step in range(4):
        weight.fill_(step)
        handles.append(writer.start_save({"model": {"weight": weight}}, step=step))
    for step, handle in enumerate(handles):
        path = commit_checkpoint(tmp_path, step=step, parts=[handle.result(10)], config_digest="", mesh={}, keep=4)
        load_checkpoint(path, {"model": {"weight": weight}})
        assert weight.eq(step).all()


def test_a_directory_that_cannot_be_written_is_told_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(tmp_path / "file")
    handle = writer.start_save({"model": {"weight": torch.ones(1)}}, step=1)
    with pytest.raises(CheckpointError, match=r"cannot write .*file"):
        handle.result(10)
    writer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8], ids=str)
def test_types_and_scalars_come_back_as_they_were(save, dtype):
    saved = {"model": {"a": torch.arange(6).reshape(2, 3).to(dtype), "scalar": torch.tensor(3).to(dtype)}}
    path = save(saved)
    loaded = {"model": {name: torch.zeros_like(tensor) for name, tensor in saved["model"].items()}}
    load_checkpoint(path, loaded)
    for name, tensor in saved["model"].items():
        assert torch.equal(loaded["model"][name], tensor)


def test_a_view_is_saved_without_the_rest_of_its_storage(save):
    path = save({"model": {"view": torch.zeros(1000, 1000)[:2, :2]}})
    assert sum(file.stat().st_size for file in path.rglob("*.distcp")) < 10_000


def test_model_tensors_come_layer_by_layer_in_numeric_order(save):
    state = {"model": {f"blocks.{layer}.w": torch.full((2,), layer) for layer in (10, 2, 1)}, "optimizer": {}}
    state["optimizer"]["blocks.1.w.step"] = torch.tensor(1.0)
    found = list(read_model_tensors(save(state)))
    assert [name for name, _ in found] == ["blocks.1.w", "blocks.2.w", "blocks.10.w"]
    assert [int(tensor[0]) for _, tensor in found] == [1, 2, 10]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.ones(2), "b": torch.ones(2)}, "lacks model.b, which"),
        ({"c": torch.ones(2)}, "lacks model.c, which"),
        ({"a": torch.ones(3)}, r"holds model.a as \(\(2,\), torch.float32\); this run needs \(\(3,\)"),
        ({"a": torch.ones(2, dtype=torch.bfloat16)}, "this run needs .*bfloat16"),
    ],
    ids=["missing", "other", "shape", "type"],
)
def test_a_checkpoint_of_another_model_is_refused_by_tensor_name(save, tensors, message):
    path = save({"model": {"a": torch.ones(2)}, "optimizer": {"a.step": torch.tensor(1.0)}})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, {"model": tensors})


def test_a_layer_the_model_does_not_have_is_an_error_and_an_unasked_section_is_not(save):
    path = save({"model": {"a": torch.ones(2), "b": torch.ones(2)}, "optimizer": {"a": torch.ones(2)}})
    with pytest.raises(CheckpointError, match=r"holds model\.b"):
        load_checkpoint(path, {"model": {"a": torch.zeros(2)}})
    state = {"model": {"a": torch.zeros(2), "b": torch.zeros(2)}}
    load_checkpoint(path, state)
    assert state["model"]["b"].eq(1).all()


def test_a_plain_number_the_checkpoint_lacks_is_named(save):
    path = save({"model": {"a": torch.ones(2)}})
    with pytest.raises(CheckpointError, match=r"no value for counters\.position"):
        load_checkpoint(path, {"counters": {"position": 1}})


@pytest.mark.parametrize("suffix", [".metadata", ".distcp"])
@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "missing"])
def test_a_damaged_file_is_named_and_torch_does_not_read_it(save, monkeypatch, suffix, damage):
    path = save({"model": {"a": torch.ones(2)}})
    [file] = [file for file in path.rglob("*") if file.name.endswith(suffix)]
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        file.write_bytes(data[:-1] if damage == "truncated" else flipped)
    if suffix == ".distcp":
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load ran on a damaged file"))
    with pytest.raises(CheckpointError, match=file.name):
        load_checkpoint(path, {"model": {"a": torch.zeros(2)}})
    with pytest.raises(CheckpointError, match=file.name):
        list(read_model_tensors(path))


def test_a_state_of_other_things_than_tensors_and_numbers_is_refused(writer):
    with pytest.raises(TypeError, match=r"model\.a is of type list"):
        writer.start_save({"model": {"a": [1]}}, step=1)
