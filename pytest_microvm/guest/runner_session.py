"""A pytest session that waits in its test loop and runs tests one by one, on request."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from pytest_microvm.guest import limits, site_paths
from pytest_microvm.guest.changes import Watch
from pytest_microvm.guest.runner_collection import CollectionRecorder
from pytest_microvm.guest.runner_controller import (
    ControllerProcess,
    become_worker,
    encoded,
    exchanging_plugins,
    failed_end,
    fork_controller,
    modules_that_get_outputs,
    speaking_plugins,
    specify_exchange,
    status_plugins,
)
from pytest_microvm.guest.runner_coverage import CoverageRecorder, recorder_of
from pytest_microvm.guest.runner_end import EndOfSession, forget_later_errors, stop_as_told
from pytest_microvm.guest.runner_measuring import Measurement, start_measuring
from pytest_microvm.guest.runner_output import Nowhere, OutsideOutput, RelayProcess
from pytest_microvm.guest.runner_output_limit import OutputMeter
from pytest_microvm.guest.runner_records import report_record, warning_record
from pytest_microvm.guest.runner_setup_show import SetupShow
from pytest_microvm.guest.runner_sharing import asks_for_worker, sharing_plugins
from pytest_microvm.guest.runner_telling import TestRelay
from pytest_microvm.guest.runner_tmp import TemporaryFolders
from pytest_microvm.guest.runner_wide import WideFixtures

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from pytest_microvm.guest.runner_requests import Runner

_REASONS = {0: "shown", 2: "interrupt", 4: "usage"}
_MARKER = "microvm(**limits): what this test may use (timeout, output, pids, cpu_seconds, lifetime, network)"


def serve(runner: Runner) -> None:
    """Wait for ``collect`` and run a session for it.

    Raises:
        EOFError: The host has closed the port.
    """
    done = site_paths.lines_in_effect()
    while True:
        request = runner.next_request()
        op = request.get("op")
        if op == "resume":
            runner.answer_resume(request)
        elif op == "unpack":
            runner.unpack(request)
        elif op == "collect":
            site_paths.catch_up(done)
            _collect(runner, request)
            return
        else:
            runner.refuse(request, "OrderError", f"{op!r} before 'collect'")


def _collect(runner: Runner, request: dict[str, Any]) -> None:
    """Act as ``python -m pytest`` in the invocation directory, up to and including the test loop."""
    arguments = [str(argument) for argument in request["args"]]
    os.environ.update(request.get("env") or {})
    for folder in (request["cwd"], *request["folders"]):
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
    os.chdir(request["cwd"])
    os.environ["PWD"] = os.getcwd()
    sys.path.insert(0, os.getcwd())
    sys.path[1:1] = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.argv = [os.path.join(os.path.dirname(pytest.__file__), "__main__.py"), *arguments]
    if runner.held is not None:
        runner.held.install()
    controller = fork_controller(runner.close, arguments, request["coverage"])
    runner.pid = os.getpid()
    relay = RelayProcess(runner.port.fd)  # like the controller, it is forked while this process is small
    measurement = _measurement(runner, request["coverage"])
    session = _SessionPlugin(
        runner, request, runner.open_stream(request), controller, relay=relay, measurement=measurement
    )
    sys.stdout, sys.stderr = session.out, session.err
    code: object
    try:
        plugins = [session, session.collection, *([] if session.end is None else [session.end])]
        code = pytest.main(arguments, plugins=plugins)
    except SystemExit as error:
        code, session.reason = error.code if isinstance(error.code, int) else 1, f"SystemExit: {error.code}"
    except EOFError:
        raise
    except BaseException:  # noqa: BLE001 - any failure must be reported to the host
        code, session.reason = 3, traceback.format_exc()
    runner.leave_if_forked()
    session.ended(int(code))


def _measurement(runner: Runner, settings: dict[str, Any] | None) -> Measurement | None:
    if settings is None:
        return None
    measurement = start_measuring(settings)
    if runner.held is not None:
        runner.held.is_measured = measurement.measures
    return measurement


class _SessionPlugin:
    """The plug-in that watches collection and takes over the test loop."""

    def __init__(
        self,
        runner: Runner,
        request: dict[str, Any],
        stream: int,
        controller: ControllerProcess,
        *,
        relay: RelayProcess,
        measurement: Measurement | None,
    ) -> None:
        self.out = OutsideOutput()
        self.err = OutsideOutput()
        self.reason = ""
        self._runner = runner
        self._controller = controller
        self._relay = TestRelay(runner, relay, (self.out, self.err))
        self.end = EndOfSession() if request["whole"] else None  # this session is all there is
        self._exchanging = False
        self._measurement = measurement  # of this process, as of the host's
        self._coverage: CoverageRecorder | None = None  # pytest-cov's
        self._coverage_of_collection: dict[str, Any] | None = None
        self._naming = False
        self._request: dict[str, Any] | None = request
        self._stream = stream
        self.collection = CollectionRecorder(self.out, self.err)
        self._records = self.collection.records
        self._told_of_collection: list[Any] = []
        self._watch: Watch | None = None
        self._finish: dict[str, Any] | None = None
        self._wide: WideFixtures | None = None
        self._folders: TemporaryFolders | None = None
        self._meter = OutputMeter()

    # Collection

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_load_initial_conftests(self, early_config: Any) -> Generator[None, Any, None]:
        specify_exchange(early_config)
        outcome = yield
        if outcome.excinfo is None and self.end is None and exchanging_plugins(early_config):
            self._exchanging = become_worker(self._controller, early_config)

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config
        config.addinivalue_line("markers", _MARKER)
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:  # the host has the terminal
            terminal._tw._file = Nowhere()

    def pytest_warning_recorded(self, warning_message: Any, when: str, nodeid: str) -> None:
        self._records.append(warning_record(warning_message, when, nodeid))

    # The test loop

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        nodes = self.collection.nodes
        assert nodes is not None
        assert self._request is not None
        order = [nodes.number(item) for item in session.items]
        self.collection.record_printed()
        self._printed()
        lines = [*self.collection.lines(), *self._executed()]
        self._naming = bool(status_plugins(self._config))
        if speaking := speaking_plugins(self._config):
            if self.end is None:
                self._controller.start()
            outputs = modules_that_get_outputs(self._config) if self._exchanging else set()
            if outputs == {"pytest_cov"}:
                self._record_coverage()
            lines.append({"k": "ending", "plugins": speaking, "outputs": bool(outputs)})
        lines += [
            {"k": "sharing", "plugin": plugin, "isolation": isolation}
            for plugin, isolation in sharing_plugins(self._config, session.items)
        ]
        worker = asks_for_worker(self._config, session.items)
        markers = self._config.getini("markers")
        lines.append({"k": "items", "order": order, "markers": markers, "worker": worker})
        self._told_of_collection = self.collection.end()
        self._meter.install(self._config)
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and self._config.getoption("setupshow", False):
            self._config.pluginmanager.register(SetupShow(terminal, self.out), "microvm_setup_show")
        self._relay.install(self._config, self._request["debug"])
        self._know_wide_fixtures(session, lines)
        if self._measurement is not None:
            self._measurement.settle()
        self._make_base_folder()
        self._start_watching(self._request)
        self._runner.settle()
        gc.collect()
        gc.freeze()  # a clone shares these pages; a collection must not touch them
        request, self._request = self._request, None
        self._runner.send_lines(self._stream, [*lines, {"k": "end"}])
        self._runner.reply(request, {})
        self._loop(session)
        if self._finish is not None and self._finish["op"] == "end":
            forget_later_errors(session, terminal, self._finish)
            stop_as_told(session, terminal, self._finish)
        return True

    def _know_wide_fixtures(self, session: pytest.Session, lines: list[dict[str, Any]]) -> None:
        """Tell the host which tests need which wide fixtures, unless this is an unknown version of pytest."""
        with contextlib.suppress(AttributeError):
            wide = WideFixtures(session)
            if wide.fixtures:
                lines.append({"k": "wide", "fixtures": wide.fixtures, "needed": wide.needed})
                self._config.pluginmanager.register(wide, "microvm_wide")
                self._wide = wide

    def _record_coverage(self) -> None:
        """Record coverage without a database from now on, if possible."""
        self._coverage = recorder_of(self._config)
        if self._coverage is not None:
            self._coverage_of_collection = self._coverage.take()

    @staticmethod
    def _coverage_record(coverage: CoverageRecorder) -> dict[str, Any]:
        return {"k": "output", "output": encoded(coverage.take()), "written": []}

    def _make_base_folder(self) -> None:
        """Create the base folder of ``tmp_path`` now, or each clone would create it for its first such test.

        A user's ``--basetemp`` is left to that test, because pytest empties that folder.
        """
        factory = getattr(self._config, "_tmp_path_factory", None)
        if factory is not None and not self._config.getoption("basetemp", None):
            factory.getbasetemp()

    def _know_folders(self, request: dict[str, Any]) -> None:
        """Know which temporary folders are those of the test that begins, if the host asks for them."""
        factory = getattr(self._config, "_tmp_path_factory", None)
        if self._folders is None and request.get("temporary") and factory is not None:
            self._folders = TemporaryFolders(factory)
            self._config.pluginmanager.register(self._folders, "microvm_temporary_folders")
        if self._folders is not None:
            self._folders.begin()

    def _start_watching(self, request: dict[str, Any]) -> None:
        """Watch the workspace, and paths outside that the user has named, for files that tests write."""
        with contextlib.suppress(OSError):
            self._watch = Watch(request["top"], request["outside"])

    def _written(self) -> list[str]:
        try:
            return [] if self._watch is None else self._watch.told()
        except Exception:  # noqa: BLE001 - a test may have closed or replaced what the watch needs
            return []

    def _executed(self) -> list[dict[str, Any]]:
        """Return a record of what was executed since the last one, if this process is measured."""
        return [] if self._measurement is None else [self._measurement.take()]

    def _loop(self, session: pytest.Session) -> None:
        runner = self._runner
        while True:
            request = runner.next_request()
            op = request.get("op")
            if op == "run":
                self._run(session, request)
            elif op == "prepare" and self._wide is not None:
                self._prepare(self._wide, request)
            elif op == "tear down" and self._wide is not None:
                self._tear_down(self._wide, request)
            elif op == "resume":
                runner.answer_resume(request)
            elif op == "end" and self.end is not None:
                self._finish = request
                self._begin_end(self.end, request)
                return
            elif op == "end":
                self._end_run(request)
            elif op == "finish" and self._coverage is not None and not request["session"]:
                runner.send_lines(runner.open_stream(request), [self._coverage_record(self._coverage)])
                runner.reply(request, {"exitstatus": 0, "printed": self._printed()})
            elif op == "finish":
                self._finish = request
                return
            else:
                runner.refuse(request, "OrderError", f"{op!r} is not possible after 'collect'")

    def _begin_end(self, end: EndOfSession, request: dict[str, Any]) -> None:
        """Let what this session writes from now on be shown by the host."""
        self._stream = self._runner.open_stream(request)
        self._runner.reply(request, {})
        self._printed()
        if self._relay.live is not None:
            self._relay.live.stop()
        sys.stdout = sys.stderr = end.out
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal._tw._file = end.out
            terminal._tw.hasmarkup = False
            terminal._tw.fullwidth = int(request["width"])
        end.begin(terminal)

    def _end_run(self, request: dict[str, Any]) -> None:
        """Pass the run's records to the controller; tell the host what it said, and which files changed."""
        runner = self._runner
        stream = runner.open_stream(request)
        runner.reply(request, {})
        self._written()
        asked = {
            "width": request["width"],
            "tests": request["tests"],
            "coverage": self._coverage_of_collection,
            **{name: request[name] for name in ("interrupted", "stopped", "errors")},
            "collected": json.dumps(self._told_of_collection),
        }
        ended = self._controller.end(asked, runner.read_stream(stream))
        runner.send_lines(stream, [{"k": "ended", **ended, "written": self._written()}])

    def _run(self, session: pytest.Session, request: dict[str, Any]) -> None:
        stream = self._begin_work(request)
        following = request.get("next")
        item = session.items[request["item"]]
        nextitem = session.items[following] if following is not None else None
        if self._wide is not None:
            shown = request.get("shown", 0)
            self._wide.begin(request["item"], request["wide"], lambda: self._tell_need(stream), shown)
            if self._relay.live is not None:  # a set-up of an earlier run has been captured
                self._relay.live.write(self._wide.output(keep=request["capture"] != "no"))
        self._work(lambda: self._config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem))
        if request.get("limited") and limits.refused_forks():
            limits.tell_of_refusal()  # before the host learns that the test has ended
        if following is None and self._coverage is not None:
            self._records.append(self._coverage_record(self._coverage))
        stop = session.shouldstop or session.shouldfail
        self._end_work(stream, stop=str(stop) if stop else None)

    def _prepare(self, wide: WideFixtures, request: dict[str, Any]) -> None:
        """Set up the wide fixtures of a test, for this machine's copies."""
        stream = self._begin_work(request)
        self._runner.has_worked = True
        stands: list[bool] = []
        self._work(lambda: stands.append(wide.prepare(request["item"], request["count"])))
        self._end_work(stream, stop=None, standing=wide.standing, stands=stands == [True])

    def _tear_down(self, wide: WideFixtures, request: dict[str, Any]) -> None:
        """Tear down the wide fixtures that the next test does not need."""
        stream = self._begin_work(request)

        def work() -> None:
            report = wide.tear_down(request["item"], request["next"])
            if report is not None:
                self._records.append(report_record(self._config, report))

        self._work(work)
        self._end_work(stream, stop=None, standing=wide.standing)

    def _tell_need(self, stream: int) -> None:
        """Tell the host that the test is about to set up a wide fixture; wait for the end of this machine."""
        self._relay.end()
        self._runner.send_lines(stream, [{"k": "needs"}])
        self._linger()

    def _begin_work(self, request: dict[str, Any]) -> int:
        """Get ready for a request that runs the project's code; return the stream for its records."""
        self._records = []
        self._meter.begin(int(request.get("output", 0)))
        if request.get("live") is not None:
            self._relay.begin_live(int(request["live"]), str(request["capture"]))
        if request.get("pids") is not None:
            limits.limit_processes(int(request["pids"]))
        stream = self._runner.open_stream(request)
        self._know_folders(request)
        self._written()  # what the host has put there does not count
        self._runner.reply(request, {})  # from here on any failure is caused by the project's code
        self._relay.begin(stream)
        return stream

    def _work(self, work: Callable[[], object]) -> None:
        """Run the project's code; record how it ended the session, if it did."""
        records = self._records
        try:
            work()
        except pytest.exit.Exception as error:
            records.append({"k": "exit", "code": error.returncode, "reason": "exit", "text": str(error.msg)})
        except KeyboardInterrupt as error:
            records.append({"k": "exit", "code": 2, "reason": "interrupt", "text": str(error)})
        except BaseException:  # noqa: BLE001 - a broken hook of the project: pytest calls it INTERNALERROR
            records.append({"k": "exit", "code": 3, "reason": "internal", "text": traceback.format_exc()})
        self._runner.leave_if_forked()
        self._relay.end()

    def _end_work(self, stream: int, **end: Any) -> None:
        """Send the records of a request that ran the project's code."""
        records = self._records
        if self._meter.exceeded:
            records.append({"k": "excess", "printed": self._meter.printed})
        if self._relay.was_debugged:
            for record in records:
                record["debugged"] = True
        cost = [] if self._wide is None else self._wide.cost()
        temporary = None if self._folders is None else self._folders.found()
        end = {
            "k": "end",
            "printed": self._printed(),
            "written": self._written(),
            "wide": cost,
            "temporary": temporary,
            **end,
        }
        self._runner.send_lines(stream, [*records, *self._executed(), end])

    def pytest_runtest_logreport(self, report: Any) -> None:
        record = report_record(self._config, report)
        if self._naming:
            record["status"] = self._config.hook.pytest_report_teststatus(report=report, config=self._config)
        self._records.append(record)
        self._relay.reported(report)

    def _printed(self) -> str:
        text = self.out.getvalue() + self.err.getvalue()
        if text:
            for file in (self.out, self.err):
                file.seek(0)
                file.truncate()
        return text

    # The end

    def pytest_internalerror(self, excrepr: Any) -> None:
        self.reason = "\n".join(f"INTERNALERROR> {line}" for line in str(excrepr).splitlines())

    def pytest_keyboard_interrupt(self, excinfo: Any) -> None:
        self.reason = str(getattr(excinfo.value, "msg", None) or excinfo.typename)

    def ended(self, code: int) -> None:
        """Report the end of the session to the host, whether before or after its test loop."""
        if self._request is not None:
            reason = _REASONS.get(code, "internal")
            text = self.out.getvalue() if code == 0 else self.err.getvalue() or self.reason
            if reason != "usage" and self.reason:
                text = self.reason
            ending = {"k": "exit", "code": code, "reason": reason, "text": text}
            self._runner.send_lines(self._stream, [*self.collection.lines(), *self._executed(), ending])
            self._runner.reply(self._request, {})
        elif self._finish is not None and self.end is not None and self._finish.get("op") == "end":
            said = self.end.said()
            if said is not None:
                said["finish"] += self._printed()  # by what kept the streams of the session's begin
            ended = failed_end(code, self.end.out.getvalue()) if said is None else {"status": code, **said}
            ended["coverage"] = self._executed()
            self._runner.send_lines(self._stream, [{"k": "ended", **ended, "written": self._written()}])
            self._linger()
        elif self._finish is not None:
            self._runner.send_lines(self._runner.open_stream(self._finish), [self._output_record()])
            self._runner.reply(self._finish, {"exitstatus": code, "printed": self._printed()[:100_000]})
            self._linger()

    def _linger(self) -> None:
        """Stay alive for the host, which may copy files from the machine: it ends with this process.

        Raises:
            EOFError: The host has closed the port.
        """
        while True:
            self._runner.refuse(self._runner.next_request(), "OrderError", "the session has finished")

    def _output_record(self) -> dict[str, Any]:
        """Return what plug-ins send to the controller."""
        try:
            output = encoded(getattr(self._config, "workeroutput", {}))
        except TypeError:  # a value that cannot be transferred
            output = None
        return {"k": "output", "output": output, "written": self._written()}
