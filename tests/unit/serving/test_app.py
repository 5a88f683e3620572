import pytest

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.app import build_app, read_args
from tests.fakes.tiny_artifact import write_tiny_artifact


def test_arguments_of_a_command_line_and_sections_of_a_file_say_the_same(tmp_path):
    by_word = read_args({"artifact": "model", "hosts.count": "2", "experts.pinned": "{0/1: 2}"})
    by_section = read_args({"artifact": "model", "hosts": {"count": 2}, "experts": {"pinned": {"0/1": 2}}})
    assert by_word == by_section
    assert by_word.artifact.is_absolute()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"artifact": "model", "hostz.count": "2"}, "hosts"),
        ({"artifact": "model", "hosts": {"cuont": 2}}, "count"),
        ({"hosts.count": "2"}, "artifact"),
        ({"artifact": "model", "hosts.count": 2}, "hosts.count=VALUE"),
    ],
    ids=["section", "key", "missing", "dotted"],
)
def test_wrong_arguments_are_refused_with_the_nearest_key(args, told):
    with pytest.raises(ConfigError, match=told):
        read_args(args)


def test_an_application_has_a_deployment_for_each_kind_of_process(tmp_path):
    artifact = write_tiny_artifact(tmp_path / "tiny")
    app = build_app({"artifact": str(artifact), "hosts": {"count": 2, "max_count": 4}})
    deployment = app._bound_deployment
    assert deployment.name == "Gateway"
    bound = {arg._bound_deployment.name: arg._bound_deployment for arg in deployment.init_args[1:]}
    assert set(bound) == {"ReplicaController", "RouterService", "ExpertHost"}
    assert bound["RouterService"].num_replicas == 1
    scaling = bound["ExpertHost"]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 4)
