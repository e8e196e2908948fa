"""Fixtures as checkpoints: wide fixtures are set up once, in a machine whose copies run the tests.

The keeper is a machine that runs no test. It sets up the wide fixtures that the next test needs; a checkpoint
of it is taken, and each test that needs no others runs in a fork of that. Between two tests the keeper tears
down what the next one does not need, in pytest's own order (see ``guest/runner_wide.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from pytest_microvm.errors import MachineError
from pytest_microvm.suite.backend import Lease, RunnerMachine
from pytest_microvm.suite.checks import array, integer, paths, text, violation
from pytest_microvm.suite.collected import GuestExit, GuestWarning, parse_exit, parse_warning
from pytest_microvm.suite.session import RunnerSession

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_microvm.network.proxy.log import NetworkRequest
    from pytest_microvm.suite.backend import Backend, MachineCheckpoint, TestLimits
    from pytest_microvm.suite.collected import Collected
    from pytest_microvm.suite.leases import LeaseObserver, Leases
    from pytest_microvm.suite.live_display import LiveDisplay
    from pytest_microvm.suite.session import Wide
    from pytest_microvm.suite.setup_times import SetUpTimes

SLOW = 0.25
"""Seconds that a fixture's set-up takes at least, for ``fixtures = auto`` to set it up once."""

_WORTH = 3.0  # seconds to save; a keeper with its checkpoint costs one or two under emulation
_MAX_RECORDS = 10_000


@dataclass
class KeptUp:
    """What the keeper did between two tests.

    Args:
        warnings: Warnings recorded meanwhile.
        printed: Output past pytest's capturing.
        exit: Set if it ended the guest's session.
        report: The guest's report of a tear-down, if it has one.
        seconds: Seconds that wide fixtures took to set up.
        asked: Its network requests.
    """

    warnings: list[GuestWarning] = field(default_factory=list)
    printed: str = ""
    exit: GuestExit | None = None
    report: dict[str, Any] | None = None
    seconds: float = 0.0
    asked: list[NetworkRequest] = field(default_factory=list)


