"""What every transport survives: peers that die, hang, say nothing or say what is no frame, and other certificates."""

import contextlib
import datetime
import ipaddress
import itertools
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dsmoe_ray.errors import ConfigError, ConnectionLostError, HandshakeError
from dsmoe_ray.serving.wire import grpc_transport, memory_transport, tcp_transport, unix_transport
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.handshake import Hello
from dsmoe_ray.serving.wire.tls import TlsFiles
from dsmoe_ray.serving.wire.transport import choose_address, open_connection, open_listener
from tests.fakes.wire_peer import HOST, SECRET, echo, wait_for

ROUTER = Hello(role="router", model_digest="m1", identity={"router_id": "r1"})
# Far longer than anything takes; a test that waits for it has failed.
LONG_S = 30.0
NUMBERS = itertools.count()


def make_address(kind, tmp_path):
    return {
        "memory": f"memory://strangers-{next(NUMBERS)}",
        "unix": f"unix://{tmp_path}/s",
        "tcp": "tcp://127.0.0.1:0",
        "grpc": "grpc://127.0.0.1:0",
    }[kind]


@pytest.fixture(params=["memory", "unix", "tcp", "grpc"])
def address(request, tmp_path):
    return make_address(request.param, tmp_path)


@pytest.fixture(params=["unix", "tcp", "grpc"])
def peer(request, tmp_path):
    """A process that sends back every frame, and a connection to it."""
    command = [sys.executable, "-m", "tests.fakes.wire_peer", make_address(request.param, tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    connection = open_connection(
        process.stdout.readline().strip(), ROUTER, secret=SECRET, timeout_s=LONG_S, send_timeout_s=0.5
    )
    connection.send(Frame(1, {}))
    assert connection.receive(LONG_S).kind == 1
    yield process, connection
    connection.close()
    process.kill()
    process.wait(LONG_S)
    process.stdout.close()


def stop(process):
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


def test_the_death_of_a_peer_is_noticed_while_receiving(peer):
    process, connection = peer
    threading.Timer(0.1, process.kill).start()
    with pytest.raises(ConnectionLostError):
        connection.receive(LONG_S)
    with pytest.raises(ConnectionLostError):
        connection.send(Frame(1, {}))


def test_a_stopped_peer_answers_nothing_in_time_and_goes_on_when_it_may(peer):
    process, connection = peer
    stop(process)
    connection.send(Frame(2, {}))
    assert connection.receive(0.2) is None
    process.send_signal(signal.SIGCONT)
    assert connection.receive(LONG_S).kind == 2


def test_a_stopped_peer_holds_a_sender_up_no_longer_than_it_may(peer):
    process, connection = peer
    stop(process)
    with pytest.raises(ConnectionLostError):
        for _ in range(1000):
            connection.send(Frame(1, {}, [bytes(1 << 20)]))


@pytest.mark.parametrize("peer", ["grpc"], indirect=True)
def test_a_peer_that_answers_no_ping_is_gone(peer):
    process, connection = peer
    stop(process)
    with pytest.raises(ConnectionLostError):
        connection.receive(LONG_S)


def connect_raw(address):
    """Connect without a handshake; returns what sends any bytes, and the connection."""
    if address.startswith("unix"):
        connection = unix_transport.connect(address, timeout_s=LONG_S, send_timeout_s=LONG_S)
        return connection._socket.sendall, connection
    if address.startswith("tcp"):
        connection = tcp_transport.connect(address, timeout_s=LONG_S, send_timeout_s=LONG_S)
        return connection._socket.sendall, connection
    if address.startswith("memory"):
        connection = memory_transport.connect(address, send_timeout_s=LONG_S)
    else:
        connection = grpc_transport.connect(address, send_timeout_s=LONG_S, max_frame_bytes=1 << 20, tls=None)
    return lambda noise: connection._sent.put(noise, len(noise), LONG_S), connection


def make_prefix(*, frame_bytes):
    return struct.pack("<4sHHII", b"DSM1", 1, 0, 1, frame_bytes)


NOISE = {
    "no frame": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a frame that is cut off": b"DSM1" + bytes(20),
    "a giant": make_prefix(frame_bytes=(1 << 32) - 16),
    "more than a stranger may say": make_prefix(frame_bytes=1 << 17) + b"\x80" + bytes((1 << 17) - 17),
    "a message before the handshake": make_prefix(frame_bytes=32) + b"\x80" + bytes(15),
}


@pytest.mark.parametrize("noise", NOISE)
def test_a_stranger_who_speaks_no_frames_is_cut_off_alone(address, caplog, noise):
    listener = open_listener(address, echo, HOST, secret=SECRET, handshake_timeout_s=1.0)
    friend = open_connection(listener.address, ROUTER, secret=SECRET, timeout_s=LONG_S)
    send, stranger = connect_raw(listener.address)
    with caplog.at_level(logging.WARNING), contextlib.suppress(BrokenPipeError, ConnectionResetError):
        send(NOISE[noise])
        with pytest.raises(ConnectionLostError):
            while stranger.receive(LONG_S) is not None:
                pass
    friend.send(Frame(5, {}))
    assert friend.receive(LONG_S).kind == 5
    friend.close()
    listener.close()
    wait_for(lambda: caplog.records)
    assert [record.message.count("turned away") for record in caplog.records] == [1]


def test_a_friend_who_goes_mad_is_cut_off_alone_and_logged_once(address, caplog):
    listener = open_listener(address, echo, HOST, secret=SECRET)
    mad, friend = (open_connection(listener.address, ROUTER, secret=SECRET, timeout_s=LONG_S) for _ in range(2))
    noise = b"DSM1 and then something else altogether"
    with caplog.at_level(logging.WARNING):
        if address.startswith(("unix", "tcp")):
            mad._socket.sendall(noise)
        else:
            mad._sent.put(noise, len(noise), LONG_S)
        with pytest.raises(ConnectionLostError):
            mad.receive(LONG_S)
    friend.send(Frame(5, {}))
    assert friend.receive(LONG_S).kind == 5
    assert len(caplog.records) == 1
    assert "r1" in caplog.records[0].message and "cut off" in caplog.records[0].message
    listener.close()


def test_a_caller_who_says_nothing_is_given_up(address, caplog):
    listener = open_listener(address, echo, HOST, secret=SECRET, handshake_timeout_s=0.2)
    stranger = connect_raw(listener.address)[1]
    with pytest.raises(ConnectionLostError):
        stranger.receive(LONG_S)
    listener.close()
    assert [record.message.count("no hello in time") for record in caplog.records] == [1]


def test_a_listener_who_says_nothing_is_given_up(tmp_path):
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as tcp:
        unix.bind(f"{tmp_path}/s")
        tcp.bind(("127.0.0.1", 0))
        unix.listen()
        tcp.listen()
        host = f"127.0.0.1:{tcp.getsockname()[1]}"
        for address in (f"unix://{tmp_path}/s", f"tcp://{host}", f"grpc://{host}"):
            with pytest.raises(ConnectionLostError, match="in time"):
                open_connection(address, ROUTER, secret=SECRET, timeout_s=0.3)


def test_a_listener_who_does_not_know_the_secret_learns_nothing_from_asking(address):
    thief = open_listener(address, echo, HOST, secret=b"guess" * 4)
    with pytest.raises(HandshakeError, match="does not know the shared secret"):
        open_connection(thief.address, ROUTER, secret=SECRET, timeout_s=LONG_S)
    thief.close()


def test_nobody_there_is_an_error_that_names_the_address(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        for address in ("memory://nobody", f"unix://{tmp_path}/n", f"tcp://{host}", f"grpc://{host}"):
            with pytest.raises(ConnectionLostError, match=address):
                open_connection(address, ROUTER, secret=SECRET, timeout_s=LONG_S)


WRONG_ADDRESSES = [
    *("http://x", "/tmp/x", "unix://relative", "unix:///" + "d" * 120),
    *("grpc://127.0.0.1", "grpc://:1", "tcp://127.0.0.1:70000", "tcp://127.0.0.1"),
]


@pytest.mark.parametrize("address", WRONG_ADDRESSES)
def test_an_address_that_cannot_be_is_refused(address):
    for attempt in (
        lambda: open_connection(address, ROUTER, secret=SECRET, timeout_s=LONG_S),
        lambda: open_listener(address, echo, HOST, secret=SECRET),
    ):
        with pytest.raises(ConfigError):
            attempt()


def test_a_unix_socket_is_its_owners_alone_and_replaces_that_of_a_dead_process(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = open_listener(f"unix://{path}", echo, HOST, secret=SECRET)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
    open_connection(listener.address, ROUTER, secret=SECRET, timeout_s=LONG_S).close()
    listener.close()
    assert not path.exists()


def test_the_best_address_is_the_first_that_works_from_here(tmp_path):
    addresses = ("memory://elsewhere", "unix:///tmp/x.sock", "grpc://10.0.0.1:1")
    assert choose_address(addresses, peer_node_id="a", node_id="a") == "unix:///tmp/x.sock"
    assert choose_address(addresses, peer_node_id="a", node_id="b") == "grpc://10.0.0.1:1"
    assert choose_address(addresses, peer_node_id="a", node_id="a", same_node_transport=False) == "grpc://10.0.0.1:1"
    listener = open_listener("memory://elsewhere", echo, HOST, secret=SECRET)
    assert choose_address(addresses, peer_node_id="a", node_id="b") == "memory://elsewhere"
    listener.close()
    with pytest.raises(ConfigError, match="grpc"):
        choose_address(addresses[:2], peer_node_id="a", node_id="b")


def make_certificates(directory):
    """Make an authority and one certificate that it signed for this machine."""

    def write(name, data):
        path = directory / name
        path.write_bytes(data)
        return path

    def make(name, issuer_key, issuer_name):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        certificate = (
            x509.CertificateBuilder(issuer_name or subject, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=issuer_key is None, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .sign(issuer_key or key, hashes.SHA256())
        )
        return key, certificate

    authority_key, authority = make("authority", None, None)
    key, certificate = make("node", authority_key, authority.subject)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return TlsFiles(
        certificate=write("node.pem", certificate.public_bytes(serialization.Encoding.PEM)),
        key=write("node.key", private),
        authority=write("authority.pem", authority.public_bytes(serialization.Encoding.PEM)),
    )


def test_with_tls_only_those_with_a_certificate_of_the_authority_get_through(tmp_path):
    for name in ("ours", "others"):
        (tmp_path / name).mkdir()
    ours, others = make_certificates(tmp_path / "ours"), make_certificates(tmp_path / "others")
    listener = open_listener("grpc://127.0.0.1:0", echo, HOST, secret=SECRET, tls=ours)
    friend = open_connection(listener.address, ROUTER, secret=SECRET, timeout_s=LONG_S, tls=ours)
    friend.send(Frame(5, {}))
    assert friend.receive(LONG_S).kind == 5
    stranger = TlsFiles(certificate=others.certificate, key=others.key, authority=ours.authority)
    for tls in (None, others, stranger):
        with pytest.raises(ConnectionLostError):
            open_connection(listener.address, ROUTER, secret=SECRET, timeout_s=LONG_S, tls=tls)
    listener.close()
    with pytest.raises(ConfigError, match="knows no TLS"):
        open_connection("tcp://127.0.0.1:1", ROUTER, secret=SECRET, timeout_s=LONG_S, tls=ours)
    missing = TlsFiles(certificate=tmp_path / "no.pem", key=ours.key, authority=ours.authority)
    with pytest.raises(ConfigError, match=r"no\.pem"):
        open_connection("grpc://127.0.0.1:1", ROUTER, secret=SECRET, timeout_s=LONG_S, tls=missing)


def test_a_server_that_is_not_ours_is_not_talked_to():
    server = grpc.server(grpc_transport._ThreadPerStream())
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.raises(ConnectionLostError, match="UNIMPLEMENTED"):
        open_connection(f"grpc://127.0.0.1:{port}", ROUTER, secret=SECRET, timeout_s=LONG_S)
    server.stop(None).wait()
