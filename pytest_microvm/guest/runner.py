"""The runner: a pytest process in the guest that collects once and runs tests on request.

The host sends the first message. ``collect`` starts a pytest session that stays inside its test loop, which
answers ``resume``, ``run`` and ``finish``; a clone of the machine continues in the same loop.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from pytest_microvm.guest.port import Port, open_port, out_of_the_way
from pytest_microvm.guest.runner_requests import Runner

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_microvm.guest.runner_preload import HeldModules

_ONLY_OURS = ("tarfile",)  # modules that neither Python nor pytest loads at start, but our code does


def main(arguments: list[str]) -> int:
    """Serve on the port called ``runner``.

    Args:
        arguments: The arguments after the code folder on the command line: ``--fd N`` for a descriptor
            instead of the port, ``--preload`` to import the installed plug-ins' modules before the hello,
            ``--coverage`` to import coverage.
    """
    fd = int(arguments[arguments.index("--fd") + 1]) if "--fd" in arguments else open_port("runner")
    from pytest_microvm.guest import resume  # noqa: PLC0415 - before the code folder leaves sys.path

    runner = Runner(Port(out_of_the_way(fd), "runner"), resume.apply, resume.outdate_openssl)
    start(runner, preload="--preload" in arguments, coverage="--coverage" in arguments)
    return 0


def start(runner: Runner, *, preload: bool = False, coverage: bool = False) -> None:
    """Load pytest, remove the code folder (``sys.path[0]``) and serve until the host disconnects.

    Args:
        runner: The connection to the host.
        preload: Whether to import the installed plug-ins' modules before the hello to the host.
        coverage: Whether sessions are measured as by ``coverage run``, which has loaded coverage by then.
    """
    code_folder = sys.path[0]
    before = set(sys.modules)
    serve, import_ahead = _import_session()
    _forget_own_code(code_folder, before)
    if coverage:
        with contextlib.suppress(ImportError):  # the session says so
            import coverage as _coverage  # noqa: F401, PLC0415 - before plug-ins that would load it
    if preload:
        runner.held = import_ahead()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(runner)


def _import_session() -> tuple[Callable[[Runner], None], Callable[[], HeldModules | None]]:
    """Import and return two functions: one serves the host, the other preloads the plug-ins' modules."""
    try:
        from pytest_microvm.guest import runner_session, runner_warm_up  # noqa: PLC0415 - they need pytest
    except ModuleNotFoundError as error:
        if error.name not in ("pytest", "_pytest"):
            raise
        return _serve_without_pytest, lambda: None
    runner_warm_up.warm_up()
    try:
        from pytest_microvm.guest import runner_preload  # noqa: PLC0415 - it needs pytest's internals
    except ImportError:  # an unknown pytest version: it imports plug-ins in the session
        return runner_session.serve, lambda: None
    return runner_session.serve, runner_preload.preload


def _serve_without_pytest(runner: Runner) -> None:
    """Answer every ``collect`` with an error: this machine's Python has no pytest."""
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


def _forget_own_code(code_folder: str, before: set[str]) -> None:
    """Remove our modules from ``sys.path`` and ``sys.modules``, so that the project cannot import them.

    Args:
        code_folder: The folder that they are imported from.
        before: The modules that were loaded before them.
    """
    sys.path[:] = [entry for entry in sys.path if entry != code_folder]
    own = [name for name in sys.modules if name.partition(".")[0] == "pytest_microvm"]
    own += [name for name in _ONLY_OURS if name in sys.modules and name not in before]
    _KEPT.extend(sys.modules.pop(name) for name in own)


_KEPT: list[object] = []  # modules that are no longer in sys.modules but still run
