"""The QMP client against a peer that plays a script on the other end of a socket pair."""

import contextlib
import json
import os
import socket
import threading

import pytest

from pytest_microvm.hypervisors.qemu.qmp import Qmp, QmpError

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2}}, "capabilities": []}}


class Peer:
    """Answers each command with the next entry of its script; keeps what it was sent."""

    def __init__(self, sock, script):
        self.commands = []
        self.descriptors = []
        self._sock = sock
        self._script = script
        self._thread = threading.Thread(target=self._play)
        self._thread.start()

    def _play(self):
        with self._sock:
            for number, answers in enumerate(self._script):
                if number:
                    data, fds, _flags, _address = socket.recv_fds(self._sock, 65536, 4)
                    self.commands.append(json.loads(data))
                    self.descriptors += fds
                for answer in answers:
                    raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\r\n"
                    self._sock.sendall(raw)

    def join(self):
        self._thread.join()


@pytest.fixture
def talk():
    """Start a peer with a script: first what it says unasked, then the answers to each command."""
    opened = []

    def start(*script, timeout=30.0):
        ours, theirs = socket.socketpair()
        qmp, peer = Qmp(ours, timeout), Peer(theirs, script)
        opened.append((qmp, peer))
        return qmp, peer

    yield start
    for qmp, peer in opened:
        qmp.close()
        peer.join()
        for fd in peer.descriptors:
            os.close(fd)


def event(name, **data):
    return {"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}}


def test_greeting_and_a_command(talk):
    qmp, peer = talk([GREETING], [{"return": {}}], [{"return": {"status": "running"}}])
    qmp.greet()
    assert qmp.execute("query-status") == {"status": "running"}
    assert [command["execute"] for command in peer.commands] == ["qmp_capabilities", "query-status"]


def test_events_in_between_are_kept(talk):
    qmp, _peer = talk(
        [GREETING], [event("RESUME"), {"return": {}}], [event("STOP"), event("X", a=1), {"return": 7}]
    )
    qmp.greet()
    assert qmp.execute("stop") == 7
    assert [entry["event"] for entry in qmp.events] == ["RESUME", "STOP", "X"]


def test_wait_event_returns_the_first_match_even_an_earlier_one(talk):
    qmp, _peer = talk(
        [],
        [event("MIGRATION", status="setup"), event("MIGRATION", status="completed"), {"return": {}}],
        [{"return": {}}, event("OTHER"), event("MIGRATION", status="failed")],
    )

    def ended(data):
        return data["status"] in ("completed", "failed")

    qmp.execute("migrate")
    assert qmp.wait_event("MIGRATION", ended) == {"status": "completed"}
    qmp.execute("migrate")
    assert qmp.wait_event("MIGRATION", ended) == {"status": "failed"}


def test_a_refusal_names_command_and_reason(talk):
    qmp, _peer = talk([], [{"error": {"class": "GenericError", "desc": "No such capability"}}])
    with pytest.raises(QmpError, match="refused migrate: No such capability"):
        qmp.execute("migrate")


def test_a_descriptor_is_passed(talk, tmp_path):
    qmp, peer = talk([], [{"return": {}}])
    state = tmp_path / "state"
    with state.open("wb") as file:
        qmp.execute("getfd", {"fdname": "state"}, fd=file.fileno())
        peer.join()
        os.write(peer.descriptors[0], b"written by the peer")
        assert state.read_text() == "written by the peer"
    assert peer.commands == [{"execute": "getfd", "arguments": {"fdname": "state"}}]


def test_the_end_while_waiting(talk):
    qmp, peer = talk([], [])
    with pytest.raises(QmpError, match="QEMU has ended"):
        qmp.execute("stop")
    peer.join()
    with pytest.raises(QmpError, match="QEMU is gone"):
        qmp.execute("stop")


def test_an_answer_that_does_not_come():
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(QmpError, match="did not answer within"):
        Qmp(ours, timeout=0.05).execute("stop")


def test_an_answer_in_pieces_and_answers_in_one_piece(talk):
    whole = json.dumps({"return": {"x": "y"}}).encode() + b"\r\n"
    qmp, _peer = talk(
        [], [bytes([byte]) for byte in whole], [whole[:-2] + b"\n" + json.dumps(event("E")).encode() + b"\n"]
    )
    assert qmp.execute("one") == {"x": "y"}
    assert qmp.execute("two") == {"x": "y"}
    assert qmp.wait_event("E") == {}


@pytest.mark.parametrize(
    "garbage",
    [
        b"not json\n",
        b"[1, 2]\n",
        b'"text"\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b"x" * (1024 * 1024 + 1),
    ],
    ids=["words", "array", "string", "bytes", "deep", "endless"],
)
def test_garbage_is_an_error_of_ours(talk, garbage):
    qmp, _peer = talk([], [garbage])
    with pytest.raises(QmpError):
        qmp.execute("stop")


def test_a_peer_that_does_not_greet(talk):
    qmp, _peer = talk([{"return": {}}])
    with pytest.raises(QmpError, match="did not greet"):
        qmp.greet()


def test_draining_does_not_wait(talk):
    qmp, peer = talk([event("A"), event("SHUTDOWN", reason="guest-panic")])
    peer.join()
    assert [entry["event"] for entry in qmp.drain_events()] == ["A", "SHUTDOWN"]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Qmp(ours).drain_events() == []


@pytest.mark.parametrize("wait", ["execute", "wait_event"])
def test_a_flood_of_events_is_given_up(wait):
    """What a VMM can do that was taken over: always one event more."""
    ours, theirs = socket.socketpair()
    flood = json.dumps(event("RESUME")).encode() + b"\n"

    def pour():
        with contextlib.suppress(OSError):
            while True:
                theirs.sendall(flood * 100)

    pouring = threading.Thread(target=pour)
    pouring.start()
    qmp = Qmp(ours, 0.5)
    try:
        with pytest.raises(QmpError, match="did not answer"):
            getattr(qmp, wait)("MIGRATION")
        assert len(qmp.drain_events()) <= 256
    finally:
        qmp.close()
        pouring.join()
        theirs.close()


@pytest.mark.parametrize("line", [{"event": 5}, {"event": "STOP", "data": []}, {"event": ["STOP"]}])
def test_what_is_no_event(talk, line):
    qmp, _peer = talk([GREETING], [line])
    with pytest.raises(QmpError, match="no event"):
        qmp.greet()


def test_a_refusal_is_safe_to_show(talk):
    qmp, _peer = talk([GREETING], [{"error": {"desc": "no\x1b]0;owned\x07\n::error::x"}}])
    with pytest.raises(QmpError) as caught:
        qmp.greet()
    assert not set(str(caught.value)) & set("\x1b\x07\n")
