"""What every transport keeps to: frames arrive whole and in order, limits hold, and the loss of a peer is noticed."""

import contextlib
import itertools
import logging
import threading

import pytest

from dsmoe_ray.errors import ConfigError, ConnectionLostError, FrameError, HandshakeError
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.handshake import Hello
from dsmoe_ray.serving.wire.transport import open_connection, open_listener
from tests.fakes.wire_peer import HOST, SECRET, wait_for

ROUTER = Hello(role="router", model_digest="m1", identity={"router_id": "r1"})
# Far longer than anything takes; a test that waits for it has failed.
LONG_S = 30.0
NUMBERS = itertools.count()


@pytest.fixture(params=["memory", "unix", "tcp", "grpc"])
def address(request, tmp_path):
    return {
        "memory": f"memory://test-{next(NUMBERS)}",
        "unix": f"unix://{tmp_path}/s",
        "tcp": "tcp://127.0.0.1:0",
        "grpc": "grpc://127.0.0.1:0",
    }[request.param]


class Peers:
    """A listener that hands its ends of connections to the test."""

    def __init__(self, address, **limits):
        self.ends = []
        self.arrived = threading.Semaphore(0)
        self.leave = threading.Event()
        self.listener = open_listener(address, self._keep, HOST, secret=SECRET, **limits)

    def _keep(self, connection):
        self.ends.append(connection)
        self.arrived.release()
        self.leave.wait(LONG_S)

    def connect(self, hello=ROUTER, secret=SECRET, **limits):
        ours = open_connection(self.listener.address, hello, secret=secret, timeout_s=LONG_S, **limits)
        assert self.arrived.acquire(timeout=LONG_S)
        return ours, self.ends[-1]


@pytest.fixture
def make_peers(address):
    with contextlib.ExitStack() as stack:

        def make(**limits):
            peers = Peers(address, **limits)
            stack.callback(peers.listener.close)
            stack.callback(peers.leave.set)
            return peers

        yield make


@pytest.fixture
def ends(make_peers):
    ours, theirs = make_peers().connect()
    yield ours, theirs
    ours.close()


def received(connection):
    frame = connection.receive(LONG_S)
    return frame.kind, frame.header, [bytes(payload) for payload in frame.payloads]


def test_a_frame_arrives_as_it_was_sent_in_both_directions(ends):
    header = {"text": "a", "n": -5, "big": 2**63, "pi": 3.25, "none": None, "list": (1, [True, b"x"]), "map": {"a": 1}}
    payloads = [b"", b"x", bytes(range(256)) * 3, b"0123456789abcdef"]
    for sender, receiver in (ends, ends[::-1]):
        sender.send(Frame(7, header, payloads))
        kind, found, parts = received(receiver)
        assert (kind, parts) == (7, payloads)
        assert found == {**header, "list": [1, [True, b"x"]]}


def test_each_end_knows_who_the_other_is(ends):
    ours, theirs = ends
    assert ours.peer == {"role": "host", "model_digest": "m1", "host_id": "h1"}
    assert theirs.peer == {"role": "router", "model_digest": "m1", "router_id": "r1"}


def test_payloads_may_be_changed_after_sending(ends):
    ours, theirs = ends
    payload = bytearray(b"before" * 1000)
    ours.send(Frame(1, {}, [memoryview(payload)]))
    payload[:6] = b"after!"
    assert received(theirs)[2] == [b"before" * 1000]


def test_frames_of_all_sizes_arrive_whole_and_in_order_while_both_ends_talk(ends):
    sizes = [0, 1, 15, 16, 17, 1000, 65_500, 65_536, 70_000, 1 << 20, 3, 5 << 20, 40, 200_000, 9]

    def talk(connection):
        for number, size in enumerate(sizes):
            connection.send(Frame(number, {"size": size}, [bytes([number]) * size, b"end"]))

    talkers = [threading.Thread(target=talk, args=(end,)) for end in ends]
    for talker in talkers:
        talker.start()
    listening = {id(end): [] for end in ends}

    def listen(connection):
        for _ in sizes:
            listening[id(connection)].append(received(connection))

    listeners = [threading.Thread(target=listen, args=(end,)) for end in ends]
    for thread in listeners:
        thread.start()
    for thread in [*talkers, *listeners]:
        thread.join(LONG_S)
    wanted = [(n, {"size": size}, [bytes([n]) * size, b"end"]) for n, size in enumerate(sizes)]
    assert all(found == wanted for found in listening.values())


def test_frames_of_several_senders_are_not_mixed(ends):
    ours, theirs = ends
    num_senders, num_frames = 4, 50

    def talk(sender):
        for number in range(num_frames):
            ours.send(Frame(sender, {"number": number}, [bytes([sender]) * (number * 997)] * 2))

    senders = [threading.Thread(target=talk, args=(sender,)) for sender in range(num_senders)]
    for sender in senders:
        sender.start()
    numbers = {sender: [] for sender in range(num_senders)}
    for _ in range(num_senders * num_frames):
        kind, header, payloads = received(theirs)
        assert payloads == [bytes([kind]) * (header["number"] * 997)] * 2
        numbers[kind].append(header["number"])
    assert all(found == list(range(num_frames)) for found in numbers.values())


@pytest.mark.parametrize("timeout_s", [0, 0.01])
def test_receive_gives_up_in_time_and_goes_on_later(ends, timeout_s):
    ours, theirs = ends
    assert theirs.receive(timeout_s) is None
    ours.send(Frame(1, {"a": 1}))
    assert received(theirs) == (1, {"a": 1}, [])
    assert theirs.receive(timeout_s) is None


