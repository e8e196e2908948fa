"""The ``microvm`` fixtures: a machine per test, class, module or run, and a factory for more machines.

PYTEST_DONT_REWRITE: `pytest-microvm test` imports this module before pytest does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_microvm.settings.options import MACHINE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_microvm.host.host import Host
    from pytest_microvm.machine.microvm import Checkpoint, MicroVM
    from pytest_microvm.settings.configuration import Settings
    from pytest_microvm.settings.spec import MachineSpec

MARKER = "microvm"
_machines = pytest.StashKey["list[tuple[str, MicroVM]]"]()  # the fixture's name, the machine
_failed = pytest.StashKey[bool]()
_before = pytest.StashKey["dict[str, int]"]()  # the number of earlier network requests, by machine id
_runs = pytest.StashKey["Machines"]()


class Machines:
    """The machines of one pytest run's fixtures.

    Args:
        config: pytest's configuration.
    """

    def __init__(self, config: pytest.Config) -> None:
        from pytest_microvm.host.host import Host  # noqa: PLC0415
        from pytest_microvm.settings.configuration import DEFAULT_TIMEOUT, command_line, load_settings  # noqa: PLC0415 - if used
        from pytest_microvm.terminal.termination import interrupt_on_sigterm  # noqa: PLC0415

        self._config = config
        self.settings: Settings = load_settings(config.rootpath, command_line(config))
        self.host: Host = Host(
            project=config.rootpath,
            require_accel=self.settings.require_accel,
            lock="require" if self.settings.locked else "follow",
            timeout=DEFAULT_TIMEOUT,
            retries=self.settings.retries,
            say=self._say,
        )
        self.kept: list[str] = []
        self.leave_sigterm = interrupt_on_sigterm()

    def spec(self, node: pytest.Item | pytest.Collector, changes: dict[str, Any]) -> MachineSpec:
        """Return the spec of a machine for ``node``: call before marker before settings.

        Raises:
            UsageError: A key is unknown or a value invalid.
        """
        spec = self.settings.spec
        for marker in reversed(list(node.iter_markers(MARKER))):
            spec = spec.with_changes(marker.kwargs, f"{node.nodeid}: @pytest.mark.microvm")
        spec = spec.with_changes(changes, "microvm_factory()")
        changed: MachineSpec | None = self._config.hook.pytest_microvm_spec(
            config=self._config, spec=spec, nodeid=node.nodeid
        )
        return spec if changed is None else changed

    def start(
        self, node: pytest.Item | pytest.Collector, changes: dict[str, Any], *, checkpoints: bool
    ) -> MicroVM:
        """Start a machine for ``node`` and return it, ready for use.

        Args:
            node: What it is for.
            changes: Fields of its spec, as users write them.
            checkpoints: Whether to allow checkpoints of it.
        """
        keepable = self.settings.keep == "failed"
        machine = self.host.start(
            self.spec(node, changes),
            pool=0 if keepable else self.settings.pool_size,
            keepable=keepable,
            checkpoints=checkpoints,
        )
        return self.started(machine, node)

    def started(self, machine: MicroVM, node: pytest.Item | pytest.Collector) -> MicroVM:
        """Tell plug-ins that a machine has started; return it."""
        self._config.hook.pytest_microvm_started(config=self._config, facts=machine.facts, nodeid=node.nodeid)
        return machine

    def end(self, machine: MicroVM, about: str, *, failed: bool) -> None:
        """End a machine, or keep it if its test failed and keeping is enabled."""
        if machine.closed:
            return
        if failed and self.settings.keep == "failed" and machine.keep(about):
            self.kept.append(f"{machine.id} ({about}): pytest-microvm shell {machine.id}")
        else:
            machine.close()
        self._config.hook.pytest_microvm_stopped(
            config=self._config, facts=machine.facts, usage=machine.usage()
        )

    def save(self, machine: MicroVM, error: BaseException | None, about: str) -> str | None:
        """Save evidence about a machine that crashed or exceeded a quota, if enabled; return its place."""
        from pytest_microvm.errors import MachineCrashed, QuotaExceeded  # noqa: PLC0415
        from pytest_microvm.machine import evidence  # noqa: PLC0415 - only when a test failed

        if not isinstance(error, (MachineCrashed, QuotaExceeded)):
            return None

        def write(folder: Path) -> None:
            evidence.save(folder, machine.instance, machine.facts, error, about)

        artifacts = self.settings.artifacts
        return evidence.saved(artifacts and artifacts.absolute(), about, machine.id, write)

    def _say(self, line: str) -> None:
        reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        capture: Any = self._config.pluginmanager.get_plugin("capturemanager")
        if reporter is None or self._config.option.verbose < 0:
            return
        with capture.global_and_fixture_disabled():
            if reporter._tw.width_of_current_line:  # noqa: SLF001 - after a test's name or dots
                reporter.line("")
            reporter.write_line(f"microvm: {line}")


def machines(config: pytest.Config) -> Machines:
    """Return this run's machines, created on first use by a fixture."""
    if _runs not in config.stash:
        config.stash[_runs] = Machines(config)
    return config.stash[_runs]


