"""The runner: a pytest process in the guest that collects once and runs the tests it is asked for.

The host speaks first. ``collect`` starts a pytest session that stays inside its test loop, where
``resume``, ``run`` and ``finish`` are answered; a clone of the machine continues in that very loop.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from typing import TYPE_CHECKING

from pytest_microvm.guest.port import Port, open_port
from pytest_microvm.guest.runner_requests import Runner

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_microvm.guest.runner_preload import HeldModules

_HIGH_FD = 900  # above what a test closes when it closes "all" descriptors, below the usual limit


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