def test_frames_sent_before_an_end_closes_still_arrive(ends):
    ours, theirs = ends
    ours.send(Frame(1, {}))
    ours.send(Frame(2, {}, [b"x" * 100_000]))
    ours.close()
    assert [received(theirs)[0] for _ in range(2)] == [1, 2]
    for _ in range(2):
        with pytest.raises(ConnectionLostError):
            theirs.receive(LONG_S)


def test_a_closed_connection_is_lost_for_both_ends(ends):
    ours, theirs = ends
    theirs.close()
    theirs.close()
    for end in ends:
        with pytest.raises(ConnectionLostError):
            end.receive(LONG_S)
    # The closed end knows at once, the other by the time it has received the news.
    for end in (theirs, ours):
        with pytest.raises(ConnectionLostError):
            end.send(Frame(1, {}))


@pytest.mark.parametrize("closer", [0, 1], ids=["own end", "other end"])
def test_closing_wakes_a_thread_that_receives(ends, closer):
    receiving, errors = threading.Event(), []

    def receive():
        receiving.set()
        try:
            ends[0].receive()
        except ConnectionLostError as error:
            errors.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    assert receiving.wait(LONG_S)
    ends[closer].close()
    thread.join(LONG_S)
    assert len(errors) == 1


def test_closing_the_listener_ends_its_connections_and_frees_the_address(make_peers, address):
    peers = make_peers()
    ours, _ = peers.connect()
    peers.listener.close()
    with pytest.raises(ConnectionLostError):
        ours.receive(LONG_S)
    with pytest.raises(ConnectionLostError):
        open_connection(peers.listener.address, ROUTER, secret=SECRET, timeout_s=LONG_S)
    make_peers().connect()[0].close()


def test_a_peer_that_reads_nothing_is_given_up(make_peers):
    ours, _ = make_peers().connect(send_timeout_s=0.2)
    with pytest.raises(ConnectionLostError, match="hung"):
        for _ in range(1000):
            ours.send(Frame(1, {}, [bytes(1 << 20)]))
    with pytest.raises(ConnectionLostError):
        ours.receive(LONG_S)


def test_the_smaller_limit_of_both_ends_holds_and_the_connection_survives_it(make_peers):
    ours, theirs = make_peers(max_frame_bytes=100_000).connect(max_frame_bytes=300_000)
    for end in (ours, theirs):
        with pytest.raises(FrameError, match=r"more than the 100000.*max_frame_bytes"):
            end.send(Frame(1, {}, [bytes(100_000)]))
    ours.send(Frame(1, {}, [bytes(99_000)]))
    assert len(received(theirs)[2][0]) == 99_000


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (Frame(1, {"x": object()}), "plain values"),
        (Frame(1, {"x": "y" * (1 << 20)}), "1048576"),
        (Frame(1, {}, [b"x"] * 65), "64"),
        (Frame(1, {}, [memoryview(b"abcd")[::2]]), "contiguous"),
    ],
    ids=["objects", "long header", "many payloads", "not contiguous"],
)
def test_a_frame_that_cannot_be_sent_harms_nothing(ends, frame, message):
    ours, theirs = ends
    with pytest.raises(FrameError, match=message):
        ours.send(frame)
    ours.send(Frame(2, {}))
    assert received(theirs)[0] == 2


@pytest.mark.parametrize(
    ("hello", "secret", "message"),
    [
        (ROUTER, b"f" * 32, "secret"),
        (Hello(role="router", model_digest="m1", version=99), SECRET, "version 1.*99|version 99.*1"),
        (Hello(role="router", model_digest="m2"), SECRET, "m1.*m2|m2.*m1"),
        (Hello(role="gateway", model_digest="m1"), SECRET, "gateway"),
    ],
    ids=["secret", "version", "model", "role"],
)
def test_a_stranger_is_refused_at_both_ends_and_others_stay(make_peers, caplog, hello, secret, message):
    peers = make_peers()
    ours, theirs = peers.connect()
    with caplog.at_level(logging.WARNING), pytest.raises(HandshakeError, match=message):
        peers.connect(hello, secret)
    ours.send(Frame(1, {}))
    assert received(theirs)[0] == 1
    wait_for(lambda: caplog.records)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.records[0].message.count("turned away") == 1
    assert SECRET.decode() not in caplog.text


def test_two_listeners_cannot_share_an_address(make_peers):
    taken = make_peers().listener.address
    with pytest.raises(ConfigError, match="listen"):
        open_listener(taken, print, HOST, secret=SECRET)


def test_a_secret_that_can_be_guessed_is_refused(address):
    with pytest.raises(ValueError, match="at least 16 bytes; found 5"):
        open_connection(address, ROUTER, secret=b"short", timeout_s=LONG_S)


def test_a_handler_that_cannot_use_a_message_loses_only_its_connection(address, caplog):
    def handle(connection):
        frame = connection.receive(LONG_S)
        if frame.kind == 1:
            raise FrameError("layer must be an integer; found 'x'")
        connection.send(frame)

    listener = open_listener(address, handle, HOST, secret=SECRET)
    good, bad = (open_connection(listener.address, ROUTER, secret=SECRET, timeout_s=LONG_S) for _ in range(2))
    bad.send(Frame(1, {}))
    with pytest.raises(ConnectionLostError):
        bad.receive(LONG_S)
    good.send(Frame(2, {}))
    assert received(good)[0] == 2
    assert [record.message.count("layer must be") for record in caplog.records if record.levelname == "WARNING"] == [1]
    listener.close()
