"""How a controller that has just started finds out what is there: from reports alone.

Where no process knows a plan it is the first controller of its application, and waits for the hosts that are to come.
Otherwise another one was there before: it asks for the newest plan, waits a moment for all hosts of that plan,
and goes on from there, so that nothing moves that need not. Nobody gets an order meanwhile, and traffic goes on.
"""

from collections.abc import Mapping

from dsmoe_ray.serving.control import HostReport, RouterReport
from dsmoe_ray.serving.plan import HostInfo, LogicalExpert, PlacementPlan


class PlanRecovery:
    """What reports have told so far."""

    def __init__(self, *, num_hosts: int, first_wait_s: float, wait_s: float) -> None:
        """Know nothing.

        Args:
            num_hosts: How many hosts are to come at the very start.
            first_wait_s: How long to wait for them after the first report.
            wait_s: How long to wait for the hosts of an earlier controller's plan after the first report.
        """
        self._num_hosts, self._first_wait_s, self._wait_s = num_hosts, first_wait_s, wait_s
        self._began_s: float | None = None
        self._plan: PlacementPlan | None = None
        self.version = 0
        """Of the newest plan that anybody has mentioned."""

    def take_host(self, report: HostReport, now_s: float) -> None:
        """Take what a host says of plans."""
        if self._began_s is None:
            self._began_s = now_s
        self._take_plan(report)

    def take_router(self, report: RouterReport) -> None:
        """Take what a router says of plans."""
        self._take_plan(report)

    def _take_plan(self, report: HostReport | RouterReport) -> None:
        self.version = max(self.version, report.plan_version)
        if report.plan is not None and (self._plan is None or report.plan.version > self._plan.version):
            self._plan = report.plan

    def wants_plan_of(self, report: HostReport | RouterReport) -> bool:
        """Return whether a process should send its plan."""
        return report.plan_version > (0 if self._plan is None else self._plan.version)

    def recover(self, hosts: Mapping[str, HostReport], now_s: float) -> PlacementPlan | None:
        """Return the plan to go on from, of version 0 and empty at the very start; None to wait on."""
        if self._began_s is None or not hosts:
            return None
        waited_s = now_s - self._began_s
        if self.version == 0:
            is_complete = len(hosts) >= self._num_hosts or waited_s >= self._first_wait_s
            return PlacementPlan(version=0) if is_complete else None
        plan = self._plan
        if waited_s < self._wait_s and (
            plan is None or plan.version < self.version or not plan.hosts.keys() <= hosts.keys()
        ):
            return None
        if plan is None:
            return PlacementPlan(version=self.version, hosts=_infos(hosts), replicas=_holders(hosts))
        return PlacementPlan(version=self.version, hosts=plan.hosts, replicas=plan.replicas, cold=plan.cold)


def _infos(hosts: Mapping[str, HostReport]) -> dict[str, HostInfo]:
    return {host_id: report.info for host_id, report in hosts.items()}


def _holders(hosts: Mapping[str, HostReport]) -> dict[LogicalExpert, tuple[str, ...]]:
    """Return who holds what, where nobody has a plan to send."""
    holders: dict[LogicalExpert, tuple[str, ...]] = {}
    for host_id, report in hosts.items():
        for expert in report.held:
            holders[expert] = (*holders.get(expert, ()), host_id)
    return holders
