"""What comes in is what was there; what is missing, strange, damaged or dangerous is an error that names it."""

import json
import random
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dsmoe_ray.artifact.hugging_face.formats import Format
from dsmoe_ray.artifact.hugging_face.import_model import import_model, open_model
from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.errors import ArtifactError
from tests.fakes.stock_models import draw_weights, make_config

FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
LAYER = "model.layers.1."


def bring_in(directory):
    out = directory.parent / "imported"
    import_model(open_model(directory), out, provenance={"source": "test"})
    return load_artifact(out)


def refuse(directory, message):
    with pytest.raises(ArtifactError, match=message):
        bring_in(directory)
    # A failed import leaves nothing behind.
    assert not [path.name for path in directory.parent.iterdir() if "imported" in path.name]


@pytest.mark.parametrize("many", [False, True], ids=["one file", "many files"])
def test_files_with_an_index_and_without_give_the_same(make_stock, many):
    directory = make_stock(Format.MIXTRAL, max_file_bytes=60_000 if many else 1 << 30)
    assert (directory / "model.safetensors.index.json").exists() == many
    if many:
        # Some leave the index out; the files tell by themselves what they hold.
        (directory / "model.safetensors.index.json").unlink()
    found = bring_in(directory).load_state_dict()
    for name, tensor in draw_weights(make_config()):
        assert torch.equal(found[name], tensor * 3.0 if name.endswith("experts.w2") else tensor), name


def test_weights_keep_their_type_but_float16_becomes_float32(make_stock, edit_weights):
    directory = make_stock(Format.MIXTRAL)

    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(torch.float16 if "self_attn" in name else torch.bfloat16)

    edit_weights(directory, change)
    types = {name: entry.dtype for name, entry in bring_in(directory).manifest.tensors.items()}
    assert {types[name] for name in types if ".wq" in name or ".wo" in name} == {"F32"}
    assert {types[name] for name in types if ".ffn" in name or "norm" in name} == {"BF16"}


def test_a_multiplier_folded_into_bfloat16_weights_loses_no_digits(make_stock, edit_json, edit_weights):
    directory = make_stock(Format.GRANITEMOE)
    edit_json(directory / "config.json", attention_multiplier=0.25 * 8**-0.5, residual_multiplier=0.22)
    before = {}

    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()
        before.update(tensors)

    edit_weights(directory, change)
    state = bring_in(directory).load_state_dict()
    for layer in range(3):
        wq, wo = state[f"blocks.{layer}.attention.wq"], state[f"blocks.{layer}.attention.wo"]
        prefix = f"model.layers.{layer}.self_attn"
        # A power of two moves the exponent only; anything else needs more digits.
        assert wq.dtype == torch.bfloat16 and torch.equal(wq, before[f"{prefix}.q_proj.weight"] * 0.25)
        assert wo.dtype == torch.float32 and torch.equal(wo, before[f"{prefix}.o_proj.weight"].T.float() * 0.22)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Format.JETMOE, f"{LAYER}mlp.bias"),
        (Format.JETMOE, f"{LAYER}self_attention.experts.bias"),
        (Format.QWEN2_MOE, f"{LAYER}self_attn.k_proj.bias"),
    ],
)
def test_biases_may_be_absent_or_zero_only(make_stock, edit_weights, kind, name):
    directory = make_stock(kind)
    edit_weights(directory, lambda tensors: tensors[name].view(-1)[-1:].fill_(1e-30))
    refuse(directory, f"{name} is not zero; our layers have no biases")
    edit_weights(directory, lambda tensors: tensors.pop(name))
    bring_in(directory)


def test_what_an_empty_shared_expert_would_weigh_does_not_matter(make_stock, edit_weights):
    directory = make_stock(Format.QWEN2_MOE)
    edit_weights(directory, lambda tensors: tensors[f"{LAYER}mlp.shared_expert_gate.weight"].fill_(1.0))
    bring_in(directory)


