"""The run of the GitHub Action: its command, and protection of the job's log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pytest_microvm.ci.github.commands import stopped
from pytest_microvm.ci.github.inputs import Inputs
from pytest_microvm.settings.trust import VARIABLE

if TYPE_CHECKING:
    from typing_extensions import Self

# -I: the working directory is the project's, and Python would import modules from there first.
_PYTHON = (sys.executable, "-I")
_ITSELF = (*_PYTHON, "-c", "import sys; from pytest_microvm.cli import main; sys.exit(main())")
_GITHUB_FILES = ("GITHUB_OUTPUT", "GITHUB_ENV", "GITHUB_PATH", "GITHUB_STEP_SUMMARY", "GITHUB_STATE")


def run_command(inputs: Inputs, environ: Mapping[str, str]) -> list[str]:
    """Return the command line of a run.

    Args:
        inputs: The action's inputs.
        environ: GitHub's variables, which name the ref that is checked out.
    """
    if inputs.mode == "ci":
        return [*_ITSELF, *_ci_words(inputs, environ)]
    words = [
        *_ITSELF,
        "test",
        f"--junitxml={junit_path(inputs)}",
        f"--microvm-junit-profile={inputs.junit_profile}",
        f"--microvm-artifacts={inputs.output / 'machines'}",
        f"--microvm-reports={inputs.output / 'project'}",
        "--microvm-python=image",  # the action's own environment has nothing of the project
    ]
    if inputs.image:
        words.append(f"--microvm-image={inputs.image}")
    if inputs.require_accel:
        words.append(f"--microvm-require-accel={inputs.require_accel}")
    return [*words, *inputs.args]


def junit_path(inputs: Inputs) -> Path:
    """Return the path of the run's JUnit report."""
    return inputs.output / "junit.xml"


def checked_out(environ: Mapping[str, str]) -> str:
    """Return the ref that is checked out, as actions/checkout names it.

    A pull request is identified by its number: its author chooses its branch's name, and branch names control
    access to secrets and caches.
    """
    ref = environ.get("GITHUB_REF", "")
    if ref.startswith("refs/pull/"):
        return ref.replace("refs/pull/", "refs/remotes/pull/", 1)
    return ref if ref.startswith(("refs/heads/", "refs/tags/")) else "HEAD"


def run_guarded(command: Sequence[str], inputs: Inputs, output: IO[str]) -> int:
    """Run the command with workflow commands disabled in its output; return its exit code.

    Interrupts are forwarded, and the command is waited for: it ends its machines and writes its reports.

    Args:
        command: The command line.
        inputs: The action's inputs.
        output: The step's standard output.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _GITHUB_FILES}
    if inputs.trust:
        environment[VARIABLE] = "1"
    with (
        stopped(output),
        _Interrupts() as interrupts,
        subprocess.Popen(command, cwd=inputs.project, env=environment) as process,
    ):
        interrupts.hand_to(process)
        code = process.wait()
    return code if code >= 0 else 128 - code


class _Interrupts:
    """Forwards interrupts to a process, including those that arrive while it is being started.

    GitHub sends SIGINT, then SIGTERM, and only to the step's own process.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._early = self._handed = 0

    def __enter__(self) -> Self:
        kinds = (signal.SIGINT, signal.SIGTERM)
        self._before = {kind: signal.signal(kind, self._take) for kind in kinds}
        return self

    def __exit__(self, *_exc: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def hand_to(self, process: subprocess.Popen[bytes]) -> None:
        """Forward interrupts to ``process``, earlier ones first."""
        self._process = process
        for _ in range(self._early):
            self._hand_on(process)

    def _take(self, _kind: int, _frame: object) -> None:
        if self._process is None:
            self._early += 1
        else:
            self._hand_on(self._process)

    def _hand_on(self, process: subprocess.Popen[bytes]) -> None:
        self._handed += 1
        process.send_signal(signal.SIGINT if self._handed == 1 else signal.SIGTERM)


def _ci_words(inputs: Inputs, environ: Mapping[str, str]) -> list[str]:
    words = ["ci", "run", f"--output={inputs.output}", f"--junit-profile={inputs.junit_profile}"]
    words += [f"--branch={branch}" for branch in inputs.branches] or [f"--ref={checked_out(environ)}"]
    if inputs.definition_from:
        words.append(f"--definition-from={inputs.definition_from}")
    if inputs.require_accel:
        words.append(f"--require-accel={inputs.require_accel}")
    return [*words, *inputs.args]
