"""Fixtures as checkpoints: wide fixtures are set up once, in a machine whose copies run the tests.

The keeper is a machine that runs no test. It sets up the wide fixtures that the next test needs; a checkpoint
of it is taken, and each test that needs no others runs in a fork of that. Between two tests the keeper tears
down what the next one does not need, in pytest's own order (see ``guest/runner_wide.py``).

Session fixtures that the user calls pure are set up before there is a keeper, in machines that are kept in
the template cache; the keeper is then a copy of the last of them (ADR 0036).
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from pytest_microvm.errors import MachineError, MicroVMError
from pytest_microvm.suite.backend import Lease, PureSetUp, RunnerMachine
from pytest_microvm.suite.checks import Records, array, integer, paths, text, violation
from pytest_microvm.suite.collected import GuestExit, GuestWarning, parse_exit, parse_warning
from pytest_microvm.suite.kept_folders import parse_folders
from pytest_microvm.suite.session import RunnerSession
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_microvm.network.proxy.log import NetworkRequest
    from pytest_microvm.suite.backend import Backend, MachineCheckpoint, StandingFixtures, TestLimits
    from pytest_microvm.suite.collected import Collected
    from pytest_microvm.suite.leases import LeaseObserver, Leases
    from pytest_microvm.suite.live_display import LiveDisplay
    from pytest_microvm.suite.session import Wide
    from pytest_microvm.suite.setup_times import SetUpTimes

SLOW = 0.25
"""Seconds that a fixture's set-up takes at least, for ``fixtures = auto`` to set it up once."""

_WORTH = 3.0  # seconds to save; a keeper with its checkpoint costs one or two under emulation
_MAX_RECORDS = 100_000
_OF_THE_DISPLAY = frozenset(["log", "reported"])  # of earlier runs, which have shown them


@dataclass
class KeptUp:
    """What was done to wide fixtures between two tests.

    Args:
        warnings: Warnings recorded meanwhile.
        printed: Output past pytest's capturing.
        exit: Set if it ended the guest's session.
        report: The guest's report of a tear-down, if it has one.
        seconds: Seconds that wide fixtures took to set up, no more than the host has waited.
        asked: The keeper's network requests.
        set_ups: How often fixtures were set up for a checkpoint.
        standing: Numbers of the fixtures that stand now; ``None``: the guest's answer has no end.
        written: Files of the workspace that changed, relative to it; not safe to show.
        times: Times of wide fixtures, as the guest sent them.
        executed: What was executed, for a coverage of this process, as the guest sent it.
        temporary: The temporary folders of the test, as the guest sent them.
    """

    warnings: list[GuestWarning] = field(default_factory=list)
    printed: str = ""
    exit: GuestExit | None = None
    report: dict[str, Any] | None = None
    seconds: float = 0.0
    asked: list[NetworkRequest] = field(default_factory=list)
    set_ups: int = 0
    standing: frozenset[int] | None = None
    written: tuple[str, ...] = ()
    times: object = field(default_factory=list)
    executed: list[dict[str, Any]] = field(default_factory=list)
    temporary: object = None

    def add(self, later: KeptUp) -> None:
        """Add what was done after this."""
        self.warnings += later.warnings
        self.printed += later.printed
        self.exit = self.exit or later.exit
        self.seconds += later.seconds
        self.asked += later.asked
        self.set_ups += later.set_ups


