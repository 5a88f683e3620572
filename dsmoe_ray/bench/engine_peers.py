"""Our engine against other engines on the same weights, type, threads and prompts; see ``tests/performance``."""

from dataclasses import replace

from dsmoe_ray.bench.engine_side import EngineSide, build_engine, publish, publish_for_peers
from dsmoe_ray.bench.engine_workloads import ENGINE_WORKLOADS
from dsmoe_ray.bench.measure import Measurement, compare_speed
from dsmoe_ray.bench.peer_process import PeerSide, compute_agreement_ratio, start_peer
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.bench.workloads import Dtype
from dsmoe_ray.errors import BenchUnavailableError


def compare_with_peer(settings: Settings, *, workload: str, dtype: Dtype, batch_size: str, peer: str) -> Measurement:
    """Return our decode tokens/s over the peer's, which runs in a process of its own and idles in our turns."""
    if peer not in settings.peers:
        raise BenchUnavailableError(f"no --peer {peer}=COMMAND was given; tests/performance/README.md tells how")
    shape, batch = ENGINE_WORKLOADS[workload], int(batch_size)
    command = [*settings.peers[peer], "--model", str(publish_for_peers(workload)), "--dtype", dtype]
    ours = EngineSide(build_engine(shape, publish(workload, dtype), batch_size=batch), shape, batch_size=batch)
    with start_peer([*command, "--threads", str(settings.num_threads)]) as process:
        theirs = PeerSide(process, shape, batch_size=batch, phase="decode")
        found = compare_speed(ours, theirs, settings.turns())
        about = dict(process.about)
    agreement = compute_agreement_ratio(
        [tokens for batch_tokens in ours.generations for tokens in batch_tokens],
        [tokens for generation in theirs.generations for tokens in generation.tokens],
    )
    prefill_s = [generation.prefill_s for generation in theirs.generations]
    return replace(
        found,
        details={
            "peer": about,
            "equal_tokens_ratio": agreement,
            "peer_prefill_tokens_per_s": batch * shape.num_prompt_tokens / min(prefill_s),
        },
    )
