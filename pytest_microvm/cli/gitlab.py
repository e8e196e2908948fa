"""``pytest-microvm gitlab``: the driver of GitLab Runner's custom executor, one verb for each stage."""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from pytest_microvm.ci.gitlab.holder_socket import STDERR, STDOUT
from pytest_microvm.ci.gitlab.settings import find_settings
from pytest_microvm.ci.gitlab.stages import GitlabStages, ImageNotOffered
from pytest_microvm.cli.run import EXIT_QUOTA
from pytest_microvm.errors import MicroVMError
from pytest_microvm.machine.relay import shell_status
from pytest_microvm.untrusted.output import safe_text
from pytest_microvm.untrusted.text import sanitize

_DESCRIPTION = """\
The stages of a job, as gitlab-runner starts them (executor = "custom"): a machine for each job. What jobs get
is in a file of the runner's operator. The exit status is 0, or what the runner names by
BUILD_FAILURE_EXIT_CODE (the job failed) and SYSTEM_FAILURE_EXIT_CODE (the machine or this computer did).
"""
_AHEAD = 64  # maximum number of pieces of output that wait to be printed
_STAGES = {
    "config": "tell the runner about the driver, as JSON",
    "prepare": "start the job's machine",
    "run": "run one of the runner's scripts in it",
    "cleanup": "end it",
}


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verbs to the command line."""
    parser = verbs.add_parser(
        "gitlab",
        help="drive GitLab Runner's custom executor",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stages = parser.add_subparsers(metavar="STAGE", required=True)
    for name, text in _STAGES.items():
        stage = stages.add_parser(name, help=text, description=text)
        stage.add_argument(
            "--config",
            metavar="FILE",
            type=Path,
            help="the operator's file (default: /etc/pytest-microvm/gitlab.toml)",
        )
        if name == "run":
            stage.add_argument("script", type=Path, help="the script that the runner wrote")
            stage.add_argument("stage", help="the runner's name for it, such as build_script")
        stage.set_defaults(run=_run, gitlab_stage=name)


def _run(arguments: argparse.Namespace) -> int:
    environment = dict(os.environ)
    system_failure = _code(environment, "SYSTEM_FAILURE_EXIT_CODE", 2)
    try:
        stages = GitlabStages(environment, find_settings(arguments.config))
        return _PERFORMED[arguments.gitlab_stage](stages, arguments, environment)
    except ImageNotOffered as error:
        _say(str(error))
        return _code(environment, "BUILD_FAILURE_EXIT_CODE", 1)
    except MicroVMError as error:
        _say(str(error))
    except KeyboardInterrupt:
        _say("interrupted")
    except Exception:  # noqa: BLE001 - Python's own status for it would read as "the job failed"
        traceback.print_exc()
    return system_failure


def _config(stages: GitlabStages, _arguments: argparse.Namespace, _environment: Mapping[str, str]) -> int:
    print(json.dumps(stages.config()))
    return 0


def _prepare(stages: GitlabStages, _arguments: argparse.Namespace, _environment: Mapping[str, str]) -> int:
    stages.prepare(_say)
    return 0


def _script(stages: GitlabStages, arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    printer = SafePrinter() if stages.settings.output == "safe" else RawPrinter()
    try:
        ended = stages.run(arguments.script, printer)
    finally:
        printer.close()
    if ended.code == 0:
        return 0
    if ended.code is None:
        _say(ended.error)
        if not ended.quota:
            return _code(environment, "SYSTEM_FAILURE_EXIT_CODE", 2)
    code = EXIT_QUOTA if ended.code is None else shell_status(ended.code)
    file = environment.get("BUILD_EXIT_CODE_FILE")
    if file:  # newer runners only; the file must contain only the number
        Path(file).write_text(str(code))
    return _code(environment, "BUILD_FAILURE_EXIT_CODE", 1)


def _cleanup(stages: GitlabStages, _arguments: argparse.Namespace, _environment: Mapping[str, str]) -> int:
    stages.cleanup()
    return 0


_PERFORMED = {"config": _config, "prepare": _prepare, "run": _script, "cleanup": _cleanup}


def _code(environment: Mapping[str, str], name: str, usual: int) -> int:
    text = environment.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else usual


class RawPrinter:
    """Prints a script's output unchanged."""

    def __call__(self, stream: int, data: bytes) -> None:
        """Print bytes of a stream."""
        target = sys.stderr.buffer if stream == STDERR else sys.stdout.buffer
        target.write(data)
        target.flush()

    def close(self) -> None:
        """Do nothing: no output is held back."""


class SafePrinter:
    """Prints a script's output as safe text, without control sequences for a terminal or GitLab's log."""

    def __init__(self) -> None:
        self._queues: dict[int, queue.Queue[bytes]] = {}
        self._threads = []
        for stream, target in ((STDOUT, sys.stdout), (STDERR, sys.stderr)):
            pieces: queue.Queue[bytes] = queue.Queue(_AHEAD)
            self._queues[stream] = pieces
            thread = threading.Thread(target=self._print, args=(iter(pieces.get, b""), target))
            thread.start()
            self._threads.append(thread)

    def __call__(self, stream: int, data: bytes) -> None:
        """Print bytes of a stream once their line is complete."""
        if stream in self._queues and data:
            self._queues[stream].put(data)

    def close(self) -> None:
        """Print the remaining output."""
        for pieces in self._queues.values():
            pieces.put(b"")
        for thread in self._threads:
            thread.join()

    def _print(self, pieces: Iterator[bytes], target: TextIO) -> None:
        for text in safe_text(pieces):
            with suppress(OSError):  # no reader: discard the rest, or the script would block
                target.buffer.write(text.encode())
                target.buffer.flush()


def _say(line: str) -> None:
    print(f"pytest-microvm: {sanitize(line)}", file=sys.stderr)