def _one(request: pytest.FixtureRequest, *, checkpoints: bool) -> Iterator[MicroVM]:
    with _usage_errors():
        machine = machines(request.config).start(request.node, {}, checkpoints=checkpoints)
    _used(request.node).append((str(request.fixturename), machine))
    yield machine
    machines(request.config).end(machine, request.node.nodeid, failed=_has_failed(request.node))


@pytest.fixture
def microvm(request: pytest.FixtureRequest) -> Iterator[MicroVM]:
    """A machine of this test's own, root included."""
    yield from _one(request, checkpoints=False)


@pytest.fixture(scope="class")
def microvm_class(request: pytest.FixtureRequest) -> Iterator[MicroVM]:
    """A machine that the tests of a class share."""
    yield from _one(request, checkpoints=True)


@pytest.fixture(scope="module")
def microvm_module(request: pytest.FixtureRequest) -> Iterator[MicroVM]:
    """A machine that the tests of a module share."""
    yield from _one(request, checkpoints=True)


@pytest.fixture(scope="session")
def microvm_session(request: pytest.FixtureRequest) -> Iterator[MicroVM]:
    """A machine that all tests of the run share."""
    yield from _one(request, checkpoints=True)


@pytest.fixture
def microvm_factory(request: pytest.FixtureRequest) -> Iterator[Callable[..., MicroVM]]:
    """Start machines: ``microvm_factory(image="base", memory="1G")``; they end with the test."""

    def start(*, checkpoints: bool = False, **changes: Any) -> MicroVM:
        with _usage_errors():
            return machines(request.config).start(request.node, changes, checkpoints=checkpoints)

    yield from _several(request, start)


@pytest.fixture
def microvm_fork(request: pytest.FixtureRequest) -> Iterator[Callable[[Checkpoint], MicroVM]]:
    """Start forks: ``microvm_fork(checkpoint)``; they end with the test."""

    def start(checkpoint: Checkpoint) -> MicroVM:
        with _usage_errors():
            return machines(request.config).started(checkpoint.fork(), request.node)

    yield from _several(request, start)