def test_constants_that_old_versions_stored_are_passed_over(make_stock, edit_weights):
    directory = make_stock(Format.MIXTRAL)
    edit_weights(directory, lambda tensors: tensors.update({f"{LAYER}self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    bring_in(directory)


def test_a_head_beside_tied_embeddings_must_equal_them(make_stock, edit_weights):
    directory = make_stock(Format.MIXTRAL, config=make_config(tie_embeddings=True))
    edit_weights(
        directory, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 1})
    )
    assert "head.weight" not in bring_in(directory).load_state_dict()
    edit_weights(directory, lambda tensors: tensors["lm_head.weight"].view(-1)[5:6].add_(1.0))
    with pytest.raises(ArtifactError, match=r"differs from model\.embed_tokens\.weight, though config\.json ties them"):
        import_model(open_model(directory), directory.parent / "again", provenance={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda t: t.pop("model.norm.weight"),
            "holds .* tensors; config.json describes a mixtral model of",
            id="missing",
        ),
        pytest.param(
            lambda t: t.update({"model.normal.weight": t.pop("model.norm.weight")}),
            "lacks model.norm.weight",
            id="misnamed",
        ),
        pytest.param(lambda t: t.update(surplus=torch.ones(1)), "holds surplus, which a stock mixtral", id="extra"),
        pytest.param(
            lambda t: t.update({f"{LAYER}self_attn.q_proj.weight": torch.ones(32, 31)}),
            r"q_proj.weight has shape \(32, 31\); config.json asks for \(32, 32\)",
            id="shape",
        ),
        pytest.param(
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            "model.norm.weight is I8; only F32, BF16, F16",
            id="type",
        ),
        pytest.param(
            lambda t: t.update({f"{LAYER}self_attn.q_proj.bias": torch.zeros(32)}), "holds .*q_proj.bias", id="bias"
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(make_stock, edit_weights, change, message):
    directory = make_stock(Format.MIXTRAL)
    edit_weights(directory, change)
    refuse(directory, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "describes a mixtral model of"),
        ({"num_local_experts": 10**9}, "describes a mixtral model of"),
        ({"num_hidden_layers": 2}, "which a stock mixtral model has not"),
        ({"vocab_size": 10**9}, "config.json asks for"),
        ({"model_type": "granitemoe"}, "lacks model.layers.0.block_sparse_moe.router.layer"),
    ],
)
def test_a_config_of_another_model_is_found_out(make_stock, edit_json, changes, message):
    directory = make_stock(Format.MIXTRAL)
    edit_json(directory / "config.json", architectures=None, **changes)
    refuse(directory, message)


def test_pickled_weights_are_refused_unopened(make_stock):
    directory = make_stock(Format.MIXTRAL)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refuse(directory, "pytorch_model.bin: pickled weights, which run code when they are read. Convert them")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "holds no config.json"),
        ("tokenizer.json", "holds no tokenizer.json"),
        ("model.safetensors", r"holds no \*\.safetensors"),
    ],
)
def test_a_missing_file_is_named(make_stock, name, message):
    directory = make_stock(Format.MIXTRAL)
    (directory / name).unlink()
    refuse(directory, message)


def test_no_directory_is_told_so(tmp_path):
    with pytest.raises(ArtifactError, match=r"is not a directory\. Download the model first"):
        open_model(tmp_path / "org" / "model")


def test_a_missing_file_of_the_index_is_named(make_stock):
    directory = make_stock(Format.MIXTRAL, max_file_bytes=60_000)
    sorted(directory.glob("model-*.safetensors"))[1].unlink()
    refuse(directory, "model-00002-of-0000.*safetensors is no safetensors file, or damaged")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", "", 3, None])
def test_an_index_cannot_lead_out_of_the_directory(make_stock, name):
    directory = make_stock(Format.MIXTRAL)
    index = {"weight_map": {"model.norm.weight": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(directory, "is not the name of a weights file")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": "a"}])
def test_an_index_without_a_map_is_refused(make_stock, index):
    directory = make_stock(Format.MIXTRAL)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(directory, "has no weight_map")


def test_an_index_that_does_not_fit_its_files_is_refused(make_stock):
    directory = make_stock(Format.MIXTRAL, max_file_bytes=60_000)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(
        name for name in files if name != index["weight_map"]["model.norm.weight"]
    )
    path.write_text(json.dumps(index))
    refuse(directory, "lacks model.norm.weight, which model.safetensors.index.json places there")


def test_a_tensor_in_two_files_is_refused(make_stock):
    directory = make_stock(Format.MIXTRAL, max_file_bytes=60_000)
    (directory / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": torch.ones(32)}, directory / "model-again.safetensors")
    refuse(directory, "both hold model.norm.weight")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.999])
def test_a_file_cut_short_is_refused(make_stock, kept):
    directory = make_stock(Format.MIXTRAL)
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refuse(directory, "model.safetensors is no safetensors file, or damaged")


def take_or_refuse(directory):
    """It may be sound by luck; any error but ``ArtifactError`` fails the test."""
    out = directory.parent / "imported"
    try:
        import_model(open_model(directory), out, provenance={})
    except ArtifactError as error:
        assert str(error)
    else:
        for path in out.iterdir():
            path.unlink()


@FUZZ
@given(data=st.data())
def test_a_damaged_header_of_weights(make_stock, data):
    directory = make_stock_once(make_stock)
    path = directory / "model.safetensors"
    original = path.read_bytes()
    (length,) = struct.unpack("<Q", original[:8])
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    take_or_refuse(directory)
    path.write_bytes(original)


@FUZZ
@given(data=st.binary(max_size=64))
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_random_bytes_in_a_small_file(make_stock, name, data):
    directory = make_stock_once(make_stock)
    path = directory / name
    original = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    take_or_refuse(directory)
    path.unlink() if original is None else path.write_bytes(original)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_flipped_bits_in_a_small_file(make_stock, name):
    directory = make_stock(Format.MIXTRAL)
    path = directory / name
    original, moments = path.read_bytes(), random.Random(0)
    for position in moments.sample(range(len(original)), min(len(original), 20)):
        flipped = bytearray(original)
        flipped[position] ^= 1 << moments.randrange(8)
        path.write_bytes(flipped)
        take_or_refuse(directory)


def make_stock_once(make_stock):
    """Hypothesis runs a test many times with one fixture."""
    if not hasattr(make_stock, "made"):
        make_stock.made = make_stock(Format.MIXTRAL)
    return make_stock.made
