"""The host's link over a socket, with the guest's own port code on the other end."""

import contextlib
import io
import os
import resource
import socket
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pytest

from pytest_microvm.agent import link as link_module
from pytest_microvm.agent.client import UnlimitedClient
from pytest_microvm.agent.drain import Drain
from pytest_microvm.agent.link import GuestError, Link
from pytest_microvm.agent.process import GuestProcess, StreamFile, command_arguments
from pytest_microvm.agent.reactor import reactor
from pytest_microvm.agent.streams import read_any
from pytest_microvm.agent.transfer import as_os_error, pull
from pytest_microvm.errors import MachineCrashed, MachineError, ProtocolViolation, TransferError
from pytest_microvm.guest.port import Port
from pytest_microvm.untrusted.redaction import Redactor
from pytest_microvm.wire.channel import GRANT, MAX_STREAMS, WINDOW, Closed, Credit, Data, Hello, Message
from pytest_microvm.wire.frames import MAX_PAYLOAD, Kind, encode
from support import guards

SOON = 0.05


class Guest:
    """The guest's end, driven step by step by a test."""

    def __init__(self, sock):
        sock.settimeout(guards.PROCESS)
        self.sock = sock
        self.port = Port(sock.fileno(), "agent")
        self.channel = self.port.channel
        self.events = []

    def next(self, kind):
        """Return the next event of ``kind``; those before it are dropped."""
        while True:
            while self.events:
                event = self.events.pop(0)
                if isinstance(event, kind):
                    return event
            self.events = list(self.port.receive())

    def open_with(self, message_key):
        """Take a request that names a stream, open it, return (request number, stream number)."""
        for event in self.port.receive():
            if isinstance(event, Message):
                self.channel.open(event.body[message_key])
                return event.body["id"], event.body[message_key]
        return self.open_with(message_key)

    def answer(self, number, **body):
        self.channel.send({"id": number, **body})
        self.port.flush()

    def write_all(self, stream, data):
        """Send ``data`` as credit comes, as the agent does."""
        while data:
            sent = self.channel.write(stream, data)
            data = data[sent:]
            self.port.flush()
            if data:
                self.next(Credit)


@pytest.fixture
def sockets():
    host, guest = socket.socketpair()
    with host, guest:
        yield host, guest


@pytest.fixture
def guest(sockets):
    return Guest(sockets[1])


@pytest.fixture
def link(sockets, guest):
    link = Link(sockets[0])
    guest.port.flush()
    link.wait_hello(guards.PROCESS)
    yield link
    link.close()


@pytest.fixture
def background():
    with ThreadPoolExecutor(4) as executor:
        yield executor.submit


def streamed(link, guest):
    """Return a stream and its number, open on both ends."""
    stream = link.open_stream()
    link.request("open", stream=stream.number)
    _, number = guest.open_with("stream")
    return stream, number


def failure_of(link):
    with link.changed:
        assert link.changed.wait_for(lambda: link.failure, guards.PROCESS)
        return link.failure


# Requests


def test_hello_both_ways(link, guest):
    assert link.wait_hello(guards.PROCESS).role == "agent"
    assert guest.next(Hello).role == "host"


def test_a_hello_that_does_not_come(sockets):
    link = Link(sockets[0])
    with pytest.raises(TimeoutError, match="no hello"):
        link.wait_hello(SOON)
    link.close()


def test_a_call_and_its_answer(link, guest, background):
    answer = background(link.call, "run", argv=["true"], timeout=guards.PROCESS)
    asked = guest.next(Message).body
    assert asked == {"id": 1, "op": "run", "argv": ["true"]}
    guest.answer(asked["id"], result={"returncode": 0})
    assert answer.result(guards.PROCESS) == {"returncode": 0}


def test_answers_find_their_requests_in_any_order(link, guest):
    requests = [link.request("op") for _ in range(3)]
    numbers = [guest.next(Message).body["id"] for _ in range(3)]
    for number in reversed(numbers):
        guest.answer(number, result={"was": number})
    assert [request.wait(guards.PROCESS)["was"] for request in requests] == numbers
    assert all(request.done for request in requests)


def test_an_error_keeps_its_kind_message_and_number(link, guest):
    request = link.request("stat")
    error = {"type": "FileNotFoundError", "message": "no such file: /x", "errno": 2}
    guest.answer(guest.next(Message).body["id"], error=error)
    with pytest.raises(GuestError, match="FileNotFoundError: no such file: /x") as caught:
        request.wait(guards.PROCESS)
    assert (caught.value.kind, caught.value.errno) == ("FileNotFoundError", 2)


