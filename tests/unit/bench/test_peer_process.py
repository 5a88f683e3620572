"""Other engines as processes: the protocol, its failures, and what is counted; with a worker that is no engine."""

import sys
from pathlib import Path

import pytest

from dsmoe_ray.bench.engine_workloads import ENGINE_WORKLOADS, GRANITE_191M, QUICKSTART_ENGINE
from dsmoe_ray.bench.peer_process import Generation, PeerSide, compute_agreement_ratio, parse_peer, start_peer
from dsmoe_ray.errors import BenchError, BenchUnavailableError, ConfigError
from dsmoe_ray.model.accounting import count_parameters
from tests.fakes.fake_peer import VOCAB_SIZE

FAKE = str(Path(__file__).parents[2] / "fakes" / "fake_peer.py")


def command(manner="obedient"):
    return [sys.executable, FAKE, manner]


def test_a_worker_answers_turn_by_turn_and_says_what_it_is():
    with start_peer(command()) as peer:
        assert peer.about == {"ready": True, "engine": "fake 1.0"}
        assert peer.decode([[1, 2], [3, 10]], 3) == Generation(0.25, 0.5, [[3, 4, 5], [11, 12, 13]])
        assert peer.compute_logprobs([[1, 2], [3, 4]]) == [[-0.5, -1.0], [-1.5, -2.0]]
        assert peer.about == {"engine": "fake 1.0", "fastest": "counting"}


def test_a_request_larger_than_a_pipe_comes_through_whole():
    prompts = [[token % VOCAB_SIZE for token in range(row, row + 5000)] for row in range(32)]
    with start_peer(command()) as peer:
        assert peer.decode(prompts, 2000).tokens[31][:2] == [(prompts[31][-1] + 1) % VOCAB_SIZE, 936]


@pytest.mark.parametrize(
    ("manner", "message"),
    [
        ("dying", "peer ended with code 1: RuntimeError: out of luck"),
        ("silent", r"no answer within 0\.3 s"),
    ],
)
def test_a_worker_that_fails_at_work_is_told_apart_by_its_error(manner, message):
    with start_peer(command(manner), answer_timeout_s=0.3 if manner == "silent" else 60.0) as peer:
        with pytest.raises(BenchError, match=message):
            peer.decode([[1]], 2)


@pytest.mark.parametrize(
    ("manner", "message"),
    [("stillborn", "peer ended with code 1: RuntimeError: no model here"), ("babbling", "b'hello', which is not JSON")],
)
def test_a_worker_that_does_not_become_ready_fails_at_the_start(manner, message):
    with pytest.raises(BenchError, match=message), start_peer(command(manner)):
        raise AssertionError("it cannot be ready")


def test_a_program_that_does_not_exist_makes_the_comparison_unavailable():
    with pytest.raises(BenchUnavailableError, match="No such file"), start_peer(["/nowhere/python", "worker.py"]):
        raise AssertionError("it cannot be ready")


@pytest.mark.parametrize(("phase", "seconds", "tokens_per_step"), [("prefill", 0.25, 2 * 128), ("decode", 0.5, 2 * 63)])
def test_a_side_counts_the_seconds_and_tokens_of_its_phase(phase, seconds, tokens_per_step):
    with start_peer(command()) as peer:
        side = PeerSide(peer, QUICKSTART_ENGINE, batch_size=2, phase=phase)
        assert side.run(3) == 3 * seconds
        assert side.run(1) == seconds
    assert side.tokens_per_step == tokens_per_step
    assert len(side.generations) == 4
    last_tokens = [prompt[-1] for prompt in QUICKSTART_ENGINE.make_prompts(2, seed=3)]
    assert [own[0] for own in side.generations[3].tokens] == [(token + 1) % VOCAB_SIZE for token in last_tokens]


def test_decode_speed_leaves_out_the_first_token_of_each_sequence():
    assert Generation(9.0, 0.5, [[1, 2, 3], [4, 5, 6]]).decode_tokens_per_s == 8.0


def test_agreement_ends_at_the_first_difference_of_each_sequence():
    assert compute_agreement_ratio([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 0, 7, 8]]) == 5 / 8
    assert compute_agreement_ratio([[1, 2]], [[1, 2]]) == 1.0


def test_a_peer_is_written_as_a_name_and_a_command():
    assert parse_peer("llama_cpp='/a b/python' worker.py --threads 2") == (
        "llama_cpp",
        ["/a b/python", "worker.py", "--threads", "2"],
    )


@pytest.mark.parametrize("spec", ["llama_cpp", "=python", "x=", "x='open"])
def test_what_is_no_name_and_command_is_refused_with_an_example(spec):
    with pytest.raises(ConfigError, match="NAME=COMMAND"):
        parse_peer(spec)


def test_the_large_workload_has_the_parameters_its_name_says():
    assert round(count_parameters(GRANITE_191M.model).total / 1e6) == 191


def test_prompts_depend_on_the_seed_alone_and_stay_within_the_vocabulary():
    for workload in ENGINE_WORKLOADS.values():
        prompts = workload.make_prompts(8, seed=1)
        assert prompts == workload.make_prompts(8, seed=1) != workload.make_prompts(8, seed=2)
        assert {len(prompt) for prompt in prompts} == {workload.num_prompt_tokens}
        assert max(map(max, prompts)) < workload.model.vocab_size
        assert workload.num_positions <= workload.model.max_seq_len
