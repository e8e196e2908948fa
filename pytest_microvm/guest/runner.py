"""The runner: a pytest process in the guest that collects once and runs the tests it is asked for.

The host speaks first. ``collect`` starts a pytest session that stays inside its test loop, where
``resume``, ``run`` and ``finish`` are answered; a clone of the machine continues in that very loop.
Replies and data are written from one thread, between tests, with names bound at import: a test may
replace ``sys.stdout``, ``json`` or ``os.write``, close descriptors, change directory or fork.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import os
import random
import sys
from typing import TYPE_CHECKING, Any

from pytest_microvm.guest.port import Port, open_port
from pytest_microvm.wire.channel import WINDOW, Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pytest_microvm.guest.runner_preload import HeldModules

_getpid = os.getpid
_exit = os._exit
_urandom = os.urandom
_encode = json.JSONEncoder(separators=(",", ":"), default=repr).encode
_HIGH_FD = 900  # above what a test closes when it closes "all" descriptors, below the usual limit


class Runner:
    """Serve one host on one port.

    Args:
        port: The connection to the host.
        resume: Called with a ``resume`` message before anything else runs in a clone.
        settle: Called once the machine holds what its clones shall have, before it is frozen, with a function
            that returns a loaded module by its name.

    Attributes:
        held: The modules that were imported ahead of the session, if any were.
    """

    def __init__(
        self,
        port: Port,
        resume: Callable[[dict[str, Any]], dict[str, Any]],
        settle: Callable[[Callable[[str], Any]], None] = lambda _loaded: None,
    ) -> None:
        self.port = port
        self.pid = _getpid()
        self.held: HeldModules | None = None
        self._resume = resume
        self._settle = settle
        self._queue: collections.deque[dict[str, Any]] = collections.deque()

    def next_request(self) -> dict[str, Any]:
        """Wait for the host's next request.

        Raises:
            EOFError: The host has closed the port.
        """
        self.port.flush()  # the hello, at the first call
        while not self._queue:
            self._receive()
        return self._queue.popleft()

    def reply(self, request: dict[str, Any], result: dict[str, Any]) -> None:
        """Answer ``request``."""
        self._send({"id": request.get("id"), "result": result})

    def refuse(self, request: dict[str, Any], kind: str, message: str) -> None:
        """Answer ``request`` with an error."""
        self._send({"id": request.get("id"), "error": {"type": kind, "message": message[:10_000]}})

    def open_stream(self, request: dict[str, Any]) -> int:
        """Open the stream that ``request`` names and return its number."""
        number = int(request["stream"])
        self.port.channel.open(number)
        return number

    def send_lines(self, stream: int, records: Iterable[dict[str, Any]]) -> None:
        """Send ``records`` as JSON lines on ``stream`` and close it."""
        data = memoryview("".join([encode(record) + "\n" for record in records]).encode("ascii"))
        channel = self.port.channel
        while data:
            sent = channel.write(stream, bytes(data[:WINDOW]))
            data = data[sent:]
            self.port.flush()
            if data and not sent:
                self._receive()  # the host grants more once it has read what was sent
        channel.close(stream)
        self.port.flush()

    def answer_resume(self, request: dict[str, Any]) -> None:
        """Make this clone its own: kernel entropy, clock, names, random numbers, what it is given."""
        result = self._resume(request)
        os.environ.update(request.get("environment", {}))
        reseed(self._loaded)
        self.reply(request, result)

    def settle(self) -> None:
        """Let loaded libraries forget what clones must not share."""
        self._settle(self._loaded)

    def leave_if_forked(self) -> None:
        """End a child process that a test forked and that ran on into the runner's code."""
        if _getpid() != self.pid:
            _exit(0)

    def _loaded(self, name: str) -> Any:
        return sys.modules.get(name) if self.held is None else self.held.get(name)

    def _receive(self) -> None:
        for event in self.port.receive():
            if isinstance(event, Message):
                self._queue.append(event.body)
        self.port.flush()

    def _send(self, body: dict[str, Any]) -> None:
        self.port.channel.send(body)
        self.port.flush()


def encode(value: object) -> str:
    """Return ``value`` as ASCII JSON on one line; what JSON cannot say becomes its ``repr``."""
    try:
        return _encode(value)
    except (TypeError, ValueError, RecursionError):
        return _encode(_plain(value))