class FixtureForks:
    """The keeper of a run's wide fixtures, and the checkpoint whose forks run tests.

    Args:
        backend: The source of machines.
        leases: Ends the keeper.
        collected: The tests, with the fixtures that they need.
        mode: ``auto``: once for slow fixtures; ``fork``: once for all; ``repeat``: for each test.
        pure: Names of fixtures that are kept for later runs, if the mode is not ``repeat``.
        times: Seconds that fixtures take.
        watcher: Notified of the keeper.
        display: Shows what fixtures print and log while they are set up.
        shares: Number of processes among which the tests are divided.
        repeat: How often each test runs.
        keep_tmp: Whether temporary folders come back if a tear-down fails.
    """

    def __init__(
        self,
        backend: Backend,
        leases: Leases,
        collected: Collected,
        *,
        mode: str,
        pure: Iterable[str],
        times: SetUpTimes,
        watcher: LeaseObserver,
        display: LiveDisplay,
        shares: int,
        repeat: int,
        keep_tmp: bool,
    ) -> None:
        self._backend = backend
        self._leases = leases
        self._needed = collected.needed
        self._fixtures = collected.wide
        self._mode = mode
        self._pure = collected.pure(pure)
        self._times = times
        self._watcher = watcher
        self._display = display
        self._shares = max(1, shares)
        self._repeat = repeat
        self._keep_tmp = keep_tmp
        self._left: dict[int, int] = {}  # tests that still need a fixture, by its number
        for needed in self._needed:
            for number in needed:
                self._left[number] = self._left.get(number, 0) + repeat
        self._keeper: Lease | None = None
        self._checkpoint: MachineCheckpoint | None = None
        self._standing: frozenset[int] = frozenset()  # in the keeper, and in the checkpoint if there is one
        self._pure_state: MachineCheckpoint | None = None  # with pure fixtures only; a keeper begins in it
        self._pure_standing: frozenset[int] = frozenset()
        self._set_ups: tuple[PureSetUp, ...] = ()  # that led there
        self._not_pure: set[tuple[int, ...]] = set()
        self._written: tuple[str, ...] = ()  # by pure set-ups: the next fork has these files
        self._last: Any = None

    def way(self, item: Any, limits: TestLimits) -> Wide:
        """Return what a test's machine does with its wide fixtures.

        ``tell``: it says when it is about to set one up; then :meth:`prepare` is due.
        """
        if limits.network is not None:  # a keeper has the network of all tests
            return "repeat"
        if self.stand(item) and not self._standing.isdisjoint(self._needed_by(item)):
            return "standing"
        return "tell" if self._wanted(item) else "repeat"

    def start(self, way: Wide, nodeid: str) -> RunnerMachine:
        """Return a fresh machine for the test ``nodeid``.

        Raises:
            BootError: It never became ready.
        """
        if way != "standing" or self._checkpoint is None:
            return self._backend.lease()
        machine = self._backend.fork(self._checkpoint)
        written, self._written = self._written, ()
        if written:
            self._watcher.wrote(machine, nodeid, written)
        return machine

    def stand(self, item: Any) -> bool:
        """Return True if there is a checkpoint with all fixtures that are to stand for a test."""
        return self._checkpoint is not None and self._standing.issuperset(self._wanted(item))

    def restore(self, item: Any, limits: TestLimits) -> KeptUp | None:
        """Take a checkpoint with a test's pure fixtures from the template cache, or make it there.

        ``None``: it has none that do not stand, or they can only be set up in a keeper.
        """
        pure = self._pure_prefix(item)
        if self._keeper is not None or self._standing.issuperset(pure) or pure in self._not_pure:
            return None
        self._forget_checkpoint()
        first = next(place for place, needed in enumerate(self._needed) if needed[: len(pure)] == pure)
        set_ups = (*self._set_ups, PureSetUp(first, tuple(self._fixtures[number] for number in pure)))
        forks = self._forks_with(self._standing.union(pure), len(pure))
        try:
            found = self._backend.standing(set_ups, limits, forks)
            if found is not None:
                return self._take(found, set_ups)
        except MicroVMError as error:
            names = ", ".join(self._fixtures[number].name for number in pure if number not in self._standing)
            line = f"{sanitize_line(names)} cannot be kept for later runs: {error.brief}"
            self._watcher.told(item.nodeid, line)
        self._not_pure.add(pure)
        return None

    def keeper(self, item: Any) -> Lease | None:
        """Return the keeper, started if there is none; ``None`` if there can be none, now or ever.

        Raises:
            BootError: It never became ready.
        """
        if self._keeper is not None and self._keeper.machine.given_up:
            self._lose("was ended, as the host budget had no room for it")
            return None
        if self._keeper is None:
            machine = self._backend.keeper(self._pure_state)
            if machine is None:
                self._give_up()
                return None
            self._keeper = Lease(machine, nodeid=item.nodeid)
            self._watcher.started(machine, item.nodeid)
        return self._keeper

    def prepare(self, keeper: Lease, item: Any, limits: TestLimits) -> KeptUp:
        """Set up the wide fixtures of ``item`` in the keeper, and take a checkpoint of it.

        Raises:
            QuotaExceeded: It took too long, or printed too much.
            MachineError: The keeper failed.
        """
        self._forget_checkpoint()
        wanted = self._wanted(item)
        session = self._session(keeper)
        started = time.monotonic()
        done = self._read(keeper, item, session.prepare(item.position, len(wanted), limits))
        done.set_ups = 1
        done.seconds = min(done.seconds, time.monotonic() - started)
        if done.report is not None:
            raise violation("a report of a set-up, which the test's own machine reports")
        if done.exit is None:
            forks = self._forks_with(self._standing, len(wanted))
            self._checkpoint = keeper.machine.checkpoint(forks)
        return done

    def ran(self, item: Any, measured: object) -> None:
        """Notice that a test has run, and the times of the fixtures that were set up in its machine.

        Raises:
            ProtocolViolation: They are malformed.
        """
        for number in self._needed_by(item):
            self._left[number] -= 1
        self._times.add(measured)

    def tear_down(self, item: Any, nextitem: Any, limits: TestLimits) -> KeptUp | None:
        """Tear down what ``nextitem`` does not need; ``None`` if nothing was to do.

        Raises:
            QuotaExceeded: It took too long, or printed too much.
            MachineError: The keeper failed.
        """
        self._last = item, limits
        if self._keeper is None and nextitem is None:
            self._start_for_the_end(item)
        keeper = self._keeper
        if keeper is None or (nextitem is not None and nextitem.parent is item.parent):
            return None
        if keeper.machine.given_up:
            self._lose("was ended, as the host budget had no room for it")
            return None
        before = self._standing
        following = None if nextitem is None else nextitem.position
        session = self._session(keeper)
        done = self._read(keeper, item, session.tear_down(item.position, following, limits))
        if self._standing != before:
            self._forget_checkpoint()
        if nextitem is None:
            self._end()
        return done

    def lose(self) -> None:
        """End a keeper that has failed; the next test that needs one gets another."""
        keeper, self._keeper = self._keeper, None
        self._forget_checkpoint()
        self._checkpoint, self._standing = self._pure_state, self._pure_standing
        if keeper is not None:
            self._leases.discard(keeper)

    def release(self) -> None:
        """Tear down what still stands, because the run ends early; end the keeper."""
        if self._last is None:
            return
        item, limits = self._last
        try:
            done = self.tear_down(item, None, limits)
        except MachineError as error:
            self._watcher.told(item.nodeid, f"the fixtures were not torn down: {error.brief}")
            self.lose()
            return
        if done is not None and done.report is not None:
            self._watcher.told(item.nodeid, "fixtures failed to tear down after the run was stopped")

    # Parts

    def _session(self, keeper: Lease) -> RunnerSession:
        return RunnerSession(keeper.machine.link, self._display.capture, temporary=self._keep_tmp)

    def _needed_by(self, item: Any) -> tuple[int, ...]:
        return self._needed[item.position] if self._needed else ()

    def _wanted(self, item: Any) -> tuple[int, ...]:
        """Return the wide fixtures that are to be set up once: in their order up to the last slow one."""
        needed = self._needed_by(item)
        if self._mode == "repeat":
            return ()
        if self._mode == "fork":
            return needed
        pure = self._pure_prefix(item)
        standing = frozenset() if self._checkpoint is None else self._standing
        slow = [
            place
            for place, number in enumerate(needed)
            if self._times.of(number) >= SLOW and number not in standing
        ]
        saved = sum(
            self._times.of(needed[place]) * self._again(needed[place]) for place in slow if place >= len(pure)
        )
        if not slow or (saved < _WORTH and self._keeper is None):
            return pure
        return needed[: max(slow[-1] + 1, len(pure))]

    def _pure_prefix(self, item: Any) -> tuple[int, ...]:
        """Return the pure fixtures that a test needs, up to the first that is not: the order stays."""
        if self._mode == "repeat":
            return ()
        return tuple(itertools.takewhile(self._pure.__contains__, self._needed_by(item)))

    def _forks_with(self, standing: frozenset[int], count: int) -> int:
        """Return about how many tests of this process begin in forks in which these fixtures stand.

        Args:
            standing: The fixtures.
            count: Number of wide fixtures that are set up once for a test.
        """
        begin = sum(standing.issuperset(needed[:count]) for needed in self._needed)
        return begin * self._repeat // self._shares

    def _again(self, number: int) -> int:
        """Return how often this process would set up a fixture again."""
        return self._left[number] // self._shares - 1

    def _read(self, keeper: Lease, item: Any, records: Iterable[dict[str, Any]]) -> KeptUp:
        """Read the keeper's answer."""
        machine = keeper.machine
        before = machine.requests.added
        others = self._display.of(machine.redactor).others(records)
        done = _parse(cast("dict[str, Any]", machine.redactor.tree(record)) for record in others)
        exceeded = machine.exceeded()
        if exceeded is not None:
            raise exceeded
        self._note(done)
        self._watcher.wrote(machine, item.nodeid, done.written)
        if done.report is not None and _has_failed(done.report):
            self._watcher.failed(machine, item.nodeid, parse_folders(done.temporary))
        done.asked = machine.requests.since(before)
        return done

    def _take(self, found: StandingFixtures, set_ups: tuple[PureSetUp, ...]) -> KeptUp:
        """Take a state in which pure fixtures stand, and what their set-up brought."""
        records = Records()
        done = _parse(records.read(line) for line in found.answer.splitlines())
        self._note(done)
        done.set_ups = 1
        if found.earlier:
            done.seconds = 0.0
        self._set_ups, self._pure_standing = set_ups, self._standing
        self._pure_state = self._checkpoint = found.checkpoint
        self._written += done.written
        return done

    def _note(self, done: KeptUp) -> None:
        """Note which fixtures stand now, and how long their set-up took."""
        if done.standing is None:
            raise violation("an answer without an end")
        self._times.add(done.times)
        numbers = {pair[0] for pair in cast("list[list[int]]", done.times)}
        done.seconds = sum(map(self._times.of, numbers))
        self._standing = done.standing
        for record in done.executed:
            self._watcher.executed(record)

    def _start_for_the_end(self, item: Any) -> None:
        """Start a machine that tears down the pure fixtures, if they stand: a fork is enough for that.

        Raises:
            MachineError: There is none.
        """
        begin, self._pure_state = self._pure_state, None
        if begin is None:
            return
        try:
            machine = self._backend.fork(begin)
        except MicroVMError as error:
            raise MachineError(f"none to tear them down in: {error.brief}") from error
        self._keeper = Lease(machine, nodeid=item.nodeid)
        self._watcher.started(machine, item.nodeid)

    def _forget_checkpoint(self) -> None:
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None:
            checkpoint.close()

    def _lose(self, why: str) -> None:
        keeper = self._keeper
        if keeper is not None:
            self.lose()
            self._give_up()
            self._watcher.told(keeper.nodeid, f"the machine of the fixtures {why}: each test sets up its own")

    def _give_up(self) -> None:
        """Let each test set up its own fixtures from now on."""
        self._mode = "repeat"
        self._pure_state = None
        self._forget_checkpoint()

    def _end(self) -> None:
        keeper, self._keeper = self._keeper, None
        self._pure_state = None
        self._forget_checkpoint()
        if keeper is not None:
            self._leases.end(keeper)


