"""A runner that executes the steps of a composite action for real, in order, as GitHub's does.

What it keeps to is the source of GitHub's own (actions/runner: ActionCommand, ActionCommandManager,
FileCommandManager): each step has files of its own for outputs, variables, PATH and summary, which are read
when it has ended; lines of its output are taken for commands, unless it stopped them. ``uses:`` steps are
played by :mod:`support.github.actions`. Of expressions it knows what the action uses; others are an error.
"""

import os
import re
import subprocess
import uuid
from dataclasses import dataclass, field

import yaml

from support.github.actions import ACTIONS
from support.github.expressions import evaluate, interpolate, shown

SUMMARY_LIMIT = 1024 * 1024
_COMMANDS = {
    "add-mask", "add-matcher", "add-path", "debug", "echo", "endgroup", "error", "group", "notice",
    "remove-matcher", "save-state", "set-env", "set-output", "stop-commands", "warning",
}  # fmt: skip
_ESCAPES = {"%0D": "\r", "%0A": "\n", "%3A": ":", "%2C": ",", "%25": "%"}


class RunnerError(Exception):
    """An error for which GitHub's runner fails a step."""


@dataclass(frozen=True)
class Command:
    """A workflow command that the runner obeyed."""

    name: str
    properties: dict
    data: str


@dataclass
class Step:
    """The result of a step."""

    name: str
    outcome: str = "skipped"  # success, failure, skipped
    outputs: dict = field(default_factory=dict)
    commands: list = field(default_factory=list)
    log: str = ""
    summary: str = ""


@dataclass
class Job:
    """The result of the action."""

    steps: dict
    outputs: dict
    conclusion: str

    @property
    def commands(self):
        """All commands that were obeyed, in order."""
        return [command for step in self.steps.values() for command in step.commands]

    @property
    def log(self):
        """The log, step by step."""
        return "".join(f"##[{step.outcome}] {step.name}\n{step.log}" for step in self.steps.values())


class Commands:
    """A reader of one step's output that obeys the lines that are commands.

    Attributes:
        obeyed: The commands, in order.
    """

    def __init__(self):
        self.obeyed = []
        self._word = None

    def feed(self, line):
        """Take one line of output, without its line end."""
        known = _COMMANDS | ({self._word} if self._word else set())
        command = _second_version(line, known) or _first_version(line, known)
        if command is None:
            return
        if self._word is not None:
            if command.name.lower() == self._word.lower():
                self._word = None
        elif command.name.lower() == "stop-commands":
            self._word = command.data
        else:
            self.obeyed.append(command)


def _second_version(line, known):
    """``::name key=value,...::data`` at the beginning of a line, after any white space."""
    found = re.match(r"\s*::(.*?)::(.*)", line, re.DOTALL)
    return _command(found[1], found[2], ",", known) if found else None


def _first_version(line, known):
    """``##[name key=value;...]data`` anywhere in a line."""
    found = re.search(r"##\[(.*?)\](.*)", line, re.DOTALL)
    return _command(found[1], found[2], ";", known) if found else None


def _command(head, data, separator, known):
    name, _, properties = head.partition(" ")
    if name.lower() not in {word.lower() for word in known}:
        return None
    pairs = [pair.split("=", 1) for pair in properties.strip().split(separator) if "=" in pair]
    return Command(name, {key: _unescaped(value) for key, value in pairs if value}, _unescaped(data))


def _unescaped(text):
    for code, character in _ESCAPES.items():
        text = text.replace(code, character)
    return text


def file_commands(text):
    """Return the names and values of a file like GITHUB_OUTPUT.

    Raises:
        RunnerError: The format is invalid.
    """
    found, lines = {}, text.split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    while lines:
        line = lines.pop(0)
        if not line:
            continue
        equals, heredoc = line.find("="), line.find("<<")
        if equals >= 0 and (heredoc < 0 or equals < heredoc):
            name, value = line.split("=", 1)
        elif heredoc >= 0:
            name, delimiter = line.split("<<", 1)
            if not delimiter:
                raise RunnerError(f"invalid format {line!r}")
            if delimiter not in lines:
                raise RunnerError(f"matching delimiter not found {delimiter!r}")
            end = lines.index(delimiter)
            value, lines = "\n".join(lines[:end]), lines[end + 1 :]
        else:
            raise RunnerError(f"invalid format {line!r}")
        if not name:
            raise RunnerError(f"invalid format {line!r}")
        found[name] = value
    return found


