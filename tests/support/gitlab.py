"""Drive the stages of GitLab Runner's custom executor as gitlab-runner does, without a GitLab.

The rules are the runner's (docs.gitlab.com/runner/executors/custom, and executors/custom/custom.go and
common/build.go of gitlab-runner): every stage is a process in a process group of its own, whose ``TMPDIR``
and current folder is the job's temporary folder; a job's variables come as ``CUSTOM_ENV_...``; what the
server said is in ``JOB_RESPONSE_FILE``; prepare is tried three times unless the job itself is at fault;
after_script runs also after a failure; the stages after it depend on the outcome; cleanup always runs; a
job that is cancelled or takes too long gets SIGTERM, for the whole group.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from support import guards
from support.commands import MICROVM
from support.repositories import git

BUILD_FAILURE, SYSTEM_FAILURE = 1, 2
COMMAND = (*MICROVM, "gitlab")
PREPARE_TRIES = 3


@dataclass
class Job:
    """A job as a project defines it.

    Args:
        script: The lines of ``script:``.
        after_script: The lines of ``after_script:``.
        variables: The job's own variables; they may set predefined ones, too.
        image: ``image:``.
        repository: What get_sources clones, as a URL from the machine's view; ``None``: nothing.
        ref: The branch.
        protected: Whether the server calls it protected.
        timeout: Seconds that the job may take.
        cancel_at: Somebody cancels the job when its log has this text.
        identity: The job's number.
    """

    script: list[str]
    after_script: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    image: str = ""
    repository: str | None = None
    ref: str = "main"
    protected: bool = False
    timeout: float = 3600.0
    cancel_at: str = ""
    identity: int = 1


@dataclass
class Stage:
    """The result of one stage: its name (``prepare``, ``build_script``, ...), status, stdout and stderr."""

    name: str
    returncode: int
    stdout: str
    stderr: str
    exit_code: str | None = None


@dataclass
class Verdict:
    """The result of a job as the runner would report it to GitLab.

    Args:
        status: ``success``, ``failed`` (the script), ``system`` (the runner), ``timeout`` or ``canceled``.
        stages: All stages, in order.
        exit_code: What the script ended with, if the driver said so.
    """

    status: str
    stages: list[Stage]
    exit_code: int | None = None

    @property
    def log(self) -> str:
        """The job's log."""
        shown = [stage for stage in self.stages if stage.name != "cleanup"]
        return "".join(
            f"[{stage.name}]\n{'' if stage.name == 'config' else stage.stdout}{stage.stderr}"
            for stage in shown
        )

    def stage(self, name: str) -> Stage:
        """Return the last stage of that name."""
        return next(stage for stage in reversed(self.stages) if stage.name == name)

    @property
    def names(self) -> list[str]:
        """The stages' names, in order."""
        return [stage.name for stage in self.stages]


@dataclass(frozen=True)
class Served:
    """A repository that machines can clone.

    Args:
        url: Where it is, from a machine's view: :attr:`Job.repository`.
        machine: Lines for ``[machine]`` of the operator's file that let machines reach it, and nothing else.
    """

    url: str
    machine: str


@contextmanager
def served(repository: Path, folder: Path) -> Iterator[Served]:
    """Serve a repository over plain HTTP on the loopback device, as the GitLab that jobs come from.

    Args:
        repository: A repository with the branches that jobs are for.
        folder: For a bare copy of it.
    """
    bare = folder / "group" / "project.git"
    git(repository, "clone", "-q", "--bare", repository, bare)
    git(bare, "update-server-info")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"127.0.0.1:{server.server_address[1]}"
        try:
            yield Served(
                "http://gitlab.example/group/project.git",
                f'network = ["gitlab"]\nhosts = {{ "gitlab.example" = "{address}" }}\n',
            )
        finally:
            server.shutdown()
            thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class GitlabRunner:
    """A runner with one driver.

    Args:
        config: The operator's file for the driver; ``None``: none.
        folder: For what the runner itself needs.
        environment: The runner's own variables.
    """

    def __init__(self, config: Path | None, folder: Path, environment: dict[str, str] | None = None) -> None:
        self._arguments = [] if config is None else ["--config", str(config)]
        self._folder = folder
        self._environment = dict(os.environ if environment is None else environment)

    def run(self, job: Job) -> Verdict:
        """Run a job and return the verdict."""
        stages: list[Stage] = []
        for _try in range(PREPARE_TRIES):
            execution = Execution(self, job, stages)
            try:
                if execution.prepare():
                    return execution.perform()
                if stages[-1].returncode == BUILD_FAILURE:  # the job's own fault: the same the next time
                    return Verdict("failed", stages)
            finally:
                execution.cleanup()
        return Verdict("system", stages)

    def start(self, job: Job) -> Execution:
        """Return the execution of a job, to take its stages one by one."""
        return Execution(self, job, [])


