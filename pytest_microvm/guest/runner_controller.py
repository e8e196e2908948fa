"""What pytest-xdist's controller is to plug-ins: a process that sees all reports and speaks at the end.

A runner is to plug-ins what a worker of pytest-xdist is. The controller is its parent, as with xdist. It is
forked before pytest starts, so that what it starts for the tests runs in every copy of the machine. It gives
``workerinput``, and in the last machine of a run it gets every test's reports and every machine's
``workeroutput``, and ends its session: plug-ins and the project's hooks write their reports and summaries.
"""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import socket
import struct
import sys
import traceback
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_microvm.guest import runner_coverage
from pytest_microvm.guest.runner_coverage import MergedCoverage
from pytest_microvm.guest.runner_end import EndOfSession, stop_as_told, until_stopped
from pytest_microvm.guest.runner_measuring import Measurement, start_measuring

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

_LENGTH = struct.Struct("!I")
_EXCHANGING = ("pytest_configure_node", "pytest_testnodedown")
_SPEAKING = ("pytest_sessionfinish", "pytest_terminal_summary", "pytest_unconfigure", "pytest_testnodedown")
_OURS = ("_pytest", "pytest_microvm", "xdist")
_EARLY = ("pytest_cov",)  # registers its hooks before workers are known, if it is to measure at all
_STATISTICS = "hypothesis_show_statistics"  # without it, hypothesis has nothing to say


def status_plugins(config: pytest.Config) -> list[str]:
    """Return the names of plug-ins, conftest files included, that name the outcomes of tests."""
    return _plugins_with(config, ("pytest_report_teststatus",))


def exchanging_plugins(config: pytest.Config) -> list[str]:
    """Return the names of plug-ins that exchange data between xdist's controller and its workers.

    Some register the hooks for that only when pytest is configured, if there is xdist, which is too late.
    """
    found = _plugins_with(config, _EXCHANGING)
    return found + [name for name, plugin in config.pluginmanager.list_name_plugin() if _may_exchange(plugin)]


def _may_exchange(plugin: Any) -> bool:
    """Return True if the module of a third-party plug-in defines a class that gets workers' outputs."""
    module = plugin if isinstance(plugin, ModuleType) else sys.modules.get(type(plugin).__module__)
    if module is None or module.__name__.partition(".")[0] in _OURS + _EARLY:
        return False
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    return any(
        each.__module__ == module.__name__ and hasattr(each, "pytest_testnodedown") for each in classes
    )


def modules_that_get_outputs(config: pytest.Config) -> set[str]:
    """Return the top-level modules of plug-ins that get each worker's ``workeroutput``."""
    caller = getattr(config.hook, "pytest_testnodedown", None)
    found = caller.get_hookimpls() if caller is not None else ()
    return {_top(implementation) for implementation in found}.difference(_OURS)


def speaking_plugins(config: pytest.Config) -> list[str]:
    """Return the names of plug-ins, conftest files included, that do something at the end of a session."""
    return _plugins_with(config, _SPEAKING)


def _plugins_with(config: pytest.Config, hooks: tuple[str, ...]) -> list[str]:
    found = {}
    for hook in hooks:
        caller = getattr(config.hook, hook, None)
        for implementation in caller.get_hookimpls() if caller is not None else ():
            top = _top(implementation)
            if top in _OURS or (
                top == "_hypothesis_pytestplugin" and not config.getoption(_STATISTICS, False)
            ):
                continue
            found[_name(implementation)] = True
    return list(found)


def _top(implementation: Any) -> str:
    return getattr(implementation.function, "__module__", "").partition(".")[0]


def _name(implementation: Any) -> str:
    file = getattr(implementation.plugin, "__file__", "")
    return file if os.path.basename(file) == "conftest.py" else str(implementation.plugin_name)


class ExchangeHooks:
    """The hooks of pytest-xdist that plug-ins use to exchange data, where xdist is not installed."""

    @pytest.hookspec
    def pytest_configure_node(self, node: Any) -> None:
        """Configure a worker before it starts."""

    @pytest.hookspec
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Handle the end of a worker."""


def specify_exchange(config: pytest.Config) -> None:
    """Specify the :class:`ExchangeHooks` unless xdist does; to plug-ins that ask, there is xdist then."""
    callers = [getattr(config.hook, name, None) for name in _EXCHANGING]
    if not any(caller is not None and caller.has_spec() for caller in callers):
        config.pluginmanager.add_hookspecs(ExchangeHooks)


def stand_in_for_xdist(config: pytest.Config) -> None:
    """Let plug-ins that ask for xdist before they exchange data find it, where it is not installed."""
    if not config.pluginmanager.hasplugin("xdist"):
        if hasattr(config.pluginmanager, "unblock"):  # since pluggy 1.4: after -p no:xdist
            config.pluginmanager.unblock("xdist")
        config.pluginmanager.register(_StandIn(), "xdist")


class _StandIn:
    """A plug-in without hooks."""


class ControllerProcess:
    """The worker's connection to its controller.

    Args:
        sock: A connected socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._started = False

    def start(self) -> dict[str, Any] | None:
        """Start the controller's session; return the worker's ``workerinput``.

        ``None``: it has been started before, or its session failed, which :meth:`end` reports.
        """
        if self._started:
            return None
        self._started = True
        _send(self._sock, {"op": "start"})
        return _receive(self._sock).get("workerinput")

    def end(self, request: dict[str, Any], pieces: Iterator[bytes]) -> dict[str, Any]:
        """Give the controller all records of the run; return what it said and its exit status."""
        _send(self._sock, {"op": "end", **request})
        for piece in pieces:
            self._sock.sendall(piece)
        self._sock.shutdown(socket.SHUT_WR)
        return _receive(self._sock)


