"""``pytest-microvm python``: run Python in its own machine, connected to this process's stdin and stdout."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.cli.machine_options import add_machine_options, machine_spec
from pytest_microvm.cli.run import exit_statuses, variable
from pytest_microvm.cli.run_as import RunAs, add_user_option
from pytest_microvm.errors import UsageError
from pytest_microvm.host.host import Host
from pytest_microvm.machine.relay import plainly, shell_status
from pytest_microvm.suite.template_chain import workspace_step
from pytest_microvm.suite.worker_modules import ENVIRONMENT, worker_step
from pytest_microvm.suite.workspace import scan
from pytest_microvm.untrusted.nofollow import refuse_links
from pytest_microvm.untrusted.text import sanitize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_microvm.templates.chain import Base, TemplateStep

_DESCRIPTION = """\
Run Python in a machine of its own. Its stdin and stdout are this command's, byte by byte and unbuffered; its
stderr is passed on as safe text. The machine ends with it, and when nobody is left at the other end.
"""
_EPILOG = """\
One worker, one machine, with plain pytest-xdist:
  pytest -d --tx '2*popen//python=pytest-microvm python --xdist --workspace .'
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "python",
        help="run Python in a machine of its own, on stdin and stdout",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_machine_options(parser)
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="a variable")
    parser.add_argument(
        "--workdir", metavar="PATH", help="its working directory (default: this one, with --workspace)"
    )
    add_user_option(parser, "root")
    parser.add_argument(
        "--workspace",
        metavar="DIR",
        help="a project to copy to the same absolute path, without what git ignores",
    )
    parser.add_argument(
        "--xdist", action="store_true", help="copy the pytest-xdist and execnet that are installed here"
    )
    parser.add_argument("--quiet", action="store_true", help="print only errors and warnings")
    words = parser.add_argument_group("what Python runs")
    words.add_argument("-u", action="store_true", help="ignored: output is never buffered")
    words.add_argument("-B", action="store_true", help="write no .pyc files")
    what = words.add_mutually_exclusive_group()
    what.add_argument("-c", nargs=argparse.REMAINDER, metavar=("CODE", "ARGUMENT"), help="this code")
    what.add_argument("-m", nargs=argparse.REMAINDER, metavar=("MODULE", "ARGUMENT"), help="this module")
    words.add_argument(
        "script",
        nargs=argparse.REMAINDER,
        metavar="FILE",
        help="this file in the machine, with its arguments",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    command = _command(arguments)
    spec = machine_spec(arguments, "pytest-microvm python")
    workspace = Path(os.path.abspath(arguments.workspace)) if arguments.workspace else None  # noqa: PTH100
    if workspace:
        refuse_links(Path.cwd(), workspace)
    environment = ENVIRONMENT if arguments.xdist else {}
    environment = {**environment, **dict(variable(text) for text in arguments.env)}
    host = Host(project=Path.cwd(), say=lambda line: _say(arguments, line), lock="ignore")

    def steps(base: Base) -> Sequence[TemplateStep]:
        made = [worker_step(base)] if arguments.xdist else []
        return made if workspace is None else [*made, workspace_step(scan(workspace))]

    try:
        run_as = RunAs(arguments.user, lambda line: _say(arguments, line), create=True)
        with exit_statuses() as status, host.start(spec, steps=steps, owner=run_as) as machine:
            _end_with_the_reader()
            status.code = shell_status(
                plainly(
                    machine,
                    command,
                    raw=True,
                    raw_stderr=False,
                    env=environment,
                    cwd=arguments.workdir or _workdir(workspace),
                    user=arguments.user,
                )
            )
        return status.code
    finally:
        host.close()


def _command(arguments: argparse.Namespace) -> list[str]:
    command = ["python3", "-u", *(["-B"] if arguments.B else [])]
    for option in ("c", "m"):
        words = getattr(arguments, option)
        if words == []:
            raise UsageError(f"-{option} needs a value", resolution="as Python does")
        if words:
            return [*command, f"-{option}", *words]
    return [*command, *arguments.script]


def _workdir(workspace: Path | None) -> str | None:
    """Return Python's working directory: the current one if the machine has it, else the project."""
    if workspace is None:
        return None
    here = Path.cwd()
    return str(here if here.is_relative_to(workspace) else workspace)


def _end_with_the_reader() -> None:
    """End this process, and the machine with it, when the reader of its output has exited.

    A Python that computes and never writes would not notice. poll(2) reports POLLERR for a pipe without
    readers and POLLHUP for a closed terminal; for a file it reports nothing.
    """

    def watch() -> None:
        poller = select.poll()
        poller.register(sys.stdout.fileno(), 0)
        poller.poll()
        os.kill(os.getpid(), signal.SIGTERM)  # raises an interrupt, which ends the machine

    threading.Thread(target=watch, name="microvm-reader", daemon=True).start()


def _say(arguments: argparse.Namespace, line: str) -> None:
    if not arguments.quiet or line.startswith("WARNING"):
        print(f"pytest-microvm: {sanitize(line)}", file=sys.stderr)