class Execution:
    """One try of a job: its temporary folder, and one stage after the other."""

    def __init__(self, runner: GitlabRunner, job: Job, stages: list[Stage]) -> None:
        self._runner = runner
        self._job = job
        self.stages = stages
        self._stopped = ""  # "timeout" or "canceled"
        self._stoppable: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.folder = Path(tempfile.mkdtemp(prefix="custom-executor", dir=runner._folder))
        self._config: dict[str, object] = {}
        self._write_response()

    def prepare(self) -> bool:
        """Perform config and prepare; return whether both succeeded."""
        config = self.stage("config")
        if config.returncode == 0:
            self._config = json.loads(config.stdout)
            return self.stage("prepare").returncode == 0
        return False

    def perform(self) -> Verdict:
        """Perform what comes after prepare, and return the verdict."""
        timer = threading.Timer(self._job.timeout, self.stop, ["timeout"])
        timer.start()
        try:
            failure = self._until_script()
        finally:
            timer.cancel()
        failed = self._after(failure) or failure
        if failed is None:
            return Verdict("success", self.stages)
        code = None if failed.exit_code is None else int(failed.exit_code)
        if self._stopped:
            return Verdict(self._stopped, self.stages, code)
        kind = {BUILD_FAILURE: "failed"}.get(failed.returncode, "system")
        return Verdict(kind, self.stages, code)

    def cleanup(self) -> Stage:
        """Perform cleanup, as always; then the temporary folder goes."""
        done = self.stage("cleanup")
        shutil.rmtree(self.folder)
        return done

    def stop(self, reason: str) -> None:
        """Stop what runs, for a reason: ``canceled``, ``timeout``. What comes after the script still runs."""
        with self._lock:
            self._stopped = reason
            if self._stoppable is not None:
                os.killpg(self._stoppable.pid, signal.SIGTERM)

    def script(self, name: str, text: str, *, stoppable: bool = False) -> Stage:
        """Perform one sub-stage of run."""
        file = Path(tempfile.mkdtemp(prefix="script", dir=self.folder)) / "script."
        file.write_text(text)
        file.chmod(0o700)
        return self.stage("run", str(file), name, stoppable=stoppable)

    def stage(self, verb: str, *arguments: str, stoppable: bool = False) -> Stage:
        """Start a stage's process and wait for it."""
        exit_code = self.folder / "exit_code"
        exit_code.unlink(missing_ok=True)
        command = [*COMMAND, verb, *self._runner._arguments, *arguments]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            cwd=self.folder,
            env=self._variables(),
            start_new_session=True,  # in a process group of its own, as the runner's are
        ) as process:
            if stoppable:
                self._let_stop(process)
            try:
                # To the end of both pipes, as Go's exec.Cmd reads: whoever keeps them open keeps the job.
                stdout, stderr = self._read(process)
            finally:
                self._let_stop(None)
        stage = Stage(
            arguments[1] if verb == "run" else verb,
            process.returncode,
            stdout.decode(errors="replace"),
            stderr.decode(errors="replace"),
            exit_code.read_text() if exit_code.exists() else None,
        )
        self.stages.append(stage)
        return stage

    def _until_script(self) -> Stage | None:
        """Return what failed first, of all up to the script."""
        checkout = self._checkout()
        variables = self._exports()
        scripts = {
            "prepare_script": 'echo "Running on $(hostname)..."',
            "get_sources": checkout,
            "restore_cache": "",
            "download_artifacts": "",
            "build_script": f"cd {self._project}\n" + "\n".join(map(_echoed, self._job.script)),
        }
        for name, text in scripts.items():
            if text:
                stage = self.script(name, runner_script(variables + text), stoppable=True)
                if stage.returncode != 0:
                    return stage
        return None

    def _after(self, failure: Stage | None) -> Stage | None:
        if self._job.after_script and (failure is None or failure.name == "build_script"):
            text = f"cd {self._project}\n" + "\n".join(map(_echoed, self._job.after_script))
            self.script("after_script", runner_script(self._exports() + text))  # its failure fails no job
        end = "upload_artifacts_on_success" if failure is None else "upload_artifacts_on_failure"
        last = self.script(end, runner_script("true"))
        self.script("cleanup_file_variables", runner_script("true"))
        return last if failure is None and last.returncode != 0 else None

    def _checkout(self) -> str:
        """Return the runner's way to get a branch, without the parts that only spare time."""
        project = self._project
        if self._job.repository is None:
            return f"mkdir -p {project}"
        url, ref = shlex.quote(self._job.repository), self._job.ref
        return "\n".join(
            [
                'echo "Fetching changes..."',
                f"git init -q -b none {project}",
                f"cd {project}",
                f"git remote add origin {url}",
                f"git fetch -q origin +refs/heads/{ref}:refs/remotes/origin/{ref}",
                f"git checkout -q -f refs/remotes/origin/{ref}",
                "git clean -ffdx",
            ]
        )

    @property
    def _project(self) -> str:
        return f"{self._config['builds_dir']}/group/project"

    def _exports(self) -> str:
        return "".join(
            f"export {name}={shlex.quote(value)}\n" for name, value in self._job_variables().items()
        )

    def _job_variables(self) -> dict[str, str]:
        """Return a job's variables: what the server says, then what the project says, which wins."""
        predefined = {
            "CI": "true",
            "CI_SERVER_URL": "https://gitlab.example",
            "CI_RUNNER_ID": "7",
            "CI_PROJECT_ID": "42",
            "CI_JOB_ID": str(self._job.identity),
            "CI_JOB_TIMEOUT": f"{self._job.timeout:g}",
            "CI_COMMIT_REF_NAME": self._job.ref,
            "CI_COMMIT_REF_PROTECTED": str(self._job.protected).lower(),
            "CI_JOB_IMAGE": self._job.image,
        }
        return {**predefined, **self._job.variables}

    def _variables(self) -> dict[str, str]:
        return {
            **self._runner._environment,
            **{f"CUSTOM_ENV_{name}": value for name, value in self._job_variables().items()},
            "TMPDIR": str(self.folder),
            "BUILD_FAILURE_EXIT_CODE": str(BUILD_FAILURE),
            "SYSTEM_FAILURE_EXIT_CODE": str(SYSTEM_FAILURE),
            "BUILD_EXIT_CODE_FILE": str(self.folder / "exit_code"),
            "JOB_RESPONSE_FILE": str(self.folder / "response.json"),
        }

    def _write_response(self) -> None:
        response = {
            "id": self._job.identity,
            "token": "job-token",
            "job_info": {"project_id": 42},
            "git_info": {
                "repo_url": self._job.repository or "https://gitlab.example/group/project.git",
                "ref": self._job.ref,
                "protected": self._job.protected,
            },
            "image": {"name": self._job.image},
            "runner_info": {"timeout": int(self._job.timeout)},
        }
        (self.folder / "response.json").write_text(json.dumps(response))

    def _let_stop(self, process: subprocess.Popen[bytes] | None) -> None:
        with self._lock:
            self._stoppable = process
            if process is not None and self._stopped:
                os.killpg(process.pid, signal.SIGTERM)

    def _read(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
        """Return what a stage says, and cancel the job when it says so."""
        said: list[bytes] = []

        def listen() -> None:
            for line in process.stdout:
                said.append(line)
                if self._job.cancel_at and self._job.cancel_at in line.decode(errors="replace"):
                    self.stop("canceled")

        listener = threading.Thread(target=listen)
        listener.start()
        guard = threading.Timer(guards.SUITE, process.kill)
        guard.start()
        errors = process.stderr.read()
        listener.join()
        process.wait()
        guard.cancel()
        return b"".join(said), errors


def runner_script(text: str) -> str:
    """Return a script as the runner's bash generator writes it: one word that is evaluated.

    It is what FF_USE_NEW_BASH_EVAL_STRATEGY gives: without it bash says 1 for every failure.
    """
    body = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"#!/usr/bin/env bash\n\nset -eo pipefail\nset +o noclobber\n: | (eval $'{body}\\n')\nexit 0\n"


def _echoed(line: str) -> str:
    return f"echo {shlex.quote('$ ' + line)}\n{line}"