def fork_controller(
    close: Callable[[], None], arguments: list[str], coverage: dict[str, Any] | None
) -> ControllerProcess:
    """Fork; return the connection in the child, which goes on as the worker. The parent serves, then exits.

    Args:
        close: Called in the parent, to close what only the worker uses.
        arguments: pytest's arguments.
        coverage: The settings with which its session is measured, if it is.
    """
    ours, theirs = socket.socketpair()
    worker = os.fork()
    if worker == 0:
        theirs.close()
        return ControllerProcess(ours)
    ours.close()
    close()
    signal.signal(signal.SIGCHLD, lambda *_: _leave_with(worker))
    try:
        _serve(theirs, arguments, coverage)
    finally:
        theirs.close()
        _leave_with(worker, wait=True)
    raise AssertionError("unreachable")


def _leave_with(worker: int, *, wait: bool = False) -> None:
    """Exit as the worker did, if it has ended."""
    try:
        pid, status = os.waitpid(worker, 0 if wait else os.WNOHANG)
    except ChildProcessError:
        os._exit(1)
    if pid == 0:
        return
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _serve(sock: socket.socket, arguments: list[str], coverage: dict[str, Any] | None) -> None:
    """Run the controller's session once the worker asks for it."""
    while not select.select([sock], [], [], None)[0]:
        pass
    try:
        _receive(sock)
    except EOFError:
        return
    session = _ControllerSession(sock, None if coverage is None else start_measuring(coverage))
    sys.stdout = sys.stderr = session.out
    socket.gethostname = lambda: "localhost"  # not the worker's: its files are not where the controller's are
    try:
        code = int(pytest.main(arguments, plugins=[session]))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - a hook failed; a session that did not end fails the run
        session.out.write(traceback.format_exc())
        code = 3
    session.ended(code)


class _ControllerSession(EndOfSession):
    """The plug-in that replaces collection and test loop by the run's records."""

    def __init__(self, sock: socket.socket, measurement: Measurement | None) -> None:
        super().__init__()
        self._sock = sock
        self._measurement = measurement
        self._configured = False

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_load_initial_conftests(self, early_config: pytest.Config) -> Generator[None, Any, None]:
        specify_exchange(early_config)
        early_config.known_args_namespace.dist = "load"  # by this, plug-ins know early that there are workers
        outcome = yield
        if outcome.excinfo is None:
            stand_in_for_xdist(early_config)

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config
        config.option.numprocesses = 1  # late: xdist would start workers, and plug-ins only have to know
        self._terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
        if self._terminal is not None:
            self._terminal._tw._file = self.out
            self._terminal._tw.hasmarkup = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> bool:
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        node = _WorkerNode(self._config, 0)
        self._config.hook.pytest_configure_node(node=node)
        self._configured = True
        _send(self._sock, {"workerinput": node.workerinput})
        try:
            request = _receive(self._sock)
        except EOFError:  # no machine of this template is the last one
            os._exit(0)
        if self._terminal is not None:
            self._terminal._tw.fullwidth = int(request["width"])
        session.testscollected = int(request["tests"])
        for data in until_stopped(json.loads(request["collected"]), request["errors"]):
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
            self._config.hook.pytest_collectreport(report=report)
        self._replay(request.get("coverage"))
        self.begin(self._terminal)
        stop_as_told(session, self._terminal, request)
        return True

    def _replay(self, collected: dict[str, Any] | None) -> None:
        """Call the hooks for all records.

        Args:
            collected: The coverage of collection, if machines record coverage without a database.
        """
        hook = self._config.hook
        nodes: dict[str, _WorkerNode] = {}
        coverage = MergedCoverage()
        for line in self._sock.makefile("rb"):
            record = json.loads(line)
            node = nodes.setdefault(record["machine"], _WorkerNode(self._config, len(nodes)))
            if record["k"] == "down":
                output = record["output"]
                if output is not None:
                    node.workeroutput = decoded(output)
                    if collected is not None:
                        coverage.add(node.workeroutput)
                        continue
                error = "the machine ended without an output" if output is None else None
                hook.pytest_testnodedown(node=node, error=error)
                continue
            nodeid, location = record["nodeid"], tuple(record["location"])
            hook.pytest_runtest_logstart(nodeid=nodeid, location=location)
            for data in record["reports"]:
                report = hook.pytest_report_from_serializable(config=self._config, data=data)
                report.node = node
                hook.pytest_runtest_logreport(report=report)
            hook.pytest_runtest_logfinish(nodeid=nodeid, location=location)
        if collected is not None:
            coverage.add(collected)
            node = _WorkerNode(self._config, len(nodes))
            plugin: Any = self._config.pluginmanager.getplugin(runner_coverage.PLUGIN)
            node.workeroutput = coverage.as_worker_output(plugin.cov_controller)
            hook.pytest_testnodedown(node=node, error=None)

    def ended(self, code: int) -> None:
        """Tell the worker how the session ended."""
        said = self.said()
        executed = [] if self._measurement is None else [self._measurement.take()]
        if said is not None:
            _send(self._sock, {"status": code, **said, "coverage": executed})
            return
        answer = {**failed_end(code, self.out.getvalue()), "coverage": executed}
        try:
            if not self._configured:
                _send(self._sock, answer)
                _receive(self._sock)
            while self._sock.recv(65536):
                pass
        except EOFError:
            return
        _send(self._sock, answer)