def _parse(records: Iterable[dict[str, Any]]) -> KeptUp:
    """Return what a guest sent about fixtures that it has set up or torn down.

    Raises:
        ProtocolViolation: It is malformed.
    """
    done = KeptUp()
    for count, record in enumerate(records):
        if done.standing is not None or count >= _MAX_RECORDS:
            why = f"more than {_MAX_RECORDS} records" if done.standing is None else "a record after the end"
            raise violation(why)
        kind = record.get("k")
        if kind == "warning":
            done.warnings.append(parse_warning(record))
        elif kind == "exit" and done.exit is None:
            done.exit = parse_exit(record)
        elif kind == "report" and done.report is None:
            done.report = record
        elif kind == "end":
            done.printed = text(record.get("printed", ""), "output")
            numbers = array(record.get("standing"), "list of fixtures")
            done.standing = frozenset(integer(number, "number of a fixture") for number in numbers)
            done.written = paths(record.get("written", []))
            done.times = record.get("wide")
            done.temporary = record.get("temporary")
        elif kind == "coverage":
            done.executed.append(record)
        elif not isinstance(kind, str) or kind not in _OF_THE_DISPLAY:
            raise violation("a record of an unknown kind, or a second one")
    return done


def _has_failed(record: dict[str, Any]) -> bool:
    data = record.get("data")
    return isinstance(data, dict) and data.get("outcome") == "failed"