@pytest.mark.parametrize(
    "error",
    [{}, {"type": None, "errno": "2"}, {"type": "x" * 10**5, "message": ["y"] * 10**5, "errno": True}],
)
def test_an_error_of_any_shape_is_bounded(link, guest, error):
    request = link.request("stat")
    guest.answer(guest.next(Message).body["id"], error=error)
    with pytest.raises(GuestError) as caught:
        request.wait(guards.PROCESS)
    assert len(str(caught.value)) < 11_000
    assert caught.value.errno == 0


@pytest.mark.parametrize("body", [{}, {"result": None}, {"result": [1]}, {"error": "text"}])
def test_an_answer_without_a_result_is_empty(link, guest, body):
    request = link.request("op")
    guest.answer(guest.next(Message).body["id"], **body)
    assert request.wait(guards.PROCESS) == {}


def test_a_wait_that_timed_out_can_be_taken_up_again(link, guest):
    request = link.request("slow")
    with pytest.raises(TimeoutError, match=r"no answer to 'slow' within 0\.05 s"):
        request.wait(SOON)
    assert not request.done
    guest.answer(guest.next(Message).body["id"], result={"late": True})
    assert request.wait(guards.PROCESS) == {"late": True}


def test_late_answer_after_a_timeout_is_ignored(link, guest):
    with pytest.raises(TimeoutError):
        link.call("slow", timeout=SOON)
    guest.answer(guest.next(Message).body["id"], result={})
    request = link.request("next")
    guest.answer(guest.next(Message).body["id"], result={"fine": True})
    assert request.wait(guards.PROCESS) == {"fine": True}


def test_a_guest_that_answers_nothing_does_not_use_up_the_host(link, monkeypatch):
    monkeypatch.setattr(link_module, "MAX_UNANSWERED", 3)
    for _ in range(3):
        link.request("op")
    with pytest.raises(MachineError, match="3 requests unanswered"):
        link.request("op")


def test_a_request_too_large_for_a_message(link, guest):
    with pytest.raises(ValueError, match="MESSAGE payload"):
        link.request("write", data="x" * MAX_PAYLOAD[Kind.MESSAGE])
    request = link.request("op")
    guest.answer(guest.next(Message).body["id"], result={})
    assert request.wait(guards.PROCESS) == {}


# Streams


def test_more_than_the_window_to_the_guest(link, guest, background):
    stream, number = streamed(link, guest)
    sent = os.urandom(3 * WINDOW + 12345)
    writing = background(stream.write, sent, guards.PROCESS)
    received = b""
    while len(received) < len(sent):
        data = guest.next(Data).data
        received += data
        guest.channel.consumed(number, len(data))
        guest.port.flush()
    writing.result(guards.PROCESS)
    stream.close()
    assert guest.next(Closed).stream == number
    assert received == sent


def test_more_than_the_window_from_the_guest(link, guest, background):
    stream, number = streamed(link, guest)
    sent = os.urandom(3 * WINDOW + 12345)
    reading = background(stream.read_all, len(sent), guards.PROCESS)
    guest.write_all(number, sent)
    guest.channel.close(number)
    guest.port.flush()
    assert reading.result(guards.PROCESS) == sent
    assert stream.read() == b""


def test_writer_stops_at_the_window_until_the_guest_reads(link, guest):
    stream, number = streamed(link, guest)
    with pytest.raises(TimeoutError, match=r"did not take everything within 0\.05 s"):
        stream.write(bytes(WINDOW + 1), SOON)
    received = 0
    while received < WINDOW:
        received += len(guest.next(Data).data)
    assert received == WINDOW
    guest.channel.consumed(number, GRANT)
    guest.port.flush()
    stream.write(b"x", guards.PROCESS)
    assert guest.next(Data).data == b"x"


def test_answers_to_others_do_not_prolong_a_writers_time(link, guest, background):
    stream, _ = streamed(link, guest)
    stream.write(bytes(WINDOW))
    writing = background(stream.write, b"x", 4 * SOON)
    while not writing.done():
        request = link.request("ping")
        guest.answer(guest.next(Message).body["id"], result={})
        request.wait(guards.PROCESS)
    with pytest.raises(TimeoutError):
        writing.result(guards.PROCESS)


def test_reading_waits_at_most_its_time(link, guest):
    stream, number = streamed(link, guest)
    with pytest.raises(TimeoutError, match=r"nothing came within 0\.05 s"):
        stream.read(timeout=SOON)
    guest.write_all(number, b"abc")
    assert stream.read(2, timeout=guards.PROCESS) == b"ab"
    assert stream.read(2, timeout=guards.PROCESS) == b"c"


