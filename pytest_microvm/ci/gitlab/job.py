"""A GitLab job as its runner describes it: the server's facts, separate from variables that anyone may set.

A job's variables reach the driver as ``CUSTOM_ENV_...``, and ``.gitlab-ci.yml``, the user who starts a
pipeline and a project's settings can set any of them, even predefined ones. The server's own facts about the
job are in the file that ``JOB_RESPONSE_FILE`` names (docs.gitlab.com/runner/executors/custom, "Job
response").
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytest_microvm.errors import UsageError

_MAX_RESPONSE = 64 * 1024**2
_IDS = ("CI_SERVER_URL", "CI_RUNNER_ID", "CI_PROJECT_ID", "CI_JOB_ID")
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]", re.ASCII)
_WEB_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class GitlabJob:
    """The known facts about a job.

    Args:
        key: The key of the job's machine: the same in all stages of a job, different in all other jobs.
        image: The job's ``image:``, empty if it has none: the project's request, not a permission.
        timeout: The job's timeout in seconds.
        protected: Whether its branch or tag is protected, according to the server.
        host: The host of its GitLab, as a network rule; ``None`` if the server did not name it.
        services: Whether the job requests ``services:``.
    """

    key: str
    image: str = ""
    timeout: float | None = None
    protected: bool = False
    host: str | None = None
    services: bool = False


def read_job(environment: Mapping[str, str]) -> GitlabJob:
    """Return the job of the current stage.

    Args:
        environment: The stage's environment variables, as set by the runner.

    Raises:
        UsageError: The stage was not started by a runner.
    """
    key = job_key(environment)
    response = _response(environment.get("JOB_RESPONSE_FILE", ""))
    if response is None:  # an older runner: nothing is reliable
        return GitlabJob(
            key,
            image=environment.get("CUSTOM_ENV_CI_JOB_IMAGE", ""),
            timeout=_seconds(environment.get("CUSTOM_ENV_CI_JOB_TIMEOUT")),
        )
    git, image, runner = (_table(response, name) for name in ("git_info", "image", "runner_info"))
    return GitlabJob(
        key,
        image=str(image.get("name") or ""),
        timeout=_seconds(runner.get("timeout")),
        protected=git.get("protected") is True,
        host=_host(str(git.get("repo_url") or "")),
        services=bool(response.get("services")),
    )


def job_key(environment: Mapping[str, str]) -> str:
    """Return the key of a job's machine.

    The runner creates a folder for each attempt at each job, ``TMPDIR`` of all its stages. A job cannot
    choose it, so a job that sets another job's ids for itself still gets a different key.

    Raises:
        UsageError: ``TMPDIR`` is not set.
    """
    folder = environment.get("TMPDIR", "")
    if not folder:
        raise UsageError(
            "TMPDIR is not set",
            resolution="this is started by gitlab-runner, as a stage of its custom executor",
        )
    parts = [folder, *(environment.get(f"CUSTOM_ENV_{name}", "") for name in _IDS)]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _response(name: str) -> Mapping[str, Any] | None:
    """Return the server's description of the job, ``None`` if the runner does not pass it on.

    Raises:
        UsageError: The file is unreadable, or no JSON object.
    """
    if not name:
        return None
    try:
        with Path(name).open("rb") as file:
            response = json.loads(file.read(_MAX_RESPONSE))
    except (OSError, ValueError) as error:
        raise UsageError(f"JOB_RESPONSE_FILE cannot be read: {error}") from error
    if not isinstance(response, dict):
        raise UsageError("JOB_RESPONSE_FILE is not a JSON object")
    return response


def _table(response: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = response.get(name)
    return value if isinstance(value, dict) else {}


def _seconds(value: object) -> float | None:
    try:
        seconds = float(value) if isinstance(value, (int, float, str)) else 0.0
    except ValueError:
        return None
    return seconds if 0 < seconds < float("inf") else None


def _host(url: str) -> str | None:
    """Return a repository's host as a network rule, with the port unless it is the scheme's default."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return None
    if parts.scheme not in _WEB_PORTS:
        return None
    host = f"[{host}]" if ":" in host else host
    if not _HOST.fullmatch(host):
        return None
    return host if port in (None, _WEB_PORTS[parts.scheme]) else f"{host}:{port}"
