"""What all replicas share: their setup, and the controller as they reach it."""

import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from dsmoe_ray.config_io import parse_config
from dsmoe_ray.errors import ControllerUnavailableError
from dsmoe_ray.serving.config import ServingConfig
from dsmoe_ray.serving.process_setup import ProcessSetup, make_directory, read_setup

_SYNC_TIMEOUT_S = 2.0
_NAMESPACE = b"dsmoe_ray"


def read_replica_setup(values: dict[str, Any]) -> ProcessSetup:
    """Return what a replica's process starts from; ``values`` are those of a ``ServingConfig``."""
    context = ray.get_runtime_context()
    session = context.get_node_id()[:8]
    return read_setup(
        parse_config(values, ServingConfig, source="the application's config"),
        node_id=context.get_node_id(),
        node_address=ray.util.get_node_ip_address(),
        secret=_share_secret(serve.get_replica_context().app_name),
        # A socket's path may have about a hundred characters, which those of Ray's own session directory exceed.
        directory=make_directory(Path(tempfile.gettempdir()) / f"dsmoe-{os.getuid()}-{session}"),
    )


def make_process_id(kind: str) -> str:
    """Return an id that no other process has or will have."""
    return f"{kind}-{secrets.token_hex(4)}"


class ControllerLink:
    """The controller, as another process sees it."""

    def __init__(self, handle: DeploymentHandle, setup: ProcessSetup) -> None:
        self._handle, self._model = handle, setup.model

    def send(self, report: Any) -> Any:
        """Send a report and return the orders; on a thread that may wait.

        Raises:
            ControllerUnavailableError: there is no answer.
        """
        response = self._handle.sync.remote(self._model, report)
        try:
            return response.result(timeout_s=_SYNC_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            response.cancel()
            reason = str(error).strip().splitlines() or ["no answer in time"]
            raise ControllerUnavailableError(f"{type(error).__name__}: {reason[0]}") from error


def _share_secret(application: str) -> bytes:
    """Return the secret of an application: whoever comes first on a cluster makes it up.

    It lives as long as the cluster, so that old and new processes of a rolling update understand each other.
    """
    key = f"serving-secret:{application}".encode()
    _internal_kv_put(key, secrets.token_hex(32).encode(), overwrite=False, namespace=_NAMESPACE)
    found = _internal_kv_get(key, namespace=_NAMESPACE)
    assert found is not None
    return bytes(found)
