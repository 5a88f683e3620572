"""A model to plan and answer calls for."""

import pytest

from dsmoe_ray.serving.openai_api.requests import Planner
from dsmoe_ray.serving.openai_api.served_model import load_served_model
from tests.fakes.gateway_server import CHAT_TEMPLATE
from tests.fakes.tiny_artifact import write_tiny_artifact


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "model"
    return load_served_model(write_tiny_artifact(directory, chat_template=CHAT_TEMPLATE, max_seq_len=64), name="tiny")


@pytest.fixture
def planner(model):
    return Planner(model, max_prompts=4)
