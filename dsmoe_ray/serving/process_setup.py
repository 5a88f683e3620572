"""What every process of a serving application starts from: the model, the secret, and how it finds the others."""

import functools
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from dsmoe_ray.artifact.layout import expert_matrices, expert_name, stacked_name
from dsmoe_ray.artifact.side_files import SideFiles, read_side_files
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.model.config import MoeConfig
from dsmoe_ray.serving.config import ServingConfig
from dsmoe_ray.serving.wire.connection import Connection, HandleConnection, Listener
from dsmoe_ray.serving.wire.handshake import Hello, Role
from dsmoe_ray.serving.wire.transport import choose_address, open_connection, open_listener

CONNECT_TIMEOUT_S = 2.0
_ITEM_BYTES = {"auto": 0, "float32": 4, "bfloat16": 2}
_STORED_BYTES = {"F32": 4, "BF16": 2}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServedExperts:
    """A model, as far as the controller is concerned."""

    digest: str
    """What two processes must agree on before they work together."""
    num_layers: int
    num_experts: int
    """FFN experts of a layer; 0 if the FFN is dense."""
    expert_bytes: int
    """What each takes in memory."""


@dataclass(frozen=True, kw_only=True)
class ProcessSetup:
    """One process' view of its application."""

    config: ServingConfig
    side_files: SideFiles
    node_id: str
    """Equal for processes that share a machine."""
    node_address: str
    """Of this machine, as others reach it."""
    secret: bytes = field(repr=False)
    """Shared by all processes of the application."""
    directory: Path
    """For sockets; nobody else may enter it."""

    @functools.cached_property
    def model(self) -> ServedExperts:
        """Return what the controller is told of the model."""
        manifest, config = self.side_files.manifest, self.side_files.model_config
        num_layers, num_experts, expert_bytes = 0, 0, 0
        if isinstance(config.ffn, MoeConfig):
            num_layers, num_experts = config.num_layers, config.ffn.num_experts
            matrices = expert_matrices(config)
            stored = manifest.tensors[expert_name(stacked_name(0, matrices[0]), 0)].dtype
            item_bytes = _ITEM_BYTES[self.config.engine.dtype] or _STORED_BYTES[stored]
            expert_bytes = len(matrices) * config.ffn.d_ff * config.d_model * item_bytes
        return ServedExperts(
            digest=hashlib.sha256(manifest.to_bytes()).hexdigest(),
            num_layers=num_layers,
            num_experts=num_experts,
            expert_bytes=expert_bytes,
        )

    def listen(self, role: Role, process_id: str, handle: HandleConnection) -> list[Listener]:
        """Accept connections, best address first.

        Raises:
            ConfigError: nobody can listen there.
        """
        wire = self.config.wire
        addresses = []
        if wire.same_node == "auto":
            addresses.append(f"unix://{self.directory / process_id}.sock")
        if wire.host not in _LOOPBACK or wire.same_node == "off":
            host = self.node_address if wire.host == "node" else wire.host
            addresses.append(f"grpc://{f'[{host}]' if ':' in host else host}:0")
        hello = self.make_hello(role, process_id)
        listeners: list[Listener] = []
        try:
            for address in addresses:
                listeners.append(
                    open_listener(address, handle, hello, secret=self.secret, max_frame_bytes=wire.max_frame_bytes)
                )
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        return listeners

    def choose_address(self, addresses: tuple[str, ...], *, peer_node_id: str) -> str:
        """Return the best address of a peer.

        Raises:
            ConfigError: none of them works from here.
        """
        return choose_address(
            addresses,
            peer_node_id=peer_node_id,
            node_id=self.node_id,
            same_node_transport=self.config.wire.same_node == "auto",
        )

    def connect(self, role: Role, process_id: str, address: str) -> Connection:
        """Connect to a peer.

        Raises:
            ConnectionLostError: it is not there, or does not belong to this application.
        """
        return open_connection(
            address,
            self.make_hello(role, process_id),
            secret=self.secret,
            timeout_s=CONNECT_TIMEOUT_S,
            max_frame_bytes=self.config.wire.max_frame_bytes,
        )

    def make_hello(self, role: Role, process_id: str) -> Hello:
        """Return what a process says of itself in a handshake."""
        return Hello(role=role, model_digest=self.model.digest, identity={f"{role}_id": process_id})


def read_setup(
    config: ServingConfig, *, node_id: str, node_address: str, secret: bytes, directory: Path
) -> ProcessSetup:
    """Read what the artifact says of itself and make sure that the rest fits it.

    Raises:
        ArtifactError: the artifact cannot be read.
        ConfigError: its experts cannot be served by hosts of their own.
    """
    setup = ProcessSetup(
        config=config,
        side_files=read_side_files(config.artifact),
        node_id=node_id,
        node_address=node_address,
        secret=secret,
        directory=directory,
    )
    if config.hosts.count and not setup.model.num_experts:
        raise ConfigError(
            f"{config.artifact} is a model with a dense FFN: it has no experts that hosts could serve. Set hosts.count "
            "to 0."
        )
    return setup


def make_directory(path: Path) -> Path:
    """Return a directory that only this user may enter, made if it is missing.

    Raises:
        ConfigError: there is something else, or it is somebody else's.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if not path.is_dir() or path.is_symlink() or status.st_mode & 0o077:
        raise ConfigError(f"{path} must be a directory that nobody else may enter; remove it.")
    return path