def test_writing_to_a_guest_that_closed_is_a_broken_pipe(link, guest, background):
    stream, number = streamed(link, guest)
    writing = background(stream.write, bytes(WINDOW + 1), guards.PROCESS)
    received = 0
    while received < WINDOW:
        received += len(guest.next(Data).data)
    guest.channel.close(number)
    guest.port.flush()
    with pytest.raises(BrokenPipeError):
        writing.result(guards.PROCESS)


def test_writing_after_closing_this_end_is_a_value_error(link, guest):
    stream, _ = streamed(link, guest)
    stream.close()
    with pytest.raises(ValueError, match="closed for writing"):
        stream.write(b"x", guards.PROCESS)


def test_closing_wakes_a_writer_in_another_thread(link, guest, background):
    stream, _ = streamed(link, guest)
    stream.write(bytes(WINDOW))
    started = threading.Event()

    def write():
        started.set()
        stream.write(b"x", guards.PROCESS)

    writing = background(write)
    assert started.wait(guards.PROCESS)
    stream.close()
    with pytest.raises(ValueError, match="closed for writing"):
        writing.result(guards.PROCESS)


def test_file_that_becomes_garbage_under_a_lock_is_closed(link, guest):
    """Garbage is collected at any allocation: here while the I/O thread's registrations are changed."""
    stream, number = streamed(link, guest)
    files = [
        StreamFile(
            stream, "w", explained=contextlib.nullcontext, count=lambda _data: None, redactor=Redactor()
        )
    ]

    def collect():
        with link.reactor._lock:
            link._events = None  # the socket is full, say: what is sent has to be registered for
            files.clear()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(guards.PROCESS)
    assert not thread.is_alive()
    assert guest.next(Closed).stream == number


def test_discarding_lets_the_guest_finish(link, guest):
    stream, number = streamed(link, guest)
    guest.write_all(number, bytes(WINDOW))
    stream.discard()
    guest.write_all(number, bytes(2 * WINDOW))
    guest.channel.close(number)
    guest.port.flush()
    request = link.request("sync")
    guest.answer(guest.next(Message).body["id"], result={})
    request.wait(guards.PROCESS)
    assert link.channel.open_streams == 0


def test_discarding_what_the_guest_closed_already(link, guest):
    stream, number = streamed(link, guest)
    guest.write_all(number, b"abc")
    guest.channel.close(number)
    guest.port.flush()
    assert guest.next(Closed).stream == number
    stream.discard()
    stream.close()
    assert stream.read() == b""
    assert link.failure is None


def test_whichever_stream_has_something_is_read(link, guest, background):
    first, first_number = streamed(link, guest)
    second, second_number = streamed(link, guest)
    with pytest.raises(TimeoutError, match="nothing came"):
        read_any([first, second], SOON)
    reading = background(read_any, [first, second], guards.PROCESS)
    guest.write_all(second_number, b"second")
    assert reading.result(guards.PROCESS) == [(second, b"second")]
    guest.channel.close(first_number)
    guest.port.flush()
    assert read_any([first, second], guards.PROCESS) == [(first, b"")]
    guest.sock.close()
    with pytest.raises(MachineCrashed):
        read_any([second], guards.PROCESS)


def test_more_than_is_allowed_ends_the_machine(sockets, guest):
    ended = threading.Event()
    link = Link(sockets[0], ended.set)
    guest.port.flush()
    stream, number = streamed(link, guest)
    guest.write_all(number, b"x" * 11)
    with pytest.raises(ProtocolViolation, match="more than the 10 bytes"):
        stream.read_all(10, guards.PROCESS)
    assert ended.is_set()
    assert isinstance(link.failure, ProtocolViolation)


def test_streams_a_guest_never_closes_are_bounded(link):
    for _ in range(MAX_STREAMS):
        link.open_stream()
    with pytest.raises(MachineError, match=f"{MAX_STREAMS} streams are open"):
        link.open_stream()


def test_a_stream_the_guest_never_accepted_is_forgotten(link):
    stream = link.open_stream()
    link.forget(stream)
    assert link.channel.open_streams == 0
    with pytest.raises(BrokenPipeError):
        stream.write(b"x", guards.PROCESS)
    stream.close()
    stream.discard()


# The end