class FixtureForks:
    """The keeper of a run's wide fixtures, and the checkpoint whose forks run tests.

    Args:
        backend: The source of machines.
        leases: Ends the keeper.
        collected: The tests, with the fixtures that they need.
        mode: ``auto``: once for slow fixtures; ``fork``: once for all; ``repeat``: for each test.
        times: Seconds that fixtures take.
        watcher: Notified of the keeper.
        display: Shows what fixtures print and log while they are set up.
        shares: Number of processes among which the tests are divided.
        repeat: How often each test runs.
    """

    def __init__(
        self,
        backend: Backend,
        leases: Leases,
        collected: Collected,
        *,
        mode: str,
        times: SetUpTimes,
        watcher: LeaseObserver,
        display: LiveDisplay,
        shares: int,
        repeat: int,
    ) -> None:
        self._backend = backend
        self._leases = leases
        self._needed = collected.needed
        self._mode = mode
        self._times = times
        self._watcher = watcher
        self._display = display
        self._shares = max(1, shares)
        self._repeat = repeat
        self._left: dict[int, int] = {}  # tests that still need a fixture, by its number
        for needed in self._needed:
            for number in needed:
                self._left[number] = self._left.get(number, 0) + repeat
        self._keeper: Lease | None = None
        self._checkpoint: MachineCheckpoint | None = None
        self._standing: frozenset[int] = frozenset()  # in the keeper, and in the checkpoint if there is one
        self._last: Any = None

    def way(self, item: Any, limits: TestLimits) -> Wide:
        """Return what a test's machine does with its wide fixtures.

        ``tell``: it says when it is about to set one up; then :meth:`prepare` is due.
        """
        wanted = self._wanted(item)
        if not wanted or limits.network is not None:  # a keeper has the network of all tests
            return "repeat"
        if self._checkpoint is not None and self._standing.issuperset(wanted):
            return "standing"
        return "tell"

    def start(self, way: Wide) -> RunnerMachine:
        """Return a fresh machine for a test.

        Raises:
            BootError: It never became ready.
        """
        if way == "standing" and self._checkpoint is not None:
            return self._backend.fork(self._checkpoint)
        return self._backend.lease()

    def keeper(self, item: Any) -> Lease | None:
        """Return the keeper, started if there is none; ``None`` if there can be none, now or ever.

        Raises:
            BootError: It never became ready.
        """
        if self._keeper is not None and not self._keeper.machine.usable:
            self._lose("was ended, as the host budget had no room for it")
        if self._keeper is None:
            machine = self._backend.keeper()
            if machine is None:
                self._mode = "repeat"
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
        session = RunnerSession(keeper.machine.link, self._display.capture)
        done = self._read(keeper, item, session.prepare(item.position, len(wanted), limits))
        if done.exit is None:
            stand = sum(self._standing.issuperset(needed[: len(wanted)]) for needed in self._needed)
            self._checkpoint = keeper.machine.checkpoint(stand * self._repeat // self._shares)
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
        keeper = self._keeper
        if keeper is None or (nextitem is not None and nextitem.parent is item.parent):
            return None
        if not keeper.machine.usable:
            self._lose("was ended, as the host budget had no room for it")
            return None
        before = self._standing
        following = None if nextitem is None else nextitem.position
        session = RunnerSession(keeper.machine.link, self._display.capture)
        done = self._read(keeper, item, session.tear_down(item.position, following, limits))
        if self._standing != before:
            self._forget_checkpoint()
        if nextitem is None:
            self._end()
        return done

    def lose(self, keeper: Lease) -> None:
        """Do without a keeper that has failed, and that the caller has ended."""
        self._keeper = None
        self._forget_checkpoint()
        self._leases.discard(keeper)

    def release(self) -> None:
        """Tear down what still stands, because the run ends early; end the keeper."""
        if self._keeper is None or self._last is None:
            return
        item, limits = self._last
        try:
            done = self.tear_down(item, None, limits)
        except MachineError as error:
            self._watcher.told(item.nodeid, f"the fixtures were not torn down: {error.brief}")
            self._end()
            return
        if done is not None and done.report is not None:
            self._watcher.told(item.nodeid, "fixtures failed to tear down after the run was stopped")

    # Parts

    def _needed_by(self, item: Any) -> tuple[int, ...]:
        return self._needed[item.position] if self._needed else ()

    def _wanted(self, item: Any) -> tuple[int, ...]:
        """Return the wide fixtures that are to be set up once: in their order up to the last slow one."""
        needed = self._needed_by(item)
        if self._mode == "repeat":
            return ()
        if self._mode == "fork":
            return needed
        slow = [place for place, number in enumerate(needed) if self._times.of(number) >= SLOW]
        saved = sum(self._times.of(needed[place]) * self._again(needed[place]) for place in slow)
        if not slow or (saved < _WORTH and self._keeper is None):
            return ()
        return needed[: slow[-1] + 1]

    def _again(self, number: int) -> int:
        """Return how often this process would set up a fixture again."""
        return self._left[number] // self._shares - 1

    def _read(self, keeper: Lease, item: Any, records: Iterator[dict[str, Any]]) -> KeptUp:
        done = KeptUp()
        machine = keeper.machine
        before, ended = machine.requests.added, False
        for count, raw in enumerate(self._display.of(machine.redactor).others(records)):
            record = cast("dict[str, Any]", machine.redactor.tree(raw))
            kind = record.get("k")
            if kind == "warning" and count < _MAX_RECORDS:
                done.warnings.append(parse_warning(record))
            elif kind == "exit":
                done.exit = parse_exit(record)
            elif kind == "report":
                done.report = record
            elif kind == "end":
                ended = True
                done.printed = text(record.get("printed", ""), "output")
                self._take(keeper, item, record)
                done.seconds = sum(self._times.of(pair[0]) for pair in record["wide"])
            else:
                raise violation("a record of an unknown kind")
        exceeded = machine.exceeded()
        if exceeded is not None:
            raise exceeded
        if not ended:
            raise violation("an answer without an end")
        done.asked = machine.requests.since(before)
        return done

    def _take(self, keeper: Lease, item: Any, record: dict[str, Any]) -> None:
        """Take the last record of the keeper's answer."""
        self._times.add(record.get("wide"))
        numbers = array(record.get("standing"), "list of fixtures")
        self._standing = frozenset(integer(number, "number of a fixture") for number in numbers)
        self._watcher.wrote(keeper.machine, item.nodeid, paths(record.get("written", [])))

    def _forget_checkpoint(self) -> None:
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None:
            checkpoint.close()

    def _lose(self, why: str) -> None:
        keeper = self._keeper
        if keeper is not None:
            self.lose(keeper)
            self._mode = "repeat"
            self._watcher.told(keeper.nodeid, f"the machine of the fixtures {why}: each test sets up its own")

    def _end(self) -> None:
        keeper, self._keeper = self._keeper, None
        self._forget_checkpoint()
        if keeper is not None:
            self._leases.end(keeper)
