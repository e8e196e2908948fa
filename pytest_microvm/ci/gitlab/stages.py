"""The stages of GitLab Runner's custom executor: one machine for each job.

The contract is docs.gitlab.com/runner/executors/custom. Each stage is a separate process;
:mod:`pytest_microvm.ci.gitlab.holding` keeps the machine between them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytest_microvm.ci.gitlab.held import HeldMachine, ScriptResult
from pytest_microvm.ci.gitlab.holding import MAX_SCRIPT, HoldLimits
from pytest_microvm.ci.gitlab.job import GitlabJob, job_key, read_job
from pytest_microvm.ci.gitlab.settings import GitlabSettings, machine_values
from pytest_microvm.errors import UsageError

_AFTER_TIMEOUT = 600.0  # seconds beyond a job's timeout for its last stages (after_script, artifacts)


class ImageNotOffered(UsageError):
    """A job requests an image that the operator does not offer."""


class GitlabStages:
    """The stages of one job.

    Attributes:
        settings: The operator's settings.

    Args:
        environment: This process's environment variables. ``TMPDIR`` is removed from the process: it is the
            job's folder, and data of the whole computer, above all the host budget, must not be kept there.
        settings: The operator's settings.
    """

    def __init__(self, environment: Mapping[str, str], settings: GitlabSettings) -> None:
        self._environment = dict(environment)
        self.settings = settings
        os.environ.pop("TMPDIR", None)
        tempfile.tempdir = None

    def config(self) -> dict[str, Any]:
        """Return the driver's configuration for the runner, which requests it before the job starts."""
        return {
            "builds_dir": self.settings.builds_dir,
            "cache_dir": self.settings.cache_dir,
            "builds_dir_is_shared": False,  # no other job ever sees this one's folder
            "shell": self.settings.shell,
            "driver": {"name": "pytest-microvm", "version": version("pytest-microvm")},
        }

    def prepare(self, say: Callable[[str], None]) -> None:
        """Start the job's machine.

        Args:
            say: Called with messages about the machine and about steps that take long.

        Raises:
            ImageNotOffered: The job requests an image that is not offered.
            MicroVMError: The machine could not be started.
        """
        job, settings = read_job(self._environment), self.settings
        where = "the configuration of the GitLab runner"
        image = _image(settings, job)
        values = machine_values(settings, image, protected=job.protected, host=job.host, where=where)
        terms = HoldLimits(lifetime=_lifetime(settings, job), idle=settings.idle, grace=settings.grace)
        machine = HeldMachine(job.key).start(values, terms, relative_to=settings.folder, where=where, say=say)
        if job.services:
            say("WARNING: services: this driver starts none")
        say(f"machine {machine} from image {image}; network: {', '.join(values['network']) or 'none'}")

    def run(self, script: Path, output: Callable[[int, bytes], None]) -> ScriptResult:
        """Run a script of the runner in the machine and return its outcome.

        Args:
            script: The file that the runner wrote.
            output: Called with the script's output: stream and bytes.

        Raises:
            UsageError: The script is unreadable or too large.
            MachineError: The machine is gone, or has no holder.
        """
        try:
            with script.open("rb") as file:
                text = file.read(MAX_SCRIPT + 1)
        except OSError as error:
            raise UsageError(f"{script} cannot be read: {error.strerror}") from error
        if len(text) > MAX_SCRIPT:
            raise UsageError(f"{script} is larger than {MAX_SCRIPT} bytes")
        return HeldMachine(job_key(self._environment)).run(self.settings.shell, text, output)

    def cleanup(self) -> None:
        """End the job's machine, if there is one; safe to call repeatedly.

        Raises:
            HostError: The machine could not be ended.
        """
        if self._environment.get("TMPDIR"):  # otherwise no stage can have started a machine
            HeldMachine(job_key(self._environment)).end()


def _image(settings: GitlabSettings, job: GitlabJob) -> str:
    """Return the kit for a job.

    Raises:
        ImageNotOffered: The job requests an image that is not offered.
    """
    if not job.image:
        return settings.image
    if job.image in settings.images:
        return settings.images[job.image]
    offered = ", ".join(sorted(settings.images)) or "none: leave `image:` out"
    raise ImageNotOffered(
        f"image {job.image[:200]!r} is not offered by this runner", resolution=f"images that are: {offered}"
    )


def _lifetime(settings: GitlabSettings, job: GitlabJob) -> float:
    if job.timeout is None:
        return settings.lifetime
    return min(settings.lifetime, job.timeout + _AFTER_TIMEOUT)
