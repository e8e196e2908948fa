"""``pytest-microvm run``: run a command, for example an AI agent, in its own machine."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.cli.machine_options import add_machine_options, machine_spec
from pytest_microvm.cli.run_as import RunAs, add_user_option
from pytest_microvm.errors import (
    BootError,
    HostError,
    ImageError,
    MachineCrashed,
    MicroVMError,
    QuotaExceeded,
    UsageError,
)
from pytest_microvm.host.host import Host
from pytest_microvm.images.locked import LockUse
from pytest_microvm.machine import evidence
from pytest_microvm.machine.relay import on_terminal, plainly, shell_status
from pytest_microvm.settings.options import BY_NAME
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.untrusted.nofollow import refuse_links
from pytest_microvm.untrusted.text import sanitize

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pytest_microvm.agent.users import GuestUser
    from pytest_microvm.images import Image
    from pytest_microvm.machine.microvm import MicroVM
    from pytest_microvm.settings.mounts import Mount

EXIT_INFRA = 75
"""The machine never reached the command: a retry may help (EX_TEMPFAIL of sysexits.h)."""
EXIT_DENIED = 77
"""The command succeeded, but one of its requests was denied (EX_NOPERM)."""
EXIT_QUOTA = 124
"""The machine was ended because it exceeded a quota; timeout(1) uses this status for a time limit."""
EXIT_CRASHED = 125
"""The machine ended by itself, or its files could not be copied back."""
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127

_DESCRIPTION = """\
Run a command in a machine of its own, which is gone afterwards. It has what it is given here and nothing
else: no network, no directory, no secret, no variable of yours. Settings of a project are not read.
"""
_EPILOG = """\
exit status:
  the command's own; 128 + N if signal N ended it; 126, 127 if it cannot be started or does not exist
  124  a quota was exceeded        75   the machine never reached the command
  125  the machine ended by itself, or what came back could not be taken
  77   with --fail-on-denied: something was denied        2, 4   bad input