def failed_end(code: int, text: str) -> dict[str, Any]:
    """Return the answer of a session that did not come to its end: what it wrote, and a status that fails."""
    return {"status": code or 3, "loop": text, "finish": "", "summary": ""}


class _WorkerNode:
    """A machine, shown to plug-ins as xdist shows a worker (``xdist.workermanage.WorkerController``)."""

    def __init__(self, config: pytest.Config, number: int) -> None:
        name = f"gw{number}"
        self.config = config
        self.workerinput = {
            "workerid": name,
            "workercount": 1,
            "testrunuid": "microvm",
            "mainargv": sys.argv[:],
        }
        versions = SimpleNamespace(
            platform=sys.platform, version_info=tuple(sys.version_info), executable=sys.executable
        )
        self.workerinfo = {
            "id": name,
            "version_info": tuple(sys.version_info),
            "sysplatform": sys.platform,
            "executable": sys.executable,
        }
        self._workerinfocache = ""  # pytest shows it in each failure
        self.gateway = SimpleNamespace(id=name, spec=SimpleNamespace(id=name), _rinfo=lambda: versions)
        self.nodemanager = SimpleNamespace(config=config, roots=[], testrunuid="microvm")
        self.workeroutput: dict[str, Any]

    def __repr__(self) -> str:
        return f"<Machine {self.gateway.id}>"


_TAG = "$type"


def encoded(value: Any) -> Any:
    """Return ``value``, of the types that xdist can transfer, as a JSON value that :func:`decoded` reverts.

    Raises:
        TypeError: It is of another type.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encoded(item) for item in value]
    if isinstance(value, bytes):
        return {_TAG: "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, (tuple, set, frozenset)):
        return {_TAG: type(value).__name__, "value": [encoded(item) for item in value]}
    if isinstance(value, dict):
        return {_TAG: "dict", "value": [[encoded(key), encoded(item)] for key, item in value.items()]}
    raise TypeError(f"{type(value).__name__} cannot be transferred between machines")


def decoded(value: Any) -> Any:
    """Return what :func:`encoded` was given."""
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind, content = value[_TAG], value["value"]
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "dict":
        return {decoded(key): decoded(item) for key, item in content}
    return _COLLECTIONS[kind](decoded(item) for item in content)


_COLLECTIONS: dict[str, Callable[[Iterator[Any]], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}


def _send(sock: socket.socket, message: dict[str, Any]) -> None:
    data = json.dumps(encoded(message)).encode()
    sock.sendall(_LENGTH.pack(len(data)) + data)


def _receive(sock: socket.socket) -> dict[str, Any]:
    (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
    message: dict[str, Any] = decoded(json.loads(_exactly(sock, length)))
    return message


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def become_worker(controller: ControllerProcess, config: Any) -> bool:
    """Give ``config`` what a worker of pytest-xdist has, from the controller; return whether it has it.

    It has not if the controller's session failed, as this one will.
    """
    workerinput = controller.start()
    if workerinput is None:
        return False
    stand_in_for_xdist(config)
    config.workerinput, config.workeroutput = workerinput, {}
    os.environ["PYTEST_XDIST_WORKER"] = workerinput["workerid"]
    os.environ["PYTEST_XDIST_WORKER_COUNT"] = str(workerinput["workercount"])
    os.environ["PYTEST_XDIST_TESTRUNUID"] = workerinput["testrunuid"]
    return True