def _several(
    request: pytest.FixtureRequest, start: Callable[..., MicroVM]
) -> Iterator[Callable[..., MicroVM]]:
    """Yield ``start``; afterwards end the machines that it started."""
    made: list[MicroVM] = []

    def noted(*arguments: Any, **changes: Any) -> MicroVM:
        machine = start(*arguments, **changes)
        made.append(machine)
        _used(request.node).append((str(request.fixturename), machine))
        return machine

    yield noted
    for machine in reversed(made):
        machines(request.config).end(machine, request.node.nodeid, failed=_has_failed(request.node))


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}({', '.join(option.name for option in MACHINE)}): what the machine of the microvm fixtures "
        "is made of, and what it may use, reach and hold.",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse invalid markers before any test runs."""
    for item in items:
        for marker in item.iter_markers(MARKER):
            from pytest_microvm.network.policy.rules import parse_rules  # noqa: PLC0415 - only where it is used
            from pytest_microvm.settings.spec import MachineSpec  # noqa: PLC0415

            where = f"{item.nodeid}: @pytest.mark.microvm"
            with _usage_errors():
                if marker.args:
                    raise pytest.UsageError(
                        f"{item.nodeid}: @pytest.mark.microvm takes keywords only, such as memory='1G'"
                    )
                spec = MachineSpec().with_changes(marker.kwargs, where)
                parse_rules(spec.network or (), f"{where}: network")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Add the machines' properties to the report, and to a failure their consoles and last commands."""
    report = yield
    wanted = getattr(item, "fixturenames", ())
    used = [pair for node in item.listchain() for pair in node.stash.get(_machines, [])]
    found = [machine for fixture, machine in used if fixture in wanted]
    if report.when == "teardown":
        _forget_ended(item)
    if not found:
        return report
    from pytest_microvm.plugin import fixture_reports as reports  # noqa: PLC0415 - only tests with a machine
    from pytest_microvm.suite.properties import properties  # noqa: PLC0415

    before: dict[str, int] = item.stash.get(_before, {})
    asked = reports.asked(found, before)
    reports.tell_denied(report, asked, fail=machines(item.config).settings.fail_on_denied)
    reports.redact(report, found)
    if report.failed:
        for node in item.listchain():
            node.stash[_failed] = True
        for machine in found:
            report.sections.append((f"console of {machine.id}", machine.console_tail()))
            report.sections.append((f"last commands in {machine.id}", "\n".join(machine.last_commands)))
    if report.when == "call" or (report.when == "setup" and report.failed):
        error = call.excinfo.value if call.excinfo is not None and report.failed else None
        outcome = reports.outcome_of(report, error)
        machine = reports.ended_by(error, found)
        saved = machines(item.config).save(machine, error, item.nodeid)
        if saved:
            report.sections.append(("Machine artifacts", saved))
        quota: Any = error if outcome == "quota" else None
        item.user_properties += properties(
            machine.facts, machine.usage(), outcome, quota=quota, artifacts=saved, requests=asked
        )
        report.user_properties = list(item.user_properties)
        item.config.hook.pytest_microvm_outcome(
            config=item.config, facts=machine.facts, nodeid=item.nodeid, outcome=outcome
        )
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """List the machines that were kept."""
    if _runs in config.stash:
        for line in config.stash[_runs].kept:
            terminalreporter.write_line(f"microvm: kept {line}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the remaining machines."""
    if _runs in config.stash:
        config.stash[_runs].host.close()
        config.stash[_runs].leave_sigterm()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Record how many requests shared machines made before this test, so that its report omits those."""
    shared = [machine for node in item.listchain() for _fixture, machine in node.stash.get(_machines, [])]
    item.stash[_before] = {machine.id: machine.network.log.added for machine in shared}


def _used(node: Any) -> list[tuple[str, MicroVM]]:
    found: list[tuple[str, MicroVM]] = node.stash.setdefault(_machines, [])
    return found


def _forget_ended(item: pytest.Item) -> None:
    """Drop ended machines: pytest keeps items to the end of the run, and with them their machines."""
    for node in item.listchain():
        if _machines in node.stash:
            node.stash[_machines] = [pair for pair in node.stash[_machines] if not pair[1].closed]


def _has_failed(node: Any) -> bool:
    return bool(node.stash.get(_failed, False))


class _usage_errors:  # noqa: N801 - used like a function
    """Convert this package's usage errors into pytest's, without their traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from pytest_microvm.errors import UsageError  # noqa: PLC0415 - the errors are loaded by then

        if isinstance(error, UsageError):
            raise pytest.UsageError(str(error)) from None
