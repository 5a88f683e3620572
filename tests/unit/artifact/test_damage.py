"""A damaged or forged artifact is an ``ArtifactError`` that names what is wrong, and never anything else."""

import hashlib
import json
import random
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.weights_file import WeightsFile
from dsmoe_ray.durable import from_sealed_json, to_sealed_json
from dsmoe_ray.errors import ArtifactError

FILES = [
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FUZZ = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def open_and_verify(directory):
    load_artifact(directory).verify()


def test_the_list_of_files_is_complete(artifact_dir):
    assert sorted(path.name for path in artifact_dir.iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "grown", "empty"])
def test_a_file_that_is_missing_or_of_another_length_is_named(artifact_dir, name, damage):
    file = artifact_dir / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": data[:-1], "grown": data + b"x", "empty": b""}[damage])
    if (name, damage) == ("manifest.json", "truncated"):
        # The last byte is a line end.
        file.write_bytes(data[:-2])
    with pytest.raises(ArtifactError, match=name):
        open_and_verify(artifact_dir)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_refused_by_name(artifact_dir, name):
    file = artifact_dir / name
    data = file.read_bytes()
    moments = random.Random(0)
    for position in moments.sample(range(len(data)), min(len(data), 100)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << moments.randrange(8)
        if name == "manifest.json" and json_equal(flipped, data):
            continue
        file.write_bytes(flipped)
        with pytest.raises(ArtifactError, match=name):
            open_and_verify(artifact_dir)


def json_equal(one, other):
    """Return whether only white space differs."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_a_directory_without_an_artifact_is_told_so(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no artifact: manifest\.json is missing"):
        load_artifact(tmp_path)


def test_an_unknown_format_version_is_told_apart_from_damage(artifact_dir, forge):
    forge(artifact_dir, lambda fields: fields.update(format_version=9))
    with pytest.raises(ArtifactError, match="format version 9 is unknown; this release reads 1"):
        load_artifact(artifact_dir)


def test_a_shape_that_the_config_does_not_give_is_named(artifact_dir, forge):
    forge(artifact_dir, lambda fields: fields["tensors"]["norm.weight"].update(shape=[9]))
    with pytest.raises(ArtifactError, match=r"norm.weight has shape \(9,\) in manifest.json; .* needs \(8,\)"):
        load_artifact(artifact_dir)


def test_a_type_that_the_file_does_not_have_is_named(artifact_dir, forge):
    forge(artifact_dir, lambda fields: fields["tensors"]["norm.weight"].update(dtype="BF16"))
    with pytest.raises(ArtifactError, match=r"norm.weight is F32 \[8\]; the manifest says BF16"):
        load_artifact(artifact_dir)


def test_a_config_that_asks_for_absurdly_many_tensors_fails_at_once(artifact_dir, forge):
    config = json.loads((artifact_dir / "config.json").read_text())
    forge(artifact_dir, config={**config, "num_layers": 10**12})
    with pytest.raises(ArtifactError, match="not the configuration"):
        load_artifact(artifact_dir)


@pytest.mark.parametrize(
    "name", ["../model-00001-of-00001.safetensors", "/etc/passwd", "model-00001-of-00001.safetensors/../x", "a"]
)
def test_names_that_lead_out_of_the_directory_are_refused(artifact_dir, forge, name):
    index = json.loads((artifact_dir / "model.safetensors.index.json").read_text())
    index["weight_map"]["norm.weight"] = name
    forge(artifact_dir, index=index)
    with pytest.raises(ArtifactError, match="files do not fit"):
        load_artifact(artifact_dir)
    forge(
        artifact_dir, lambda fields: fields["weight_files"].update({name: {"size_bytes": 1, "header_sha256": "0" * 64}})
    )
    with pytest.raises(ArtifactError, match="is not the name of a weights file"):
        load_artifact(artifact_dir)


def refuse_or_accept(directory):
    """Open a forged artifact: it may be sound by luck; any error but ``ArtifactError`` fails the test."""
    try:
        open_and_verify(directory)
    except ArtifactError:
        return


@FUZZ
@given(data=st.binary(max_size=200))
@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_random_bytes_in_a_small_file(artifact_dir, name, data):
    original = (artifact_dir / name).read_bytes()
    (artifact_dir / name).write_bytes(data)
    with pytest.raises(ArtifactError):
        load_artifact(artifact_dir)
    (artifact_dir / name).write_bytes(original)


@FUZZ
@given(data=st.data())
def test_a_forged_manifest(artifact_dir, data):
    path = artifact_dir / "manifest.json"
    original = path.read_bytes()
    fields = from_sealed_json(original)
    replace_something(fields, data)
    path.write_bytes(to_sealed_json(fields))
    refuse_or_accept(artifact_dir)
    path.write_bytes(original)


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("stem", ["config", "generation_config", "index"])
def test_a_forged_side_file(artifact_dir, forge, stem, data):
    name = "model.safetensors.index.json" if stem == "index" else f"{stem}.json"
    original = (artifact_dir / name).read_bytes()
    if data.draw(st.booleans()):
        content = data.draw(JSON | st.binary(max_size=50))
    else:
        content = json.loads(original)
        replace_something(content, data)
    forge(artifact_dir, **{stem: content})
    refuse_or_accept(artifact_dir)
    forge(artifact_dir, **{stem: original})


def replace_something(fields, data):
    """Put a random value somewhere into a nested object, or take something out."""
    node = fields
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 3)):
            node = inner
            continue
        if data.draw(st.booleans()) and isinstance(node, dict):
            del node[key]
        else:
            node[key] = data.draw(JSON)
        return


def open_weights(path, data):
    path.write_bytes(data)
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    return WeightsFile(path, size_bytes=len(data), header_sha256=hashlib.sha256(header).hexdigest())


@FUZZ
@given(header=JSON | st.dictionaries(st.text(max_size=3), JSON, max_size=3), body=st.binary(max_size=20))
def test_a_forged_header_of_a_weights_file(tmp_path, header, body):
    text = json.dumps(header).encode()
    try:
        open_weights(tmp_path / "file", struct.pack("<Q", len(text)) + text + body)
    except ArtifactError:
        return


@FUZZ
@given(data=st.binary(max_size=100))
def test_random_bytes_as_a_weights_file(tmp_path, data):
    with pytest.raises(ArtifactError, match="file"):
        open_weights(tmp_path / "file", data)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entries", "body_bytes", "message"),
    [
        ({"a": {**ENTRY, "data_offsets": [4, 12]}}, 12, "a lies at 4..12; expected 0..8"),
        ({"a": {**ENTRY, "data_offsets": [0, 4]}}, 4, "a lies at 0..4; expected 0..8"),
        ({"a": ENTRY, "b": ENTRY}, 8, "b lies at 0..8; expected 8..16"),
        ({"a": ENTRY}, 12, "tensors end at byte 8 of 12"),
        ({"a": ENTRY}, 4, "tensors end at byte 8 of 4"),
        ({"a": {**ENTRY, "dtype": "F64"}}, 8, "a is of type 'F64'; known are F32, BF16"),
        ({"a": {**ENTRY, "shape": [-2]}}, 8, "shape"),
        ({"a": {**ENTRY, "shape": ["2"]}}, 8, "shape"),
        ({"a": {**ENTRY, "shape": [0], "data_offsets": [0, 0]}}, 0, "a lies at 0..0"),
        ({"a": {"dtype": "F32"}}, 8, "shape"),
    ],
    ids=[
        "gap",
        "too short",
        "overlap",
        "data too long",
        "data too short",
        "type",
        "negative",
        "text",
        "empty",
        "fields",
    ],
)
def test_a_header_that_does_not_describe_its_data_is_refused(tmp_path, entries, body_bytes, message):
    text = json.dumps(entries).encode()
    with pytest.raises(ArtifactError, match=message):
        open_weights(tmp_path / "file", struct.pack("<Q", len(text)) + text + bytes(body_bytes))


def test_a_header_longer_than_its_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="claims a header of"):
        open_weights(tmp_path / "file", struct.pack("<Q", 2**63) + b"{}")