class Runner:
    """One job on one machine, with a work folder of its own.

    Args:
        folder: For the runner's own files; ``RUNNER_TEMP`` is in it.
        workspace: What is checked out.
        caches: What GitHub keeps for the repository: a folder that jobs share.
        artifacts: Where uploads go.
        variables: Of the job.
        event: What happened, as the expression ``github.event`` has it.
    """

    def __init__(self, folder, workspace, *, caches, artifacts, variables, event):
        self.temp = folder / "temp"
        self.temp.mkdir(parents=True)
        self.workspace, self.caches, self.artifacts = workspace, caches, artifacts
        self.environment = {
            "CI": "true", "GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(workspace), "RUNNER_OS": "Linux",
            "RUNNER_TEMP": str(self.temp), **variables,
        }  # fmt: skip
        self.path = []
        self.github = {"event": event}

    def run(self, action, inputs):
        """Run the composite action in the folder ``action``; return a :class:`Job`."""
        text = yaml.safe_load((action / "action.yml").read_text())
        unknown = set(inputs) - set(text["inputs"])
        assert not unknown, f"unknown inputs: {unknown}"
        given = {name: told.get("default", "") for name, told in text["inputs"].items()} | inputs
        contexts = {"inputs": given, "steps": {}, "failed": False, "github": self.github}
        steps = {}
        for number, told in enumerate(text["runs"]["steps"]):
            step = steps[told.get("id", f"step-{number}")] = Step(told["name"])
            if evaluate(told.get("if", "success()"), contexts, condition=True):
                self._step(step, told, contexts, action)
                contexts["failed"] |= step.outcome == "failure"
            if "id" in told:
                contexts["steps"][told["id"]] = {"outputs": step.outputs, "outcome": step.outcome}
        outputs = {name: interpolate(told["value"], contexts) for name, told in text["outputs"].items()}
        return Job(steps, outputs, "failure" if contexts["failed"] else "success")

    def _step(self, step, told, contexts, action):
        if "uses" in told:
            given = {name: interpolate(shown(value), contexts) for name, value in told["with"].items()}
            step.outputs = ACTIONS[told["uses"].split("@")[0]](self, given)
            step.outcome = "success"
            return
        assert told["shell"] == "bash"
        variables = {name: interpolate(shown(value), contexts) for name, value in told.get("env", {}).items()}
        assert "${{" not in told["run"]
        self._bash(step, told["run"], {**variables, "GITHUB_ACTION_PATH": str(action)})

    def _bash(self, step, script, variables):
        """Run a script with new files for what it tells, and read them when it has ended."""
        folder = self.temp / "_runner_file_commands"
        folder.mkdir(exist_ok=True)
        files = {
            name: folder / f"{name.lower()}_{uuid.uuid4()}"
            for name in ("OUTPUT", "ENV", "PATH", "STEP_SUMMARY")
        }
        for file in files.values():
            file.touch()
        script_file = self.temp / f"{uuid.uuid4()}.sh"
        script_file.write_text(script)
        environment = {**os.environ, **self.environment, **variables}
        environment |= {f"GITHUB_{name}": str(file) for name, file in files.items()}
        environment["PATH"] = os.pathsep.join([*reversed(self.path), environment["PATH"]])
        command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script_file)]
        done = subprocess.run(
            command, cwd=self.workspace, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        step.log = done.stdout.decode(errors="replace")
        commands = Commands()
        for line in re.split(r"\r\n|\r|\n", step.log):  # .NET ends a line at each of these
            commands.feed(line)
        step.commands = commands.obeyed
        step.outcome = "failure" if done.returncode else "success"
        try:
            step.outputs = file_commands(files["OUTPUT"].read_text())
            self.environment |= file_commands(files["ENV"].read_text())
            self.path += [line for line in files["PATH"].read_text().splitlines() if line]
            step.summary = _summary(files["STEP_SUMMARY"])
        except RunnerError as error:
            step.log += f"\n{error}\n"
            step.outcome = "failure"


def _summary(file):
    if file.stat().st_size > SUMMARY_LIMIT:
        raise RunnerError("the summary is too long")
    return file.read_text()
