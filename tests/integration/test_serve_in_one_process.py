"""``dsmoe serve ARTIFACT``: the command, from its start to its end, with the tokens of the engine alone."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.inference.generation import Generator
from dsmoe_ray.inference.loading import load_engine
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.sampling_config import SamplingConfig
from tests.fakes.tiny_artifact import write_tiny_artifact

pytestmark = pytest.mark.slow

PROMPTS = ["def add", "# na", "return left +"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_artifact(tmp_path_factory.mktemp("serve") / "model", max_seq_len=2048)


@contextmanager
def serve(directory, *options):
    command = [sys.executable, "-m", "dsmoe_ray", "serve", str(directory), "--port", "0", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        found = re.search(r"http://\S+(?=/v1)", process.stdout.readline())
        assert found, process.stderr.read()
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def test_the_command_serves_the_engines_tokens_and_ends_after_its_last_stream(directory):
    generator = Generator(load_engine(load_artifact(directory)))
    requests = [
        GenerationRequest(
            prompt_ids=generator.encode(prompt),
            max_tokens=24,
            n=2,
            sampling=SamplingConfig(temperature=temperature, seed=11),
        )
        for temperature in (0.0, 1.0)
        for prompt in PROMPTS
    ]
    offline = [
        "".join(o.text for o in outputs if o.sequence_idx == i) for outputs in generator.run(requests) for i in (0, 1)
    ]
    with serve(directory) as (process, url), httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/ready").status_code == 200
        served = []
        for temperature in (0.0, 1.0):
            fields = {"prompt": PROMPTS, "max_tokens": 24, "n": 2, "temperature": temperature, "seed": 11}
            answer = client.post("/v1/completions", json=fields).json()
            served += [choice["text"] for choice in answer["choices"]]
        assert served == offline
        fields = {"prompt": "def add", "max_tokens": 1000, "ignore_eos": True, "stream": True, "seed": 1}
        with client.stream("POST", "/v1/completions", json=fields) as response:
            lines = (line for line in response.iter_lines() if line.startswith("data: "))
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            *_, last, done = [first, *lines]
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0


def test_what_cannot_be_served_is_told_in_a_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dsmoe_ray", "serve", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2 and "holds no artifact" in done.stderr and "Traceback" not in done.stderr