examples:
  pytest-microvm run -- python3 -c 'print("hello")'
  pytest-microvm run --image docker://registry.example/team/app:1.2 -- --version   its entry point
  pytest-microvm run --network pip --mount out:/out -- sh -c 'pip download six -d /out'
  pytest-microvm run --image agent --mount .:/code:git --workdir /code \\
      --network api.example.com --credential host=api.example.com,env=API_KEY,variable=API_KEY -- my-agent
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "run",
        help="run a command in a machine of its own",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command",
        nargs="*",
        metavar="COMMAND",
        help="the command and its arguments, after --; with a container image's entry point, its arguments "
        "(default: the image's command)",
    )
    add_machine_options(parser)
    parser.add_argument(
        "--push",
        action="append",
        default=[],
        metavar="SOURCE:/TARGET",
        help="copy a file or folder into the machine first",
    )
    parser.add_argument(
        "--pull",
        action="append",
        default=[],
        metavar="/SOURCE:TARGET",
        help="copy a file or folder out of the machine afterwards",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable; without a value, the one of this environment",
    )
    parser.add_argument(
        "--entrypoint", metavar="PROGRAM", help="program to run in place of a container image's entry point"
    )
    parser.add_argument(
        "--workdir",
        metavar="PATH",
        help="its working directory (default: a container image's, else the first directory that is mounted, "
        "else the home folder of --user, else /)",
    )
    add_user_option(parser, "a container image's, else root")
    parser.add_argument(
        "--record", metavar="DIR", type=Path, help="save its events, requests, console and usage"
    )
    parser.add_argument("--locked", **BY_NAME["locked"].arguments())
    parser.add_argument("--fail-on-denied", action="store_true", help="exit with 77 if anything was denied")
    parser.add_argument(
        "--raw", action="store_true", help="print its output byte by byte instead of as safe text"
    )
    parser.add_argument("--no-tty", dest="tty", action="store_false", help="run it without a terminal")
    parser.add_argument("--quiet", action="store_true", help="print only errors and warnings")
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--rm", action="store_true", help="discard the machine afterwards (the default)")
    end.add_argument(
        "--keep", action="store_true", help="freeze it afterwards; `pytest-microvm shell` enters it"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    spec = _spec(arguments)
    pushes, pulls = [_push(text) for text in arguments.push], [_pull(text) for text in arguments.pull]
    _refuse_links(arguments, [*(source for source, _ in pushes), *(target for _, target in pulls)])
    environment = dict(variable(text) for text in arguments.env)
    # Without --locked, no settings of the folder apply, and so its lock does not either.
    lock: LockUse = "require" if arguments.locked else "ignore"
    host = Host(project=Path.cwd(), say=lambda line: _say(arguments, line), lock=lock)
    try:
        with exit_statuses() as status:
            container = host.images.names_command(spec.image, Path.cwd())
            if not (arguments.command or arguments.entrypoint or container):
                raise _no_command(spec.image)
            named = bool(arguments.user)
            folder = _complete(arguments, host.base(spec).image)
            run_as = RunAs(arguments.user, lambda line: _say(arguments, line), create=named and not container)
            machine = host.start(spec, keepable=arguments.keep, owner=run_as)
            try:
                if folder:
                    machine.path(folder).mkdir(parents=True, exist_ok=True)
                for source, target in pushes:
                    machine.path(target).parent.mkdir(parents=True, exist_ok=True)
                    machine.push(source, target, run_as.numbers)
                workdir = arguments.workdir or _workdir(spec.mounts, run_as.user if named else None)
                status.code = _command(machine, arguments, environment, workdir)
            finally:
                _after(machine, arguments, pulls, status)
        return status.code
    finally:
        host.close()


def _spec(arguments: argparse.Namespace) -> MachineSpec:
    """Return the machine's spec from the options.

    Raises:
        UsageError: An option is invalid.
    """
    if arguments.keep and arguments.secrets:
        raise UsageError(
            "--keep and --secret exclude each other",
            details="a kept machine's memory is a file, and the secret would be in it",
            resolution="use --credential, which the machine never holds, or leave --keep out",
        )
    return machine_spec(arguments, "pytest-microvm run")


def _complete(arguments: argparse.Namespace, image: Image) -> str:
    """Complete the options by what a container image says about its command, as `docker run` does.

    Returns:
        The image's working directory, which need not exist yet; empty: it has none, or the user names
        another one.

    Raises:
        UsageError: Neither the user nor the image names a command.
    """
    start = image.start
    entrypoint = (arguments.entrypoint,) if arguments.entrypoint else start.entrypoint
    own = () if arguments.entrypoint else start.arguments
    arguments.command = [*entrypoint, *(arguments.command or own)]
    if not arguments.command:
        raise _no_command(image.name)
    arguments.user = arguments.user or start.user or None
    folder = "" if arguments.workdir else start.workdir
    arguments.workdir = arguments.workdir or start.workdir or None
    return folder


def _no_command(image: str) -> UsageError:
    return UsageError(
        f"no command: expected one after --, as image {image} names none",
        resolution="write it like -- sh -c 'id'",
    )


def _workdir(mounts: Iterable[Mount], user: GuestUser | None) -> str | None:
    """Return the working directory if neither the user nor the image names one."""
    folders = [str(mount.target) for mount in mounts if not mount.source.is_file()]
    return next(iter(folders), None if user is None else user.home)


def _command(
    machine: MicroVM, arguments: argparse.Namespace, environment: dict[str, str], workdir: str | None
) -> int:
    options = {"env": environment, "cwd": workdir, "user": arguments.user}
    with start_errors() as status:
        if arguments.tty and sys.stdin.isatty() and sys.stdout.isatty():
            status.code = shell_status(on_terminal(machine, arguments.command, **options))
        else:
            status.code = shell_status(plainly(machine, arguments.command, raw=arguments.raw, **options))
    return status.code


def _after(
    machine: MicroVM, arguments: argparse.Namespace, pulls: list[tuple[str, str]], status: ExitStatus
) -> None:
    """Copy files out, report denied requests, and end the machine, even after an error."""
    folder = Path.cwd()
    try:
        if machine.alive:
            for source, target in pulls:
                refuse_links(folder, Path(target))  # again: the machine may work in this folder
                machine.pull(source, target)
            for changes in machine.give_back():
                _say(arguments, f"copied back: {changes}")
    finally:
        try:
            denied = machine.network.denied
            for request in denied:
                _say(arguments, str(request))
            if denied and arguments.fail_on_denied and status.code == 0:
                status.code = EXIT_DENIED
            if arguments.record:
                _refuse_linked_record(folder, arguments.record)
                evidence.record(
                    arguments.record, machine.instance, machine.facts, " ".join(arguments.command)
                )
            if arguments.keep and machine.keep(" ".join(arguments.command)):
                _say(arguments, f"kept: pytest-microvm shell {machine.id}")
        finally:
            machine.close()


def _refuse_links(arguments: argparse.Namespace, paths: Iterable[str]) -> None:
    """Refuse files and folders that are reached through a link in the current folder.

    The folder may be untrusted: a link in it could choose the files that are read or overwritten.

    Raises:
        UsageError: A path leads through a link.
    """
    folder = Path.cwd()
    for path in paths:
        refuse_links(folder, Path(path))
    if arguments.record:
        _refuse_linked_record(folder, arguments.record)


def _refuse_linked_record(folder: Path, record: Path) -> None:
    for name in evidence.RECORDED:
        refuse_links(folder, record / name)


class ExitStatus:
    """The current exit status."""

    code = 0


@contextmanager
def start_errors() -> Iterator[ExitStatus]:
    """Report a command that cannot be started, with the exit status that shells use."""
    status = ExitStatus()
    try:
        yield status
    except (FileNotFoundError, PermissionError) as error:
        print(f"pytest-microvm: {sanitize(str(error))}", file=sys.stderr)
        status.code = EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE


@contextmanager
def exit_statuses() -> Iterator[ExitStatus]:
    """Map each kind of machine failure to its exit status; usage errors pass through."""
    status = ExitStatus()
    try:
        yield status
    except UsageError:
        raise
    except OSError as error:  # a file to push or to pull
        print(f"pytest-microvm: {sanitize(str(error))}", file=sys.stderr)
        status.code = EXIT_CRASHED
    except MicroVMError as error:
        print(f"pytest-microvm: {sanitize(str(error))}", file=sys.stderr)
        kinds = (
            (QuotaExceeded, EXIT_QUOTA),
            (MachineCrashed, EXIT_CRASHED),
            ((BootError, HostError, ImageError), EXIT_INFRA),
        )
        status.code = next((code for kind, code in kinds if isinstance(error, kind)), EXIT_CRASHED)


def _push(text: str) -> tuple[str, str]:
    source, colon, target = text.rpartition(":/")
    if not colon or not source:
        raise UsageError(
            f"invalid --push: expected SOURCE:/TARGET, got {text!r}",
            resolution="write it like data.csv:/data",
        )
    return source, "/" + target


def _pull(text: str) -> tuple[str, str]:
    source, colon, target = text.partition(":")
    if not colon or not source.startswith("/") or not target:
        raise UsageError(
            f"invalid --pull: expected /SOURCE:TARGET, got {text!r}", resolution="write it like /out/log:log"
        )
    return source, target


def variable(text: str) -> tuple[str, str]:
    """Return the name and value of a variable from ``--env``.

    Raises:
        UsageError: The text has no value, and the variable is not set here.
    """
    name, equals, value = text.partition("=")
    if not equals:
        with suppress(KeyError):
            return name, os.environ[name]
        raise UsageError(f"--env: {name} is not set here", resolution=f"write --env {name}=VALUE")
    return name, value


def _say(arguments: argparse.Namespace, line: str) -> None:
    if not arguments.quiet or line.startswith("WARNING"):
        print(f"pytest-microvm: {sanitize(line)}", file=sys.stderr)
