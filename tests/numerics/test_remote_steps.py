"""What happens inside a step to experts elsewhere leaves no trace in what a runner or an engine gives.

A plan that changes between two frames of a step, a host that dies in the middle of one, two micro-batches that take
turns: all to the bit. And no token goes anywhere but to hosts that hold an expert which it selected.
"""

import random

import pytest
import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.cpu_runner import CpuRunner
from dsmoe_ray.inference.loading import load_engine
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.inference.sampling_config import SamplingConfig
from tests.fakes.expert_fleet import PATIENT, ExpertFleet, publish
from tests.fakes.paged_sequences import PagedSequences
from tests.fakes.runner_kinds import MAX_SEQS, MAX_TOKENS, make_model, with_kernels

LENGTHS = [45, 20, 37, 5]
CHUNKS = [[30, 8, 1, 1, 5], [15, 1, 1, 3], [20, 16, 1], [2, 1, 1, 1]]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request):
    return make_model(dtype=request.param)


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    return publish(model, tmp_path_factory.mktemp("remote") / "artifact")


def run(model, experts=None, *, min_micro_batch_tokens=1, routing="threshold=0.8"):
    def make():
        return CpuRunner(
            model,
            num_blocks=40,
            max_tokens=MAX_TOKENS,
            max_seqs=MAX_SEQS,
            num_threads=1,
            experts=experts,
            min_micro_batch_tokens=min_micro_batch_tokens,
        )

    runner = with_kernels("cpu native", make)
    sequences = PagedSequences(runner, LENGTHS, rules=[resolve_routing(routing, model.config)])
    return torch.cat(sequences.run(CHUNKS))


class Watched:
    """Experts whose calls are noted, each with the frames that were sent for it."""

    def __init__(self, fleet, **options):
        self.calls, self.at_frame = [], lambda number: None
        self.num_frames = 0
        self.plans = {fleet.plan.version: fleet.plan}
        self.fleet, self.experts = fleet, fleet.client(audit=self.note, **options)

    def note(self, piece):
        self.num_frames += 1
        self.calls[-1][1].append(piece)
        self.at_frame(self.num_frames)

    def change_plan(self, number):
        plan = self.fleet.change_plan()
        self.plans[plan.version] = plan
        self.experts.update_plan(plan)

    def dispatch(self, layer, x_TD, assignment):
        ids_TK = assignment.expert_ids_TK.tolist()
        wanted = [{expert_id for expert_id in ids if expert_id >= 0} for ids in ids_TK]
        self.calls.append((wanted, []))
        return self.experts.dispatch(layer, x_TD, assignment)

    def combine(self, handle):
        return self.experts.combine(handle)


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_a_plan_that_changes_inside_steps_changes_no_bit_and_each_token_goes_where_its_experts_are(
    model, artifact, num_hosts
):
    with ExpertFleet(artifact, num_hosts=num_hosts, seed=num_hosts) as fleet:
        watched = Watched(fleet)
        draw = random.Random(num_hosts)
        watched.at_frame = lambda number: watched.change_plan(number) if draw.random() < 0.2 else None
        found = run(model, watched)
        assert torch.equal(found, run(model))
        assert len(watched.plans) > 3
        for wanted, pieces in watched.calls:
            sent = [[] for _ in wanted]
            for piece in pieces:
                assert not piece.on_demand
                plan = watched.plans[piece.plan_version]
                held = {expert.expert_id for expert in plan.held_by(piece.host_id) if expert.layer == piece.layer}
                for row, ids in zip(piece.token_rows.tolist(), piece.expert_ids_TK.tolist(), strict=True):
                    own = [expert_id for expert_id in ids if expert_id >= 0]
                    # To hosts that it needs only, for experts that they hold, and for each of those once.
                    assert own and held.issuperset(own)
                    sent[row] += own
            assert [sorted(own) for own in sent] == [sorted(own) for own in wanted]


def test_a_host_that_dies_inside_a_step_changes_no_bit(model, artifact):
    with ExpertFleet(artifact, num_hosts=3) as fleet:
        watched = Watched(fleet)

        def lose(number):
            if number in (5, 40):
                fleet.lose_host(min(fleet.hosts))

        watched.at_frame = lose
        assert torch.equal(run(model, watched), run(model))
        assert len(fleet.hosts) == 1
        assert watched.experts.statistics.num_retries > 0 and watched.experts.statistics.num_on_demand > 0
        assert set(watched.experts.suspected_hosts.values()) == {"lost"}


def test_sums_made_by_hosts_agree_to_rounding(model, artifact):
    # Logits near ten. Float32: other orders of six terms, through two layers. Bfloat16: each host's sum is rounded to
    # eight bits where a local one is not.
    close = {torch.float32: {"rtol": 1e-5, "atol": 6e-5}, torch.bfloat16: {"rtol": 0.02, "atol": 0.25}}
    with ExpertFleet(artifact, num_hosts=2) as fleet:
        found = run(model, fleet.client(exact=False))
        torch.testing.assert_close(found, run(model), **close[model.compute_dtype])


def generate(directory, experts=None):
    config = EngineConfig(max_num_seqs=4, max_batched_tokens=40, num_blocks=30)
    engine = load_engine(load_artifact(directory), config, device=torch.device("cpu"), experts=experts)
    draw = random.Random(3)
    for number in range(6):
        prompt_ids = [draw.randrange(256) for _ in range(draw.randint(1, 40))]
        sampling = SamplingConfig(temperature=0.9 * (number % 2), seed=number, logprobs=1)
        engine.add(number, GenerationRequest(prompt_ids=prompt_ids, max_tokens=10, sampling=sampling, ignore_eos=True))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def test_a_hung_host_costs_time_and_no_token(artifact):
    expected = generate(artifact)
    # A busy machine may take a living host for hung as well; that costs time only.
    wire = PATIENT.model_copy(update={"expert_deadline_s": 0.5})
    with ExpertFleet(artifact, num_hosts=2) as fleet:
        watched = Watched(fleet, wire=wire)

        def hang(number):
            if number == 30:
                # It reads calls and never answers.
                fleet.hosts["host-0"]._settle = lambda *_: None

        watched.at_frame = hang
        assert generate(artifact, watched) == expected
        assert watched.experts.suspected_hosts.get("host-0") == "late"
