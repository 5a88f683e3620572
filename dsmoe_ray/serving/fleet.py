"""Who lives: the last report of every host, router and gateway, and who has been silent for too long. Decides nothing.

Time in which the controller itself did not run counts against nobody: otherwise one that was stopped for a moment would
take everyone for dead.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dsmoe_ray.serving.control import GatewayReport, HostReport, RouterInfo, RouterReport
from dsmoe_ray.serving.plan import HostInfo, LogicalExpert

_GATEWAY_TIMEOUT_S = 30.0
_MOST_PATIENCE = 5.0
"""Heartbeat timeouts for which all hosts, or all routers, may be silent together."""


@dataclass
class _Host:
    report: HostReport
    seen_s: float
    counted: HostReport
    """Up to which its counters have been added up."""
    utilization: float = 0.0
    suspected_since_s: float | None = None
    """By a router, without a break."""


@dataclass
class _Router:
    report: RouterReport
    seen_s: float


@dataclass(frozen=True, kw_only=True)
class LoadDelta:
    """What all hosts computed since it was last asked for."""

    num_tokens: Mapping[LogicalExpert, int]
    busy_s: float


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Processes that were taken for dead, and why, by id."""

    hosts: Mapping[str, str] = field(default_factory=dict)
    routers: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.hosts or self.routers)


class Fleet:
    """All processes of an application but the controller, as they last reported."""

    def __init__(self, *, heartbeat_timeout_s: float, suspicion_timeout_s: float) -> None:
        """Know nobody.

        Args:
            heartbeat_timeout_s: A process that reports nothing for so long is dead.
            suspicion_timeout_s: The same for one that another process cannot reach.
        """
        self._heartbeat_timeout_s, self._suspicion_timeout_s = heartbeat_timeout_s, suspicion_timeout_s
        self._hosts: dict[str, _Host] = {}
        self._routers: dict[str, _Router] = {}
        self._gateways: dict[str, tuple[GatewayReport, float]] = {}
        self._looked_s: float | None = None

    def see_host(self, report: HostReport, now_s: float) -> bool:
        """Take a report; return whether the host is new."""
        host_id = report.info.host_id
        known = self._hosts.get(host_id)
        if known is None:
            # What it did before was counted by another controller, or is lost.
            self._hosts[host_id] = _Host(report, now_s, counted=report)
            return True
        duration_s = now_s - known.seen_s
        if duration_s > 0:
            known.utilization = (report.busy_s - known.report.busy_s) / duration_s / report.num_threads
        known.report, known.seen_s = report, now_s
        return False

    def see_router(self, report: RouterReport, now_s: float) -> bool:
        """Take a report; return whether the router is new."""
        router_id = report.info.router_id
        is_new = router_id not in self._routers
        self._routers[router_id] = _Router(report, now_s)
        return is_new

    def see_gateway(self, report: GatewayReport, now_s: float) -> None:
        """Take a report."""
        self._gateways[report.gateway_id] = report, now_s

    def remove_dead(self, now_s: float) -> Losses:
        """Forget everyone who has been silent for too long, and tell who."""
        self._forgive_own_absence(now_s)
        self._gateways = {
            gateway_id: (report, seen_s)
            for gateway_id, (report, seen_s) in self._gateways.items()
            if now_s - seen_s <= _GATEWAY_TIMEOUT_S
        }
        hosts = self._find_silent({host_id: host.seen_s for host_id, host in self._hosts.items()}, now_s, "router")
        routers = self._find_silent(
            {router_id: router.seen_s for router_id, router in self._routers.items()}, now_s, "gateway"
        )
        for host_id in hosts:
            del self._hosts[host_id]
        for router_id in routers:
            del self._routers[router_id]
        suspected = self._list_suspected_hosts()
        for host_id, host in self._hosts.items():
            host.suspected_since_s = (host.suspected_since_s or now_s) if host_id in suspected else None
        return Losses(hosts=hosts, routers=routers)

    @property
    def host_reports(self) -> Mapping[str, HostReport]:
        """Return the last report of each living host."""
        return {host_id: host.report for host_id, host in self._hosts.items()}

    @property
    def host_infos(self) -> dict[str, HostInfo]:
        """Return the living hosts."""
        return {host_id: host.report.info for host_id, host in self._hosts.items()}

    def find_usable_hosts(self, now_s: float) -> dict[str, HostInfo]:
        """Return the living hosts that do not leave and that routers can reach."""
        return {
            host_id: host.report.info
            for host_id, host in self._hosts.items()
            if not host.report.leaving
            and (host.suspected_since_s is None or now_s - host.suspected_since_s <= self._heartbeat_timeout_s)
        }

    @property
    def utilizations(self) -> Mapping[str, float]:
        """Return the share of its last interval that each host computed."""
        return {host_id: host.utilization for host_id, host in self._hosts.items()}

    @property
    def router_reports(self) -> Mapping[str, RouterReport]:
        """Return the last report of each living router."""
        return {router_id: router.report for router_id, router in self._routers.items()}

    @property
    def routers(self) -> tuple[RouterInfo, ...]:
        """Return the living routers."""
        return tuple(router.report.info for router in self._routers.values())

    @property
    def num_gateways(self) -> int:
        """Return how many gateways have reported lately."""
        return len(self._gateways)

    def take_load(self) -> LoadDelta:
        """Return what hosts computed since the last call."""
        num_tokens: dict[LogicalExpert, int] = {}
        busy_s = 0.0
        for host in self._hosts.values():
            before = host.counted.num_tokens
            for expert, total in host.report.num_tokens.items():
                if grown := total - before.get(expert, 0):
                    num_tokens[expert] = num_tokens.get(expert, 0) + grown
            busy_s += host.report.busy_s - host.counted.busy_s
            host.counted = replace(host.report, plan=None)
        return LoadDelta(num_tokens=num_tokens, busy_s=busy_s)

    def _forgive_own_absence(self, now_s: float) -> None:
        if self._looked_s is not None:
            absence_s = now_s - self._looked_s - self._heartbeat_timeout_s / 3
            if absence_s > 0:
                for host in self._hosts.values():
                    host.seen_s = min(host.seen_s + absence_s, now_s)
                for router in self._routers.values():
                    router.seen_s = min(router.seen_s + absence_s, now_s)
        self._looked_s = now_s

    def _find_silent(self, seen_s: Mapping[str, float], now_s: float, witness: str) -> dict[str, str]:
        suspected = self._list_suspected_hosts() if witness == "router" else self._list_suspected_routers()
        silent = {}
        for process_id, last_s in seen_s.items():
            silence_s = now_s - last_s
            if process_id in suspected and silence_s > self._suspicion_timeout_s:
                silent[process_id] = f"a {witness} cannot reach it, and no report for {silence_s:.2f} s"
            elif silence_s > self._heartbeat_timeout_s:
                silent[process_id] = f"no report for {silence_s:.2f} s"
        if len(silent) == len(seen_s) and not silent.keys() <= suspected:
            # That all die at once is less likely than that reports do not arrive.
            most_s = _MOST_PATIENCE * self._heartbeat_timeout_s
            silent = {process_id: why for process_id, why in silent.items() if now_s - seen_s[process_id] > most_s}
        return silent

    def _list_suspected_hosts(self) -> set[str]:
        return {host_id for router in self._routers.values() for host_id in router.report.suspected}

    def _list_suspected_routers(self) -> set[str]:
        return {router_id for report, _ in self._gateways.values() for router_id in report.lost_routers}
