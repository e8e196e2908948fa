"""The host's side of a runner's protocol: its start command, requests and answers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pytest_microvm.agent.link import GuestError, Link
from pytest_microvm.agent.streams import Stream
from pytest_microvm.errors import MachineError, ProtocolViolation, QuotaExceeded
from pytest_microvm.suite import checks
from pytest_microvm.suite.backend import CollectPlan, TestLimits

MAX_COLLECTION = 256 * 1024 * 1024
_REPORT_OVERHEAD = 64 * 1024 * 1024  # bytes that a test's reports may have besides its output
_FINISH_TIMEOUT = 30.0
_NOT_OF_THE_TEST = frozenset(["debug", "out"])  # records with which a person, or this terminal, takes time
_BEGIN_TIMEOUT = 60.0  # seconds for a runner to acknowledge a test; about 0.01 under emulation

Wide = Literal["repeat", "tell", "standing"]
"""What a machine does with wide fixtures (see ``guest/runner_wide.py``)."""

BOOTSTRAP = (
    "import sys; sys.path[0] = sys.argv.pop(1); import pytest_microvm.guest.runner as runner; "
    "sys.exit(runner.main(sys.argv[1:]))"
)


def runner_command(
    python: str, code_folder: str, fd: int | None = None, *, preload: bool = False, coverage: bool = False
) -> list[str]:
    """Return the command that starts a runner.

    Args:
        python: The guest's own Python, which has the project's dependencies.
        code_folder: The guest's folder that contains ``pytest_microvm`` (guest and wire).
        fd: The descriptor to serve on instead of the port called ``runner``.
        preload: Whether it imports the installed plug-ins' modules before its hello.
        coverage: Whether it imports coverage before that.
    """
    options = [] if fd is None else ["--fd", str(fd)]
    if preload:
        options.append("--preload")
    if coverage:
        options.append("--coverage")
    return [python, "-c", BOOTSTRAP, code_folder, *options]


class RunnerSession:
    """A client for one runner, with one request at a time.

    Args:
        link: The connection to the runner.
        capture: pytest's ``--capture`` (``no``, ``tee-sys``), if it sends output while a test runs.
        temporary: Whether the runner reports the temporary folders of each test.
    """

    def __init__(self, link: Link, capture: str | None = None, *, temporary: bool = False) -> None:
        self._link = link
        self._capture = capture
        self._temporary = temporary

    def collect(self, plan: CollectPlan) -> bytes:
        """Make the runner collect, and return its records as it sent them.

        Raises:
            QuotaExceeded: It took longer than ``plan.timeout``.
            MachineError: The machine ended, or broke the protocol.
        """
        stream = self._link.open_stream()
        started = time.monotonic()
        request = self._link.request(
            "collect",
            stream=stream.number,
            args=list(plan.arguments),
            cwd=str(plan.directory),
            top=str(plan.workspace),
            whole=plan.whole,
            debug=plan.debug,
            coverage=plan.coverage,
            folders=[str(folder) for folder in plan.folders],
            outside=[[str(path), is_folder] for path, is_folder in plan.outside],
            env=dict(plan.environment),
        )
        try:
            data = stream.read_all(MAX_COLLECTION, plan.timeout)
            request.wait(_left(started, plan.timeout))
        except TimeoutError:
            raise QuotaExceeded(
                "timeout", plan.timeout, time.monotonic() - started, details="while collecting the tests"
            ) from None
        except GuestError as error:
            raise _refused(error) from None
        return data

    def run(
        self, item: int, following: int | None, limits: TestLimits, wide: Wide = "repeat", shown: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Start a test in the runner and return an iterator over its records, received while iterating.

        Once this has returned, the test has started: any later failure is the test's.

        Args:
            item: The test's position in the guest's list.
            following: The position of the test that this machine runs next, if any.
            limits: Its limits on time, output and number of processes.
            wide: What to do with wide fixtures (see ``guest/runner_wide.py``).
            shown: Number of the last set-ups of wide fixtures whose output is shown with the test.

        Raises:
            QuotaExceeded: While iterating: it took longer, or printed more.
            MachineError: The machine ended, or broke the protocol.
        """
        own = {"pids": limits.pids, "limited": limits.counted, "wide": wide, "shown": shown}
        return self._begin("run", limits, item=item, next=following, **own)

    def prepare(self, item: int, count: int, limits: TestLimits) -> Iterator[dict[str, Any]]:
        """Set up the first ``count`` wide fixtures of a test; return an iterator like :meth:`run`."""
        return self._begin("prepare", limits, item=item, count=count)

    def tear_down(self, item: int, following: int | None, limits: TestLimits) -> Iterator[dict[str, Any]]:
        """Tear down the wide fixtures that the test after ``item`` does not need; as :meth:`run`."""
        return self._begin("tear down", limits, item=item, next=following)

    def _begin(self, what: str, limits: TestLimits, **request: Any) -> Iterator[dict[str, Any]]:
        streams = [self._link.open_stream()]
        if self._capture is not None:
            streams.insert(0, self._link.open_stream())
            request.update(live=streams[0].number, capture=self._capture)
        try:
            self._link.call(
                what,
                timeout=_BEGIN_TIMEOUT,
                stream=streams[-1].number,
                output=limits.output,
                temporary=self._temporary,
                **request,
            )
        except GuestError as error:
            raise _refused(error) from None
        except TimeoutError:
            raise MachineError(f"the machine did not begin the test within {_BEGIN_TIMEOUT:.0f} s") from None
        return _records(streams, limits.timeout, limits.output)

    def resume(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a clone its new identity (see ``guest/resume.py``).

        Raises:
            TimeoutError: The clone did not answer.
            MachineError: The machine ended, or refused.
        """
        return self._link.call("resume", timeout=timeout, **message)

    def finish(self, *, session: bool) -> bytes:
        """Return the record of what the guest's plug-ins send to the controller.

        Args:
            session: Whether its pytest session must finish, even if it can tell that without.

        Raises:
            TimeoutError: It did not end in time.
            MachineError: The machine ended first, or sent too much.
        """
        stream = self._link.open_stream()
        request = self._link.request("finish", stream=stream.number, session=session)
        data = stream.read_all(checks.MAX_LINE, _FINISH_TIMEOUT)
        request.wait(_FINISH_TIMEOUT)
        return data

    def end_run(self, records: Iterable[bytes], timeout: float, **request: Any) -> bytes:
        """Give the controller in this machine the records of the run; return the record of what it said.

        Args:
            records: JSON lines, see ``guest/runner_controller.py``.
            timeout: Seconds that it may take.
            request: ``width`` of the terminal in columns, and how the run has gone (see ``suite/ending.py``).

        Raises:
            TimeoutError: It did not end in time.
            MachineError: The machine ended first, or broke the protocol.
        """
        started = time.monotonic()
        stream = self._link.open_stream()
        self._link.call("end", timeout=_BEGIN_TIMEOUT, stream=stream.number, **request)
        for record in records:
            stream.write(record, _left(started, timeout))
        stream.close()
        return stream.read_all(checks.MAX_LINE, _left(started, timeout))


def _records(streams: list[Stream], timeout: float | None, output: int) -> Iterator[dict[str, Any]]:
    """Yield the records of streams of which each begins when the one before has ended."""
    clock, printed = _TestClock(timeout), 0
    try:
        for stream in streams:
            records = checks.Records()
            most = output if stream is streams[-1] else 2 * output  # in live records it is a third longer
            for line in _lines(stream, clock, output, most + _REPORT_OVERHEAD):
                record = records.read(line)
                if not isinstance(record.get("k"), str):
                    raise checks.violation("a record of an unknown kind")
                if record["k"] == "excess":  # the runner measured output that it did not send
                    excess = checks.integer(record.get("printed"), "output", output)
                    raise QuotaExceeded("output", output, excess)
                if record["k"] == "out":
                    record["data"] = checks.data(record.get("data"), "output")
                    printed += len(record["data"])
                    if printed > output:
                        raise QuotaExceeded("output", output, printed)
                before = time.monotonic()
                yield record
                if record["k"] in _NOT_OF_THE_TEST:
                    clock.pause(time.monotonic() - before)
    except TimeoutError:
        observed = clock.spent
        raise QuotaExceeded("timeout", timeout or observed, observed) from None


class _TestClock:
    """The time that a test has taken and may still take, in seconds."""

    def __init__(self, timeout: float | None) -> None:
        self._started = time.monotonic()
        self._timeout = timeout

    @property
    def spent(self) -> float:
        return time.monotonic() - self._started

    def left(self) -> float | None:
        return _left(self._started, self._timeout)

    def pause(self, seconds: float) -> None:
        """Do not count the last ``seconds``."""
        self._started += seconds


def _left(started: float, timeout: float | None) -> float | None:
    return None if timeout is None else max(0.001, started + timeout - time.monotonic())


def _lines(stream: Stream, clock: _TestClock, output: int, most: int) -> Iterator[bytes]:
    buffer = bytearray()
    total = 0
    while True:
        data = stream.read(timeout=clock.left())
        if not data:
            break
        total += len(data)
        if total > most:
            raise QuotaExceeded("output", output, total, details="counted in the reports about the test")
        buffer += data
        if b"\n" in data:  # otherwise every piece of a long line would cause another search of all of it
            *whole, rest = buffer.split(b"\n")
            yield from (bytes(line) for line in whole if line)
            buffer = bytearray(rest)
    if buffer:
        raise checks.violation("a record without an end")


def _refused(error: GuestError) -> MachineError:
    return ProtocolViolation(f"the runner refused: {error}", resolution="the machine was ended")