def test_the_machines_end_wakes_everyone(link, guest, background):
    stream, _ = streamed(link, guest)
    other = link.open_stream()
    other.write(bytes(WINDOW))
    request = link.request("op")
    waiting = [
        background(request.wait, guards.PROCESS),
        background(stream.read, 1, guards.PROCESS),
        background(other.write, b"x", guards.PROCESS),
        background(stream.read_all, 10, guards.PROCESS),
    ]
    guest.sock.close()
    for future in waiting:
        with pytest.raises(MachineCrashed):
            future.result(guards.PROCESS)
    assert request.done
    for use in (lambda: link.request("op"), link.open_stream, lambda: link.wait_hello(1)):
        with pytest.raises(MachineCrashed):
            use()
    stream.close()
    stream.discard()


def test_what_came_before_the_end_can_still_be_read(link, guest):
    stream, number = streamed(link, guest)
    guest.write_all(number, b"last words")
    guest.sock.close()
    failure_of(link)
    assert stream.read(timeout=guards.PROCESS) == b"last words"
    with pytest.raises(MachineCrashed):
        stream.read(timeout=guards.PROCESS)


def test_closing_the_link_wakes_pending_calls(link, background):
    waiting = background(link.call, "op", timeout=guards.PROCESS)
    link.close()
    link.close()
    with pytest.raises(MachineCrashed):
        waiting.result(guards.PROCESS)


VIOLATIONS = {
    "garbage": lambda guest: guest.sock.sendall(b"\xff" * 100),
    "unknown request": lambda guest: guest.answer(99, result={}),
    "second answer": lambda guest: (guest.answer(1, result={}), guest.answer(1, result={})),
    "number that is true": lambda guest: guest.answer(True, result={}),
    "number that is text": lambda guest: guest.answer("1", result={}),
    "no number": lambda guest: (guest.channel.send({}), guest.port.flush()),
    "unknown stream": lambda guest: (guest.channel.open(77), guest.write_all(77, b"x")),
}


@pytest.mark.parametrize("violate", VIOLATIONS.values(), ids=VIOLATIONS)
def test_a_guest_that_breaks_the_protocol(sockets, guest, violate):
    ended = threading.Semaphore(0)
    link = Link(sockets[0], ended.release)
    guest.port.flush()
    request = link.request("op")
    violate(guest)
    assert ended.acquire(timeout=guards.PROCESS)
    assert isinstance(failure_of(link), ProtocolViolation)
    assert "broke the protocol" in str(link.failure)
    if request.reply is None:
        with pytest.raises(ProtocolViolation):
            request.wait(guards.PROCESS)
    link.close()
    assert not ended.acquire(blocking=False)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_links_fault_stays_its_own(link, guest):
    def fail():
        raise RuntimeError("a fault in the caller's code")

    host, other = socket.socketpair()
    with other:
        faulty = Link(host, fail)
        other.sendall(b"\xff" * 9)
        assert isinstance(failure_of(faulty), ProtocolViolation)
        assert other.recv(4096)  # the hello
        assert other.recv(4096) == b""
    request = link.request("still there?")
    guest.answer(guest.next(Message).body["id"], result={})
    assert request.wait(guards.PROCESS) == {}


def test_links_come_and_go_while_others_talk(link, guest, background):
    """Descriptor numbers are reused at once; nothing may be read by the link that had one before."""

    def come_and_go():
        for _ in range(200):
            host, other = socket.socketpair()
            with other:
                other_guest = Guest(other)
                short = Link(host)
                other_guest.port.flush()
                assert short.wait_hello(guards.PROCESS).role == "agent"
                request = short.request("op")
                other_guest.answer(other_guest.next(Message).body["id"], result={"here": True})
                assert request.wait(guards.PROCESS) == {"here": True}
                other.sendall(b"\x00")  # under way while this end closes
                short.close()

    working = [background(come_and_go) for _ in range(3)]
    for turn in range(300):
        request = link.request("op")
        guest.answer(guest.next(Message).body["id"], result={"turn": turn})
        assert request.wait(guards.PROCESS) == {"turn": turn}
    for future in working:
        future.result(guards.PROCESS)


def test_no_descriptor_and_no_callback_is_left_behind():
    def use():
        host, other = socket.socketpair()
        with other:
            Link(host).close()
        host, other = socket.socketpair()
        with other:
            Drain(host).close()

    use()  # the I/O thread has started
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    watched_before = len(reactor()._selector.get_map())
    for _ in range(20):
        use()
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before
    assert len(reactor()._selector.get_map()) == watched_before


def test_an_idle_link_costs_no_cpu(link, guest):
    stream, _ = streamed(link, guest)
    with pytest.raises(TimeoutError):  # a writer at the window, with the guest not reading
        stream.write(bytes(WINDOW + 1), SOON)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(TimeoutError):
        stream.read(timeout=0.5)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.25


# Consoles


