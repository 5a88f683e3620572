import os

import pytest

from dsmoe_ray.errors import ConfigError, HandshakeError
from dsmoe_ray.serving.config import ServingConfig
from dsmoe_ray.serving.process_setup import make_directory, read_setup
from tests.fakes.tiny_artifact import NUM_EXPERTS, write_tiny_artifact

SECRET = b"0123456789abcdef"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return write_tiny_artifact(tmp_path_factory.mktemp("setup") / "tiny")


def make_setup(artifact, directory, *, secret=SECRET, **sections):
    config = ServingConfig.model_validate({"artifact": artifact, **sections})
    return read_setup(config, node_id="node", node_address="127.0.0.1", secret=secret, directory=directory)


def test_processes_of_an_application_find_each_other(artifact, tmp_path):
    setup = make_setup(artifact, tmp_path)
    peers = []
    [listener] = setup.listen("host", "host-1", lambda connection: peers.append(dict(connection.peer)))
    assert listener.address.startswith("unix://")
    connection = setup.connect("router", "router-1", listener.address)
    assert connection.peer["host_id"] == "host-1"
    connection.close()
    listener.close()


def test_a_process_without_the_secret_is_refused(artifact, tmp_path):
    [listener] = make_setup(artifact, tmp_path).listen("host", "host-1", lambda connection: None)
    stranger = make_setup(artifact, tmp_path, secret=b"fedcba9876543210")
    with pytest.raises(HandshakeError):
        stranger.connect("router", "router-1", listener.address)
    listener.close()


def test_the_secret_is_not_shown(artifact, tmp_path):
    assert SECRET.decode() not in repr(make_setup(artifact, tmp_path))


def test_a_setup_says_how_large_the_experts_are(artifact, tmp_path):
    model = make_setup(artifact, tmp_path).model
    assert (model.num_layers, model.num_experts) == (2, NUM_EXPERTS)
    assert model.expert_bytes == 2 * 8 * 16 * 4
    assert make_setup(artifact, tmp_path, engine={"dtype": "bfloat16"}).model.expert_bytes == 2 * 8 * 16 * 2


def test_hosts_without_experts_are_refused(tmp_path):
    dense = write_tiny_artifact(
        tmp_path / "dense",
        ffn={"kind": "dense", "d_ff": 8},
        attention={"kind": "gqa", "num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    )
    with pytest.raises(ConfigError, match=r"Set hosts\.count to 0"):
        make_setup(dense, tmp_path, hosts={"count": 2})


def test_listeners_for_other_machines_are_opened_only_where_asked_for(artifact, tmp_path):
    setup = make_setup(artifact, tmp_path, wire={"host": "node"})
    listeners = setup.listen("router", "router-1", lambda connection: None)
    assert [listener.address.partition(":")[0] for listener in listeners] == ["unix", "grpc"]
    for listener in listeners:
        listener.close()


def test_a_directory_that_others_may_enter_is_refused(tmp_path):
    made = make_directory(tmp_path / "own")
    assert made.stat().st_mode & 0o777 == 0o700
    assert make_directory(tmp_path / "own") == made
    os.chmod(made, 0o755)
    with pytest.raises(ConfigError, match="nobody else"):
        make_directory(made)
