"""What two ends make sure of before they talk: same protocol, same model, fitting roles, and the same secret.

Caller to listener: its hello and a nonce. Listener to caller: its own, and an HMAC-SHA256 over both hellos under the
shared secret. Caller to listener: the same, marked as the caller's, so that neither proof can be sent back as the
other. Listener to caller: welcome. Whoever finds a fault says so in a refusal, so that both ends can tell a person why.
The secret itself never travels.
"""

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import ConnectionLostError, HandshakeError
from dsmoe_ray.serving.wire.codec import encode_header
from dsmoe_ray.serving.wire.connection import Connection, Frame

PROTOCOL_VERSION = 1
HANDSHAKE_MAX_BYTES = 1 << 14
"""Largest frame from somebody who has proved nothing yet."""
HANDSHAKE_TIMEOUT_S = 5.0
"""How long a listener waits for a caller to prove itself."""
MIN_SECRET_BYTES = 16

Role = Literal["gateway", "router", "host"]
_LISTENS_TO: Mapping[Any, Role] = {"host": "router", "router": "gateway"}

# Kinds of frames before the handshake is done; those of messages start at 1 and are not confused with them.
_HELLO, _CHALLENGE, _PROOF, _WELCOME, _REFUSAL = range(0x4801, 0x4806)
_STEPS = {_HELLO: "hello", _CHALLENGE: "challenge", _PROOF: "proof", _WELCOME: "welcome", _REFUSAL: "refusal"}


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a process says of itself."""

    role: Role
    model_digest: str
    """Both ends must serve the same model."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """Ids that the other end may want to know, such as ``router_id``."""
    version: int = PROTOCOL_VERSION


class UnprovenConnection(Connection, Protocol):
    """A connection before its handshake, which limits frames to ``HANDSHAKE_MAX_BYTES``."""

    def establish(self, peer: Mapping[str, Any], *, max_sent_bytes: int, max_received_bytes: int) -> None:
        """Take down who the peer is, and the limits from now on."""


def check_secret(secret: bytes) -> None:
    """Refuse a secret that can be guessed."""
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"the shared secret must have at least {MIN_SECRET_BYTES} bytes; found {len(secret)}")


def prove_to_listener(
    connection: UnprovenConnection, hello: Hello, *, secret: bytes, timeout_s: float, max_frame_bytes: int
) -> None:
    """Shake hands as the one who called.

    Raises:
        HandshakeError: one end refuses the other; the message says which and why.
        ConnectionLostError: the listener is gone or did not answer in time.
    """
    deadline = monotonic_s() + timeout_s
    ours = _say_hello(hello, max_frame_bytes)
    _send(connection, _HELLO, ours)
    theirs = _expect(connection, _CHALLENGE, deadline)
    proof = theirs.pop("proof", None)
    _check(connection, hello, theirs, fits=_LISTENS_TO.get(theirs.get("role")) == hello.role)
    _check_proof(connection, proof, _prove(secret, b"listener", ours, theirs), theirs)
    _send(connection, _PROOF, {"proof": _prove(secret, b"caller", ours, theirs)})
    _expect(connection, _WELCOME, deadline)
    _establish(connection, theirs, max_frame_bytes)


def prove_to_caller(
    connection: UnprovenConnection, hello: Hello, *, secret: bytes, timeout_s: float, max_frame_bytes: int
) -> None:
    """Shake hands as the one who was called; raises like ``prove_to_listener``."""
    deadline = monotonic_s() + timeout_s
    theirs = _expect(connection, _HELLO, deadline)
    _check(connection, hello, theirs, fits=_LISTENS_TO.get(hello.role) == theirs.get("role"))
    ours = _say_hello(hello, max_frame_bytes)
    _send(connection, _CHALLENGE, {**ours, "proof": _prove(secret, b"listener", theirs, ours)})
    proof = _expect(connection, _PROOF, deadline).get("proof")
    _check_proof(connection, proof, _prove(secret, b"caller", theirs, ours), theirs)
    # First the limits, then the word that lets the caller use them.
    _establish(connection, theirs, max_frame_bytes)
    _send(connection, _WELCOME, {})


def _say_hello(hello: Hello, max_frame_bytes: int) -> dict[str, Any]:
    return {
        "version": hello.version,
        "role": hello.role,
        "model_digest": hello.model_digest,
        "identity": dict(hello.identity),
        "max_frame_bytes": max_frame_bytes,
        "nonce": secrets.token_bytes(32),
    }


def _prove(secret: bytes, side: bytes, caller: Mapping[str, Any], listener: Mapping[str, Any]) -> bytes:
    """Return the proof that ``side`` knows the secret and saw the same two hellos as we."""
    mac = hmac.new(secret, b"dsmoe handshake, " + side, hashlib.sha256)
    for hello in (caller, listener):
        packed = encode_header(dict(sorted(hello.items())))
        mac.update(len(packed).to_bytes(4, "little"))
        mac.update(packed)
    return mac.digest()


def _send(connection: Connection, kind: int, header: Mapping[str, Any]) -> None:
    connection.send(Frame(kind, header))


def _expect(connection: Connection, kind: int, deadline_s: float) -> dict[str, Any]:
    frame = connection.receive(max(0.0, deadline_s - monotonic_s()))
    if frame is None:
        raise ConnectionLostError(f"the other end sent no {_STEPS[kind]} in time; the connection is given up")
    if frame.kind == _REFUSAL:
        raise HandshakeError(f"the other end refuses: {str(frame.header.get('message'))[:500]}")
    if frame.kind != kind:
        found = _STEPS.get(frame.kind, f"a frame of kind {frame.kind}")
        raise HandshakeError(f"expected the handshake's {_STEPS[kind]}; found {found}")
    return dict(frame.header)


def _check(connection: Connection, hello: Hello, theirs: Mapping[str, Any], *, fits: bool) -> None:
    """Refuse, and tell the other end, whoever does not belong to us."""
    version, role, digest = theirs.get("version"), theirs.get("role"), theirs.get("model_digest")
    if version != hello.version:
        _refuse(
            connection, f"protocol version {hello.version} met {version!r}; run one version of dsmoe_ray everywhere"
        )
    if role not in get_args(Role) or not fits:
        _refuse(connection, f"a {hello.role} does not talk to {role!r}; check the address")
    if digest != hello.model_digest:
        _refuse(connection, f"model {hello.model_digest!r} met {digest!r}; serve one artifact in all processes")
    nonce, limit, identity = theirs.get("nonce"), theirs.get("max_frame_bytes"), theirs.get("identity")
    if not isinstance(nonce, bytes) or len(nonce) != 32:
        _refuse(connection, "nonce must be 32 bytes")
    if type(limit) is not int or limit < HANDSHAKE_MAX_BYTES:
        _refuse(connection, f"max_frame_bytes must be at least {HANDSHAKE_MAX_BYTES}; found {limit!r}")
    if type(identity) is not dict or not all(type(value) is str for value in identity.values()):
        _refuse(connection, "identity must map text to text")


def _check_proof(connection: Connection, proof: object, expected: bytes, theirs: Mapping[str, Any]) -> None:
    if not isinstance(proof, bytes) or not hmac.compare_digest(proof, expected):
        _refuse(connection, f"the {theirs['role']} does not know the shared secret; start all ends with the same one")


def _refuse(connection: Connection, message: str) -> None:
    _send(connection, _REFUSAL, {"message": message})
    raise HandshakeError(f"refused the other end: {message}")


def _establish(connection: UnprovenConnection, theirs: Mapping[str, Any], max_frame_bytes: int) -> None:
    peer = {**theirs["identity"], "role": theirs["role"], "model_digest": theirs["model_digest"]}
    sent = min(max_frame_bytes, theirs["max_frame_bytes"])
    connection.establish(peer, max_sent_bytes=sent, max_received_bytes=max_frame_bytes)
