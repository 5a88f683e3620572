"""Placement plans to frames and back: experts and replicas as arrays, so that ten thousand stay small and quick."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dsmoe_ray.errors import FrameError
from dsmoe_ray.serving.plan import HostInfo, LogicalExpert, PlacementPlan
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.fields import check_num_payloads, check_text, read_array, read_int, read_list
from dsmoe_ray.serving.wire.messages import Kind, PlanMessage

_INT32 = np.dtype("<i4")
_MAX_ADDRESSES = 16


def plan_to_frame(message: PlanMessage) -> Frame:
    """Return the frame of a plan."""
    plan = message.plan
    index = {host_id: number for number, host_id in enumerate(plan.hosts)}
    try:
        holders = [index[host_id] for host_ids in plan.replicas.values() for host_id in host_ids]
    except KeyError as error:
        raise ValueError(f"plan {plan.version}: replicas name host {error}, which is not among its hosts") from None
    hosts = [[host.host_id, list(host.addresses), host.node_id, host.memory_bytes] for host in plan.hosts.values()]
    payloads: tuple[np.ndarray, ...] = (
        _pairs(plan.replicas),
        np.fromiter(map(len, plan.replicas.values()), _INT32, len(plan.replicas)),
        np.array(holders, _INT32),
        _pairs(plan.cold),
    )
    return Frame(Kind.PLAN, {"version": plan.version, "hosts": hosts}, [array.data for array in payloads])


def plan_from_frame(frame: Frame) -> PlanMessage:
    """Return a plan whose every field was checked; ``FrameError`` names the first that is wrong."""
    check_num_payloads(frame, 4)
    hosts = _read_hosts(frame)
    experts = _read_experts(frame, 0, "replicas' experts")
    counts = read_array(frame, 1, "replicas' counts", _INT32, (len(experts),))
    holders = read_array(frame, 2, "replicas' hosts", _INT32)
    if (counts.size and counts.min() < 0) or int(counts.sum(dtype=np.int64)) != len(holders):
        raise FrameError(f"replicas' counts must be from 0 and add up to the {len(holders)} hosts that are named")
    if holders.size and not (0 <= holders.min() and holders.max() < len(hosts)):
        raise FrameError(f"replicas' hosts must be from 0 to {len(hosts) - 1}")
    _check_each_once(counts, holders, len(hosts))
    names = tuple(hosts)
    host_ids = [names[number] for number in holders.tolist()]
    stops = itertools.accumulate(counts.tolist())
    starts = itertools.chain((0,), itertools.accumulate(counts.tolist()))
    replicas = {
        expert: tuple(host_ids[start:stop]) for expert, start, stop in zip(experts, starts, stops, strict=False)
    }
    cold = frozenset(_read_experts(frame, 3, "cold experts"))
    return PlanMessage(
        plan=PlacementPlan(version=read_int(frame, "version"), hosts=hosts, replicas=replicas, cold=cold)
    )


def _read_hosts(frame: Frame) -> Mapping[str, HostInfo]:
    hosts: dict[str, HostInfo] = {}
    for item in read_list(frame, "hosts"):
        if type(item) is not list or len(item) != 4:
            raise FrameError("hosts must each be an id, addresses, a node and bytes of memory")
        host_id, addresses, node_id, memory_bytes = item
        if type(addresses) is not list or not 1 <= len(addresses) <= _MAX_ADDRESSES:
            raise FrameError(f"hosts' addresses must be 1 to {_MAX_ADDRESSES} texts")
        if type(memory_bytes) is not int or memory_bytes < 0:
            raise FrameError(f"hosts' memory_bytes must be an integer from 0; found {memory_bytes!r:.60}")
        host = HostInfo(
            host_id=check_text(host_id, "hosts' host_id"),
            addresses=tuple(check_text(address, "hosts' address") for address in addresses),
            node_id=check_text(node_id, "hosts' node_id"),
            memory_bytes=memory_bytes,
        )
        if host.host_id in hosts:
            raise FrameError(f"hosts must differ; found {host.host_id!r:.60} twice")
        hosts[host.host_id] = host
    return hosts


def _read_experts(frame: Frame, index: int, name: str) -> list[LogicalExpert]:
    pairs = read_array(frame, index, name, _INT32)
    if len(pairs) % 2 or (pairs.size and pairs.min() < 0):
        raise FrameError(f"{name} must be pairs of a layer and an expert id, both from 0")
    numbers: list[Any] = pairs.tolist()
    experts = [LogicalExpert(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
    if len(set(experts)) != len(experts):
        raise FrameError(f"{name} must differ from each other")
    return experts


def _check_each_once(counts: np.ndarray, holders: np.ndarray, num_hosts: int) -> None:
    """Refuse an expert that names a host twice."""
    seats = np.repeat(np.arange(len(counts), dtype=np.int64), counts) * num_hosts + holders
    if len(np.unique(seats)) != len(seats):
        raise FrameError("replicas' hosts must differ for each expert")


def _pairs(experts: Iterable[LogicalExpert]) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(experts), _INT32)