def _plain(value: object, depth: int = 0) -> object:
    """Return ``value`` with keys that JSON allows and without cycles."""
    if depth > 20:  # noqa: PLR2004 - deeper than any report is
        return repr(value)[:1000]
    if isinstance(value, dict):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else repr(value)


def reseed(loaded: Callable[[str], Any]) -> None:
    """Give every random generator that clones share a seed of its own.

    Args:
        loaded: Returns a loaded module by its name, ``None`` for one that is not.
    """
    random.seed(_urandom(32))
    numpy = loaded("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        numpy.random.seed(int.from_bytes(_urandom(4), "little"))
    hypothesis = loaded("hypothesis.core")
    own = getattr(getattr(hypothesis, "threadlocal", None), "_hypothesis_global_random", None)
    if own is not None:
        own.seed(_urandom(32))
    names = getattr(loaded("tempfile"), "_name_sequence", None)
    if names is not None:
        names.rng.seed(_urandom(32))


def main(arguments: list[str]) -> int:
    """Serve on the port called ``runner``.

    Args:
        arguments: What follows the code folder on the command line: ``--fd N`` for a descriptor instead of
            the port, ``--preload`` to import what installed plug-ins import before the host is greeted.
    """
    fd = int(arguments[arguments.index("--fd") + 1]) if "--fd" in arguments else open_port("runner")
    from pytest_microvm.guest import resume  # noqa: PLC0415 - must be loaded before the code folder is left

    runner = Runner(Port(_out_of_the_way(fd), "runner"), resume.apply, resume.outdate_openssl)
    start(runner, preload="--preload" in arguments)
    return 0


def start(runner: Runner, *, preload: bool = False) -> None:
    """Load pytest, leave the code folder (``sys.path[0]``) and serve until the host has gone.

    Args:
        runner: The connection to the host.
        preload: Whether to import what installed plug-ins import, before the host is greeted.
    """
    code_folder = sys.path[0]
    serve, import_ahead = _import_session()
    _forget_own_code(code_folder)
    if preload:
        runner.held = import_ahead()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(runner)


def _out_of_the_way(fd: int) -> int:
    """Move ``fd`` above the numbers that tests close or reuse; no child process inherits it."""
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
    except OSError:  # the limit of descriptors is lower than usual
        os.set_inheritable(fd, False)
        return fd
    os.close(fd)
    return high


def _import_session() -> tuple[Callable[[Runner], None], Callable[[], HeldModules | None]]:
    """Return what serves the host, and what imports the plug-ins' modules ahead."""
    try:
        from pytest_microvm.guest import runner_session, runner_warm_up  # noqa: PLC0415 - they need pytest
    except ModuleNotFoundError as error:
        if error.name not in ("pytest", "_pytest"):
            raise
        return _serve_without_pytest, lambda: None
    runner_warm_up.warm_up()
    try:
        from pytest_microvm.guest import runner_preload  # noqa: PLC0415 - it needs pytest's internals
    except ImportError:  # another pytest than those we know: it imports plug-ins in the session
        return runner_session.serve, lambda: None
    return runner_session.serve, runner_preload.preload


def _serve_without_pytest(runner: Runner) -> None:
    """Tell the host that there is no pytest here, however often it asks."""
    while True:
        request = runner.next_request()
        if request.get("op") == "resume":
            runner.answer_resume(request)
        elif request.get("op") == "collect":
            stream = runner.open_stream(request)
            runner.send_lines(
                stream, [{"k": "exit", "code": 4, "reason": "no pytest", "text": sys.executable}]
            )
            runner.reply(request, {})
        else:
            runner.refuse(request, "NoPytest", "this machine's Python has no pytest")


def _forget_own_code(code_folder: str) -> None:
    """Leave no name of ours where the project looks for its own modules."""
    sys.path[:] = [entry for entry in sys.path if entry != code_folder]
    own = [name for name in sys.modules if name.partition(".")[0] == "pytest_microvm"]
    _KEPT.extend(sys.modules.pop(name) for name in own)


_KEPT: list[object] = []  # modules that are no longer in sys.modules but still run
