"""One call of a remote expert against a bare echo of its bytes."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from dsmoe_ray.bench.bare_echo import RoundTrip, start_echo
from dsmoe_ray.bench.engine_side import publish
from dsmoe_ray.bench.engine_workloads import ENGINE_WORKLOADS
from dsmoe_ray.bench.host_process import make_secret, start_host
from dsmoe_ray.bench.measure import Measurement, Spread
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.bench.worker_side import find_free_port
from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import BenchError
from dsmoe_ray.model.config import MoeConfig
from dsmoe_ray.serving.wire.codec import encode_frame
from dsmoe_ray.serving.wire.connection import Connection
from dsmoe_ray.serving.wire.expert_codec import call_to_frame, result_from_frame, result_to_frame
from dsmoe_ray.serving.wire.handshake import Hello
from dsmoe_ray.serving.wire.messages import ExpertCall, ExpertResult
from dsmoe_ray.serving.wire.transport import DEFAULT_MAX_FRAME_BYTES, open_connection

_WORKLOAD = "granite_191m"
_CALLS_PER_TURN = 400
_TIMEOUT_S = 30.0


def compare_with_echo(settings: Settings, *, transport: str, num_tokens: str) -> Measurement:
    """Return the p50 of a call, without the time that its host computed, over that of an echo of the same bytes.

    The host has one thread, the call takes all the steps that a router's does but the choice of replicas.
    """
    call = _make_call(int(num_tokens))
    request_bytes, reply_bytes = _count_bytes(call)
    turns = settings.turns()
    with tempfile.TemporaryDirectory(prefix="dsmoe-bench-") as directory:
        if transport == "unix":
            address, echo_address = f"unix://{directory}/host.sock", f"{directory}/echo.sock"
        else:
            address, echo_address = "grpc://127.0.0.1:0", f"127.0.0.1:{find_free_port()}"
        with (
            _connect_to_host(address) as connection,
            start_echo(transport, echo_address, request_bytes=request_bytes, reply_bytes=reply_bytes) as round_trip,
        ):
            ask = _make_asker(connection, call)
            calls_s, echoes_s = [], []
            for turn in range(turns.num_pairs + 1):
                mine, theirs = _time_calls(ask), _time_echoes(round_trip)
                if turn:
                    calls_s.append(mine)
                    echoes_s.append(theirs)
    return Measurement(
        figure=Spread.of([mine / theirs for mine, theirs in zip(calls_s, echoes_s, strict=True)]),
        ours={"p50_us": 1e6 * Spread.of(calls_s).median},
        baseline={"p50_us": 1e6 * Spread.of(echoes_s).median},
        details={"request_bytes": request_bytes, "reply_bytes": reply_bytes},
    )


def _time_calls(ask: Callable[[], int]) -> float:
    """Return the median seconds of a call without its computation."""
    durations_s = []
    for _ in range(_CALLS_PER_TURN):
        start_s = monotonic_s()
        compute_us = ask()
        durations_s.append(monotonic_s() - start_s - 1e-6 * compute_us)
    return float(np.median(durations_s))


def _time_echoes(round_trip: RoundTrip) -> float:
    durations_s = []
    for _ in range(_CALLS_PER_TURN):
        start_s = monotonic_s()
        round_trip()
        durations_s.append(monotonic_s() - start_s)
    return float(np.median(durations_s))


@contextmanager
def _connect_to_host(address: str) -> Iterator[Connection]:
    secret = make_secret()
    with start_host(publish(_WORKLOAD, "float32"), address, host_id="host", secret=secret) as host:
        hello = Hello(role="router", model_digest="bench")
        connection = open_connection(host.addresses[0], hello, secret=secret, timeout_s=_TIMEOUT_S)
        try:
            yield connection
        finally:
            connection.close()


def _make_asker(connection: Connection, call: ExpertCall) -> Callable[[], int]:
    def ask() -> int:
        connection.send(call_to_frame(call))
        frame = connection.receive(_TIMEOUT_S)
        if frame is None:
            raise BenchError(f"the expert host did not answer within {_TIMEOUT_S:g} s")
        return result_from_frame(frame).compute_us

    return ask


def _make_call(num_tokens: int) -> ExpertCall:
    """Return a call of a decode step in which two hosts share the experts: each token wants half of its 8 here."""
    config = ENGINE_WORKLOADS[_WORKLOAD].model
    ffn = config.ffn
    assert isinstance(ffn, MoeConfig)
    generator = np.random.default_rng(0)
    wanted = [np.sort(generator.choice(ffn.num_experts, 4, replace=False)) for _ in range(num_tokens)]
    return ExpertCall(
        call_id=1,
        layer=0,
        plan_version=1,
        exact=True,
        deadline_ms=int(1000 * _TIMEOUT_S),
        dtype="float32",
        x_TD=generator.standard_normal((num_tokens, config.d_model), dtype=np.float32),
        expert_ids_TK=np.array(wanted, dtype=np.int32),
        gates_TK=np.full((num_tokens, 4), 0.125, dtype=np.float32),
    )


def _count_bytes(call: ExpertCall) -> tuple[int, int]:
    """Return the bytes of a call and of its answer, on the wire."""
    rows = np.zeros((call.expert_ids_TK.size, call.x_TD.shape[1]), dtype=np.float32)
    answer = result_to_frame(ExpertResult(call_id=1, compute_us=1000, queue_us=10, y=rows))
    request, reply = (encode_frame(frame, DEFAULT_MAX_FRAME_BYTES)[1] for frame in (call_to_frame(call), answer))
    return request, reply
