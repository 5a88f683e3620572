"""The connections of one router to the hosts of its plan, made and made again in the background.

A link is used by one thread, the one that sends calls; threads that connect only hand it a new connection. Who is taken
for dead or hung loses its connection at once: its calls go elsewhere and a late answer finds nobody.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Generic, Literal, TypeVar

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import ConfigError, ConnectionLostError
from dsmoe_ray.serving.config import WireConfig
from dsmoe_ray.serving.plan import HostInfo
from dsmoe_ray.serving.replica_choice import HostLoad
from dsmoe_ray.serving.wire.connection import Connection
from dsmoe_ray.serving.wire.handshake import Hello
from dsmoe_ray.serving.wire.transport import choose_address, open_connection

logger = logging.getLogger(__name__)

Connect = Callable[[HostInfo], Connection]
"""Opens a connection to a host and shakes hands, or raises ``ConnectionLostError``."""

_CONNECT_TIMEOUT_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_PROBATION_S, _LONGEST_PROBATION_S = 1.0, 30.0
_OTHER_NODE_S = 0.0003
_GUESSED_SECONDS_PER_WORK = 20e-6
_MEMORY = 0.9
"""Share that older calls have in the measured speed of a host."""

Suspicion = Literal["lost", "late"]
"""What a host is suspected of: its connection broke and cannot be made again, or it did not answer in time."""

C = TypeVar("C")


def build_connect(hello: Hello, *, secret: bytes, node_id: str, wire: WireConfig) -> Connect:
    """Return what connects a process to hosts over the best transport that both ends have.

    Args:
        hello: Of this process.
        secret: Shared by all processes of the application.
        node_id: Of this process.
        wire: Limits; a host that reads nothing for ``expert_deadline_s`` is taken for hung.
    """

    def connect(info: HostInfo) -> Connection:
        address = choose_address(
            info.addresses,
            peer_node_id=info.node_id,
            node_id=node_id,
            same_node_transport=wire.same_node == "auto",
        )
        return open_connection(
            address,
            hello,
            secret=secret,
            timeout_s=_CONNECT_TIMEOUT_S,
            max_frame_bytes=wire.max_frame_bytes,
            send_timeout_s=wire.expert_deadline_s,
        )

    return connect


class LinkState(Enum):
    """Whether a host can be asked."""

    CONNECTING = "connecting"
    """Nothing is known yet."""
    LIVING = "living"
    LOST = "lost"


class HostLink(Generic[C]):
    """One host and the calls that it has not answered."""

    def __init__(self, info: HostInfo, *, is_near: bool) -> None:
        self.info = info
        self.state = LinkState.CONNECTING
        self.connection: Connection | None = None
        self.pending: dict[int, C] = {}
        """By call id."""
        self.outstanding = 0
        """Work of the pending calls."""
        self.owed_bytes = 0
        """Of the pending calls and their answers."""
        self.seconds_per_work = _GUESSED_SECONDS_PER_WORK
        self.layers_seen: set[int] = set()
        """Those it has answered for: the first call of a layer may have to read weights."""
        self.reason = "not connected yet"
        """Why it is not living."""
        self.suspicion: Suspicion | None = None
        self.num_lates = 0
        """Deadlines that passed since it last answered."""
        self.avoided_until_s = 0.0
        """Others are asked until then: it may shake hands again and still be hung."""
        self._distance_s = 0.0 if is_near else _OTHER_NODE_S

    @property
    def is_living(self) -> bool:
        """Return whether calls can be sent."""
        return self.state is LinkState.LIVING

    @property
    def load(self) -> HostLoad:
        """Return what a choice between hosts needs."""
        return HostLoad(self.outstanding, self.seconds_per_work, self._distance_s)

    def note_answer(self, work: int, duration_s: float) -> None:
        """Take down how long the host computed for some work."""
        self.num_lates, self.suspicion = 0, None
        self.seconds_per_work = _MEMORY * self.seconds_per_work + (1 - _MEMORY) * duration_s / work


class HostLinks(Generic[C]):
    """Links to all hosts of the newest plan; those of hosts that left it go when their last answer is in."""

    def __init__(self, connect: Connect, *, node_id: str) -> None:
        self._connect, self._node_id = connect, node_id
        self._changed = threading.Condition()
        self._links: dict[str, HostLink[C]] = {}
        self._is_closed = False
        self.version = 0
        """Grows whenever a host begins or ceases to be living."""
        self.avoiding_until_s = 0.0
        """Until then some host may be avoided."""

    def set_hosts(self, hosts: Iterable[HostInfo]) -> None:
        """Connect to new hosts and let go of others; from any thread, never blocks."""
        with self._changed:
            wanted = {host.host_id: host for host in hosts}
            for host_id in [host_id for host_id in self._links if host_id not in wanted]:
                link = self._links.pop(host_id)
                if not link.pending:
                    self._drop(link, "it left the plan")
            for host_id, info in wanted.items():
                if host_id not in self._links and not self._is_closed:
                    self._links[host_id] = HostLink(info, is_near=info.node_id == self._node_id)
                    self._start_connecting(self._links[host_id])
            self._note_change()

    def get(self, host_id: str) -> HostLink[C] | None:
        """Return the link to a host of the plan."""
        return self._links.get(host_id)

    def list_living(self) -> list[HostLink[C]]:
        """Return the links that calls can be sent on; without those that are avoided, unless there are no others."""
        living = [link for link in list(self._links.values()) if link.is_living]
        now_s = monotonic_s()
        if now_s >= self.avoiding_until_s:
            return living
        return [link for link in living if link.avoided_until_s <= now_s] or living

    def list_suspected(self) -> dict[str, Suspicion]:
        """Return the hosts that seem to be dead or hung, by id."""
        links = list(self._links.values())
        return {link.info.host_id: link.suspicion for link in links if link.suspicion is not None}

    def lose(self, link: HostLink[C], reason: str, *, is_late: bool = False) -> list[C]:
        """Give up a connection; return the calls that it owed. It is made anew in the background."""
        with self._changed:
            owed = list(link.pending.values())
            self._drop(link, reason)
            if is_late:
                self._avoid(link)
            if self._links.get(link.info.host_id) is link and not self._is_closed:
                self._start_connecting(link)
            self._note_change()
        logger.warning("expert host %s is taken for lost: %s", link.info.host_id, reason)
        return owed

    def release(self, link: HostLink[C]) -> None:
        """Close the link of a host that left the plan, if nothing is owed any more."""
        if not link.pending and self._links.get(link.info.host_id) is not link:
            with self._changed:
                self._drop(link, "it left the plan")

    def wait_until_tried(self, timeout_s: float) -> bool:
        """Wait until every host was reached or found missing; return False if it takes longer."""

        def is_tried() -> bool:
            return all(link.state is not LinkState.CONNECTING for link in self._links.values())

        with self._changed:
            return self._changed.wait_for(is_tried, timeout_s)

    def wait_for_change(self, version: int, timeout_s: float) -> None:
        """Wait until ``version`` is no longer the present one."""
        with self._changed:
            self._changed.wait_for(lambda: self.version != version, timeout_s)

    def close(self) -> None:
        """Close all connections and make no more."""
        with self._changed:
            self._is_closed = True
            for link in self._links.values():
                self._drop(link, "closed")
            self._links.clear()
            self._note_change()

    def _note_change(self) -> None:
        self.version += 1
        self._changed.notify_all()

    def _drop(self, link: HostLink[C], reason: str) -> None:
        if link.connection is not None:
            link.connection.close()
        link.connection, link.reason, link.state = None, reason, LinkState.LOST
        link.pending.clear()
        link.layers_seen.clear()
        link.outstanding = link.owed_bytes = 0

    def _avoid(self, link: HostLink[C]) -> None:
        link.suspicion = "late"
        link.avoided_until_s = monotonic_s() + min(_PROBATION_S * 2**link.num_lates, _LONGEST_PROBATION_S)
        link.num_lates += 1
        self.avoiding_until_s = max(self.avoiding_until_s, link.avoided_until_s)

    def _start_connecting(self, link: HostLink[C]) -> None:
        name = f"connect-{link.info.host_id}"
        threading.Thread(target=self._keep_connecting, args=(link,), name=name, daemon=True).start()

    def _keep_connecting(self, link: HostLink[C]) -> None:
        pause_s = _FIRST_PAUSE_S
        while self._is_wanted(link):
            try:
                connection = self._connect(link.info)
            except (ConnectionLostError, ConfigError) as error:
                self._note_failure(link, str(error))
            else:
                self._hand_over(link, connection)
                return
            deadline_s = monotonic_s() + pause_s
            with self._changed:
                self._changed.wait_for(lambda: not self._is_wanted(link), max(deadline_s - monotonic_s(), 0.0))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _is_wanted(self, link: HostLink[C]) -> bool:
        return self._links.get(link.info.host_id) is link

    def _note_failure(self, link: HostLink[C], reason: str) -> None:
        with self._changed:
            if reason != link.reason:
                logger.warning("expert host %s cannot be reached: %s", link.info.host_id, reason)
            link.reason, link.suspicion = reason, link.suspicion or "lost"
            if link.state is LinkState.CONNECTING:
                link.state = LinkState.LOST
                self._note_change()

    def _hand_over(self, link: HostLink[C], connection: Connection) -> None:
        with self._changed:
            if not self._is_wanted(link):
                connection.close()
                return
            link.connection, link.state = connection, LinkState.LIVING
            if link.num_lates == 0:
                link.suspicion = None
            self._note_change()
        logger.info("connected to expert host %s", link.info.host_id)
