"""The plug-in behind ``--microvm``: pytest hooks on the host that run the tests in machines."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.suite import neutral
from pytest_microvm.suite.arguments import DEBUGGING, SHOWING_ALONE
from pytest_microvm.suite.backend import (
    Backend,
    CollectPlan,
    Progress,
    RemoteSettings,
    RunnerMachine,
    RunOptions,
)
from pytest_microvm.suite.collected import Collected
from pytest_microvm.suite.collection import Replay, raise_exit
from pytest_microvm.suite.conditions import check_debug_port, check_rewriting, fixtures_mode, repeat_tests
from pytest_microvm.suite.dividing import DividedArguments
from pytest_microvm.suite.ending import Ending
from pytest_microvm.suite.foreign_warnings import warning_message
from pytest_microvm.suite.forking import SLOW, FixtureForks
from pytest_microvm.suite.kept_folders import KeptFolders
from pytest_microvm.suite.launch import launch_of
from pytest_microvm.suite.leases import Leases, MachineEnd
from pytest_microvm.suite.limits import check_markers
from pytest_microvm.suite.live_display import LiveDisplay
from pytest_microvm.suite.machine_coverage import MachineCoverage, machine_coverage
from pytest_microvm.suite.missing import (
    lines_about_modules,
    lines_about_options,
    lines_about_pure_fixtures,
    lines_about_sharing,
    with_advice,
)
from pytest_microvm.suite.observer import SuiteObserver
from pytest_microvm.suite.plan import guest_environment, settings_from, workspace_of
from pytest_microvm.suite.progress import TerminalProgress
from pytest_microvm.suite.pytest_errors import as_pytest_errors
from pytest_microvm.suite.running import TestRunner
from pytest_microvm.suite.setup_times import SetUpTimes, remember, remembered
from pytest_microvm.suite.summary import (
    EXIT_INFRA,
    Tally,
    add_suite_properties,
    guest_lines,
    header_line,
    machine_outcome,
)
from pytest_microvm.suite.write_back import WriteBack
from pytest_microvm.suite.written_options import (
    Places,
    WantedFiles,
    folders_of,
    wanted_files,
)
from pytest_microvm.terminal.termination import interrupt_on_sigterm
from pytest_microvm.untrusted.nofollow import refuse_links
from pytest_microvm.untrusted.text import sanitize, sanitize_part


class RemoteSuite:
    """One pytest run whose tests run in machines.

    Args:
        config: pytest's configuration, before its final parse of the arguments.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._backend: Backend | None = None
        self._plan: CollectPlan | None = None
        self._collected: Collected | None = None
        self._replay: Replay | None = None
        self._runner: TestRunner | None = None
        self._ending: Ending | None = None
        self._observer: SuiteObserver | None = None
        self._write_back: WriteBack | None = None
        self._coverage: MachineCoverage | None = None
        self._kept: KeptFolders | None = None
        self._wanted = WantedFiles((), (), while_running=False)
        self._has_shown = False
        self._tally = Tally()
        self._times: SetUpTimes | None = None
        self._leave_sigterm = interrupt_on_sigterm()
        self._guest_plugins = os.environ.pop("PYTEST_PLUGINS", None)  # pytest would import them on the host
        self._launch = launch_of(config.invocation_params.args)
        self._arguments = DividedArguments(config, self._launch)
        neutral.neutralise(config)

    def divide(self, parser: pytest.Parser, args: list[str]) -> None:
        """Remove the guest's arguments from ``args``, and keep pytest from loading conftest files.

        Raises:
            pytest.UsageError: An option cannot work, or would act or has already acted on the host.
        """
        if self._guest_plugins is not None:
            os.environ["PYTEST_PLUGINS"] = self._guest_plugins  # for the workers of pytest-xdist
        self._arguments.divide(parser, args)

    def pytest_plugin_registered(self, plugin: object) -> None:
        """Disable hooks of any plug-in that belong in the machine, also if registered before this one."""
        neutral.keep_from_acting_early(self._config, plugin)
        neutral.keep_from_items(self._config, plugin)

    # Session

    @pytest.hookimpl(trylast=True)
    def pytest_microvm_backend(
        self, config: pytest.Config, settings: RemoteSettings, progress: Progress
    ) -> Backend:
        """Return the backend that runs tests in machines, unless another plug-in provides its own."""
        from pytest_microvm.suite import machines  # noqa: PLC0415 - our own tests use another backend

        def change(spec: MachineSpec) -> MachineSpec:
            changed: MachineSpec | None = config.hook.pytest_microvm_spec(config=config, spec=spec, nodeid="")
            return spec if changed is None else changed

        return machines.MachineBackend(settings, progress, change)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Create the backend and the collection plan."""
        neutral.forget_unknown_keys(session.config)
        if self._launch is not None:
            neutral.shorten_header(session.config)
        with as_pytest_errors(), self._progress as progress:
            settings = settings_from(session.config, self._launch)
            self._refuse_linked(session.config.getoption("xmlpath", None))
            self._refuse_linked(settings.values.get("artifacts"))
            self._refuse_linked(session.config.getoption("basetemp", None))
            backend = session.config.hook.pytest_microvm_backend(
                config=session.config, settings=settings, progress=progress
            )
            assert backend is not None
            self._backend = backend
            self._coverage = self._make_coverage(settings)
            repeat_tests(session.config, backend.options)
            check_debug_port(backend.options, settings.workers)
            check_rewriting(backend.options, self._arguments, whole=self._is_whole())
            self._wanted = self._wanted_files(backend.options)
            self._plan = self._make_plan(backend, self._wanted)
            self._write_back = WriteBack(session.config, workspace_of(session.config), self._wanted)
            session.config.pluginmanager.register(self._write_back, "microvm_write_back")
            if backend.options.keep_tmp:
                self._kept = KeptFolders(session.config)
                session.config.pluginmanager.register(self._kept, "microvm_kept_folders")
            add_suite_properties(session.config, backend.facts, backend.options.isolation)
            if backend.options.junit_profile is not None:
                from pytest_microvm.suite.junit_profile import shape_junit  # noqa: PLC0415 - only if requested

                shape_junit(session.config, backend.options.junit_profile)

    def pytest_report_header(self) -> list[str] | None:
        """Show the accelerator, image and isolation in pytest's header."""
        if self._backend is None:
            return None
        lines = [header_line(self._backend.facts, self._backend.options.isolation)]
        if self._launch is not None and self._launch.left:
            lines.append(f"microvm: left out of the project's addopts: {', '.join(self._launch.left)}")
        return [sanitize(line) for line in lines]

    def pytest_report_collectionfinish(self) -> list[str]:
        """Show the guest's versions and the header lines of its plug-ins."""
        if self._collected is None or self._config.option.verbose < 0:
            return []
        return [*guest_lines(self._collected), *self._lines_about(self._collected)]

    def _lines_about(self, collected: Collected) -> list[str]:
        """Return what the user should know before the first test."""
        assert self._backend is not None
        return [
            *lines_about_modules(collected, self._backend.facts),
            *lines_about_sharing(collected, self._backend.options.isolation),
            *lines_about_pure_fixtures(collected, self._backend.options.pure_fixtures),
            *lines_about_options(
                self._config.option,
                collected,
                keeps_tmp=self._kept is not None,
                launched=self._launch is not None,
            ),
            *self._wanted.lines,
        ]

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_setupnodes(self, specs: list[Any]) -> None:
        """Prepare the template once in pytest-xdist's controller, before its workers need it."""
        for spec in specs:
            neutral.keep_project_from_worker(spec, isolated=self._launch is not None)
        collected = self._collect()
        for line in self._lines_about(collected):
            self._progress(line.removeprefix("microvm: "))
        self._prepare(collected)

    def pytest_collection(self, session: pytest.Session) -> bool:
        """Collect in the guest and replay its collection on the host."""
        self._collected = collected = self._collect()
        if self._coverage is not None and collected.executed is not None:
            with as_pytest_errors():
                self._coverage.add(collected.executed)
        ended = collected.exit
        if ended is not None and ended.shown and self._arguments.is_told(SHOWING_ALONE):
            session.items, self._has_shown = [], True
            self._display.write(ended.text)
            return True
        self._prepare(collected)
        session._initialpaths = frozenset(self._named_paths())  # noqa: SLF001 - used by --lf
        with as_pytest_errors():
            self._replay = Replay(session, collected, self._display)
            try:
                self._replay.perform()
            except pytest.UsageError as error:
                assert self._backend is not None  # it has collected
                raise pytest.UsageError(with_advice(str(error), self._backend.facts)) from error
            except session.Failed:
                if self._ending is not None:
                    self._ending.end_stopped(session)
                raise
            for item in session.items:
                check_markers(item)
        return True

    def pytest_make_collect_report(self, collector: pytest.Collector) -> pytest.CollectReport:
        """Return the guest's report; the host itself never collects."""
        if self._replay is None:
            raise pytest.UsageError("--microvm collects nothing on the host: run this without --microvm")
        return self._replay.make_report(collector)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> bool:
        """Run a test in a machine and pass its reports to pytest's hooks."""
        assert self._runner is not None
        assert self._observer is not None
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        display = self._display
        display.begin()
        ran = self._runner.run(item, nextitem)
        display.write(sanitize_part(ran.printed))
        display.reported()
        if self._ending is not None:
            self._ending.add_test(item, ran)
        for report in ran.reports:
            self._observer.explain(report)
            hook.pytest_runtest_logreport(report=report)
            display.reported(report)
        display.end()
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if ran.facts is not None:
            self._config.hook.pytest_microvm_outcome(
                config=self._config, facts=ran.facts, nodeid=item.nodeid, outcome=ran.outcome
            )
        for warning in ran.warnings:
            self._config.hook.pytest_warning_recorded.call_historic(
                kwargs={
                    "warning_message": warning_message(warning),
                    "when": warning.when,
                    "nodeid": item.nodeid if warning.nodeid else "",
                    "location": None,
                }
            )
        if ran.stop and not item.session.shouldstop:
            item.session.shouldstop = ran.stop
        if ran.exit is not None:
            raise_exit(ran.exit)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the test's outcome for the summary."""
        self._tally.add(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """End the machine in use; set exit status ``EXIT_INFRA`` if only the infrastructure failed."""
        self._release()
        if self._times is not None and not hasattr(session.config, "workerinput"):
            remember(session.config, self._times.slow(SLOW))
        if self._has_shown:
            session.exitstatus = pytest.ExitCode.OK
        if exitstatus == pytest.ExitCode.TESTS_FAILED and self._tally.only_infra_failed:
            session.exitstatus = EXIT_INFRA

    def pytest_report_teststatus(
        self, report: pytest.TestReport | pytest.CollectReport
    ) -> tuple[str, str, Any] | None:
        """Return how the guest's plug-ins name an outcome; a test whose machine failed counts as failed."""
        outcome = machine_outcome(report)
        if outcome is None:
            return getattr(report, "microvm_status", None)
        category = "failed" if report.when == "call" else "error"
        return category, outcome[0].upper(), (outcome.upper(), {"red": True})

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Show the number of tests and of machines."""
        if self._tally.tests:
            terminalreporter.write_line(f"microvm: {self._tally.line()}")

    def pytest_unconfigure(self) -> None:
        """End all remaining machines."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()
        self._leave_sigterm()

    # Parts

    def _collect(self) -> Collected:
        assert self._backend is not None
        assert self._plan is not None
        with as_pytest_errors(), self._progress as progress:
            return Collected.parse(self._backend.collect(self._plan, progress))

    def _make_runner(self, collected: Collected) -> TestRunner:
        assert self._backend is not None
        assert self._write_back is not None
        self._observer = SuiteObserver(
            self._config,
            self._progress,
            self._ending,
            self._write_back,
            coverage=self._coverage,
            kept=self._kept,
        )
        self._observer.lends_terminal = self._arguments.is_told(DEBUGGING)
        self._observer.debug_port = self._backend.options.debug_port
        options = self._backend.options
        end = MachineEnd(collected.outputs, self._write_back.finishing, self._is_whole())
        leases = Leases(self._backend, options.isolation, self._observer, end)
        names = [fixture.key for fixture in collected.wide]
        self._times = SetUpTimes(names, remembered(self._config))
        forks = FixtureForks(
            self._backend,
            leases,
            collected,
            mode=fixtures_mode(self._config, options, debugs=self._arguments.is_told(DEBUGGING)),
            pure=options.pure_fixtures,
            times=self._times,
            watcher=self._observer,
            display=self._display,
            shares=settings_from(self._config, self._launch).workers,
            repeat=options.repeat or 1,
            keep_tmp=options.keep_tmp,
        )
        return TestRunner(options, leases, forks, self._observer, self._display, whole=self._is_whole())

    def _wanted_files(self, options: RunOptions) -> WantedFiles:
        basetemp = self._config.getoption("basetemp", None) if options.keep_tmp else None
        places = self._places(options)
        words = self._arguments
        return wanted_files(
            options.write_back, words.users, words.projects, words.arity, places, basetemp=basetemp
        )

    def _places(self, options: RunOptions) -> Places:
        mounted = tuple(Path(target) for target in options.mounted)
        return Places(workspace_of(self._config), self._config.invocation_params.dir, mounted)

    def _make_coverage(self, settings: RemoteSettings) -> MachineCoverage | None:
        config = self._config
        controls = bool(settings.workers) and not settings.worker
        coverage = machine_coverage(config, workspace_of(config), workers=controls)
        if coverage is not None:
            config.pluginmanager.register(coverage, "microvm_coverage")
        return coverage

    def _prepare(self, collected: Collected) -> None:
        """Prepare the tests' machines, and the last one if there is something to say at the end."""
        if collected.speaking and not self._config.option.collectonly:
            assert self._write_back is not None
            self._ending = Ending(
                self._config,
                self._last_machine,
                self._write_back,
                whole=self._is_whole(),
                coverage=self._coverage,
            )
            self._config.pluginmanager.register(self._ending, "microvm_ending")
        assert self._write_back is not None
        self._write_back.has_examples = any(
            "is_hypothesis_test" in node.attributes for node in collected.nodes
        )
        if self._kept is not None and not self._config.option.collectonly:
            with as_pytest_errors():
                self._kept.begin()
        self._runner = self._make_runner(collected)

    def _last_machine(self) -> AbstractContextManager[RunnerMachine]:
        assert self._runner is not None
        return self._runner.last()

    def _is_whole(self) -> bool:
        """Return True if one machine runs the whole session: its pytest sees all tests, as natively."""
        option = self._config.option
        divided = getattr(option, "numprocesses", None) or getattr(option, "tx", None)
        assert self._backend is not None
        is_worker = hasattr(self._config, "workerinput")
        return self._backend.options.isolation == "session" and not (divided or is_worker)

    def _release(self) -> None:
        if self._runner is not None:
            self._runner.release()

    def _make_plan(self, backend: Backend, wanted: WantedFiles) -> CollectPlan:
        config, option = self._config, self._config.option
        arguments = ["-o", "addopts=", f"--rootdir={config.rootpath}", "--capture=fd"]
        verbose = getattr(option, "verbose", 0)  # without the terminal's plug-in there is no such option
        if verbose > 0:
            arguments.append(f"--verbosity={verbose}")
        return CollectPlan(
            arguments=(
                *arguments,
                *self._arguments.guest,
                *backend.options.arguments,
                *(word for words in option.microvm_args or () for word in words),
            ),
            directory=config.invocation_params.dir,
            rootdir=config.rootpath,
            workspace=workspace_of(config),
            environment=guest_environment(self._guest_plugins, config, self._launch),
            timeout=backend.options.collect_timeout,
            whole=self._is_whole(),
            debug=self._look() if self._arguments.is_told(DEBUGGING) else None,
            coverage=None if self._coverage is None else self._coverage.settings,
            folders=folders_of(self._arguments.users, self._arguments.arity, self._places(backend.options)),
            outside=tuple((place.path, place.is_folder) for place in wanted.outside),
        )

    def _look(self) -> dict[str, bool]:
        """Return how pytest writes to this computer's terminal: with colours, and with those in code."""
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None:
            return {}
        return {name: getattr(terminal._tw, name) for name in ("hasmarkup", "code_highlight")}  # noqa: SLF001

    def _refuse_linked(self, path: str | None) -> None:
        if path is not None:
            refuse_links(workspace_of(self._config), self._config.invocation_params.dir / path)

    def _named_paths(self) -> list[Path]:
        directory = self._config.invocation_params.dir
        return [directory / word.partition("::")[0] for word in self._config.args]

    @cached_property
    def _display(self) -> LiveDisplay:
        return LiveDisplay(self._config)

    @cached_property
    def _progress(self) -> TerminalProgress:
        return TerminalProgress(self._config)
