"""The stages of GitLab Runner's custom executor: one machine for each job.

The contract is docs.gitlab.com/runner/executors/custom. Each stage is a process of its own; the machine is
kept between them by :mod:`pytest_microvm.ci.gitlab.holding`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytest_microvm.ci.gitlab.held import Ended, HeldMachine
from pytest_microvm.ci.gitlab.holding import MAX_SCRIPT, Terms
from pytest_microvm.ci.gitlab.job import GitlabJob, job_key, read_job
from pytest_microvm.ci.gitlab.settings import GitlabSettings, machine_values
from pytest_microvm.errors import UsageError

_AFTER_TIMEOUT = 600.0  # seconds a job's last stages (after_script, artifacts) may take beyond its timeout


class ImageNotOffered(UsageError):
    """A job asks for an image that the operator does not offer."""


class GitlabStages:
    """The stages of one job.

    Attributes:
        settings: The operator's.

    Args:
        environment: This process's variables. ``TMPDIR`` is taken out of them: it is the job's folder, and
            what belongs to the computer, the host budget above all, must not lie there.
        settings: The operator's.
    """

    def __init__(self, environment: Mapping[str, str], settings: GitlabSettings) -> None:
        self._environment = dict(environment)
        self.settings = settings
        os.environ.pop("TMPDIR", None)
        tempfile.tempdir = None

    def config(self) -> dict[str, Any]:
        """Return what the runner shall know before the job begins."""
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
            say: Told what it is, and what takes long.

        Raises:
            ImageNotOffered: The job asks for an image that it cannot have.
            MicroVMError: The machine could not be started.
        """
        job, settings = read_job(self._environment), self.settings
        where = "the configuration of the GitLab runner"
        image = _image(settings, job)
        values = machine_values(settings, image, protected=job.protected, host=job.host, where=where)
        terms = Terms(lifetime=_lifetime(settings, job), idle=settings.idle, grace=settings.grace)
        machine = HeldMachine(job.key).start(values, terms, relative_to=settings.folder, where=where, say=say)
        if job.services:
            say("WARNING: services: this driver starts none")
        say(f"machine {machine} from image {image}; network: {', '.join(values['network']) or 'none'}")

    def run(self, script: Path, output: Callable[[int, bytes], None]) -> Ended:
        """Run a script of the runner in the machine and return how it ended.

        Args:
            script: The file that the runner wrote.
            output: Told what the script says: stream and bytes.

        Raises:
            UsageError: There is no such script.
            MachineError: The machine has gone, or nobody holds it.
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
        """End the job's machine, if there is one; again if need be.

        Raises:
            HostError: It could not be ended.
        """
        if self._environment.get("TMPDIR"):  # else no stage came far enough to start one
            HeldMachine(job_key(self._environment)).end()


def _image(settings: GitlabSettings, job: GitlabJob) -> str:
    """Return the kit for a job.

    Raises:
        ImageNotOffered: It asks for another one.
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