def test_a_drain_keeps_the_tail(sockets):
    drain = Drain(sockets[0], size=100)
    text = b"".join(b"line %d\n" % number for number in range(50_000))
    sockets[1].sendall(text)
    sockets[1].close()
    assert drain.tail() == text[-100:]
    drain.close()
    assert drain.tail() == text[-100:]


def test_a_drain_reads_what_is_there_when_asked(sockets):
    drain = Drain(sockets[0])
    assert drain.tail() == b""
    sockets[1].sendall(b"panic")
    assert drain.tail() == b"panic"
    drain.close()


# Hostile answers


@pytest.mark.parametrize(
    ("error", "brief", "number"),
    [
        ({"type": "OSError", "message": "\x1b[2Jgone", "errno": 2}, r"OSError: \x1b[2Jgone", 2),
        ({"type": "\ud800\n::error::x", "message": "\u202e"}, r"\ud800\n::error::x: \u202e", 0),
        ({"type": "x", "message": "::error::y"}, r"x: :\:error::y", 0),
        ({"type": ["x"], "message": {"a": 1}, "errno": "2"}, "Error: ", 0),
        ({"type": "x", "message": "y", "errno": 10**30}, "x: y", 0),
        ({"type": "x", "message": "y", "errno": True}, "x: y", 0),
    ],
)
def test_an_error_of_the_guest_is_safe_to_show(link, guest, error, brief, number):
    request = link.request("op")
    guest.answer(guest.next(Message).body["id"], error=error)
    with pytest.raises(GuestError) as caught:
        request.wait(guards.PROCESS)
    assert (caught.value.brief, caught.value.errno) == (brief, number)
    assert isinstance(as_os_error(caught.value, "/x"), Exception)


def test_a_guest_that_reads_nothing_does_not_make_the_host_queue(link, guest):
    """Single bytes on a stream that is thrown away: each was answered with a longer grant."""
    stream, number = streamed(link, guest)
    stream.discard()
    frame = encode(Kind.DATA, number, b"x")
    for _ in range(2 * WINDOW // 1000):
        guest.sock.sendall(frame * 1000)
    assert link.failure is None
    assert link.channel.queued < 4096


def answering(link, guest, background, result, work):
    """Do ``work`` in a thread while the guest answers its first request with ``result``."""
    doing = background(work)
    guest.answer(guest.next(Message).body["id"], result=result)
    return doing


@pytest.mark.parametrize(
    "result", [{}, {"pid": "1"}, {"pid": None}, {"pid": -1}, {"pid": 10**30}, {"pid": [1]}, "text"], ids=str
)
def test_a_command_started_with_a_wrong_answer_ends_the_machine(link, guest, background, result):
    request = command_arguments(["true"], {}, None, None)
    doing = answering(
        link,
        guest,
        background,
        result,
        lambda: GuestProcess(UnlimitedClient(link), ["true"], request, stdin=False, text=True, pty=None),
    )
    with pytest.raises(ProtocolViolation, match="'pid' that is no whole number"):
        doing.result(guards.PROCESS)
    assert isinstance(link.failure, ProtocolViolation)


@pytest.mark.parametrize(
    "result",
    [{}, {"kind": "device"}, {"kind": ["file"], "mode": 0}, {"kind": "file"}, {"kind": "file", "mode": "0"}],
    ids=str,
)
def test_pull_with_an_invalid_answer_is_a_protocol_violation(link, guest, background, result, tmp_path):
    doing = answering(
        link, guest, background, result, lambda: pull(link, PurePosixPath("/x"), tmp_path / "x")
    )
    with pytest.raises(ProtocolViolation):
        doing.result(guards.PROCESS)
    assert list(tmp_path.iterdir()) == []


def test_pull_of_a_file_onto_a_folder_is_a_transfer_error(link, guest, background, tmp_path):
    """What is where, in the archive, is the guest's choice: it must not be able to raise what it likes."""
    (tmp_path / "x" / "f").mkdir(parents=True)
    (tmp_path / "x" / "f" / "precious").touch()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as made:
        made.addfile(tarfile.TarInfo("f"))
    found = {"kind": "directory", "mode": 0o755}
    doing = answering(link, guest, background, found, lambda: pull(link, PurePosixPath("/x"), tmp_path))
    number, stream = guest.open_with("stream")
    guest.write_all(stream, archive.getvalue())
    guest.channel.close(stream)
    guest.answer(number, result={})
    with pytest.raises(TransferError, match="cannot put what the machine sent in its place"):
        doing.result(guards.PROCESS)
    assert [path.name for path in (tmp_path / "x").rglob("*")] == ["f", "precious"]
