"""The controller of a running application, as a person's command reaches it."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from dsmoe_ray.errors import ConfigError, ControllerUnavailableError, DsmoeError
from dsmoe_ray.ray_environment import check_answers
from dsmoe_ray.serving.controller_events import ControllerEvent
from dsmoe_ray.serving.on_ray.names import APPLICATION, CONTROLLER
from dsmoe_ray.serving.plan import LogicalExpert
from dsmoe_ray.serving.replica_controller import ControllerStatus

_TIMEOUT_S = 10.0


class ControllerClient:
    """Asks the controller."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def describe(self) -> ControllerStatus:
        """Return what is, and what would be if all delays had passed."""
        return self._ask("describe")

    def list_events(self, after: int = 0) -> list[ControllerEvent]:
        """Return the events after one of them, oldest first."""
        return self._ask("list_events", after)

    def pin(self, expert: LogicalExpert, num_replicas: int | None) -> None:
        """Give an expert this many replicas whatever its load; None lets load decide again."""
        self._ask("pin", expert.layer, expert.expert_id, num_replicas)

    def rollback(self, version: int) -> None:
        """Place experts as an earlier plan did, and keep it so."""
        self._ask("rollback", version)

    def resume(self) -> None:
        """Scale by load again."""
        self._ask("resume")

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._handle, method).remote(*arguments).result(timeout_s=_TIMEOUT_S)
        except RayTaskError as error:
            if isinstance(error.cause, DsmoeError):
                raise error.cause from None
            raise
        except (RayError, RayServeException, TimeoutError) as error:
            raise ControllerUnavailableError(f"the controller does not answer within {_TIMEOUT_S:g} s") from error


@contextlib.contextmanager
def open_controller(address: str, *, application: str = APPLICATION) -> Iterator[ControllerClient]:
    """Connect to the controller of an application on a cluster.

    Raises:
        ConfigError: there is no cluster, or no such application on it.
    """
    check_answers(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {error}. Check --address.") from error
    try:
        found = serve.status().applications
        if application not in found:
            known = ", ".join(found) or "none"
            raise ConfigError(f"there is no application {application!r} on {address}; there are: {known}.")
        yield ControllerClient(serve.get_deployment_handle(CONTROLLER, app_name=application))
    finally:
        ray.shutdown()
