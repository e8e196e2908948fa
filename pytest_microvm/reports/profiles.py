"""Profiles of the readers of JUnit files; docs/reference/junit.md has the sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pytest_microvm.errors import UsageError

MIB = 1024 * 1024


@dataclass(frozen=True)
class Profile:
    """The format and the limits of a file for one reader.

    Args:
        name: The name that selects it.
        places: Whether a test has ``file`` and ``line``.
        case_properties: Whether a test has properties. A suite may have them anywhere.
        interim: Whether other attempts are elements of surefire's (``flakyFailure``, ``rerunFailure``);
            otherwise they are listed in the test's output.
        message_in_text: Whether a failure's text begins with its message, because only the text is read.
        flat: Whether class and name must be unique in the whole file, because suites are not separated.
        safe_paths: Whether class names must not look like paths, because the reader looks for files there.
        attachments: How a file is named: relative to the report (``beside``), relative to the folder that
            the CI job runs in (``project``), or with its absolute path (``absolute``).
        text_limit: Maximum characters of one text.
        file_limit: Maximum bytes of the file.
        case_limit: Maximum tests of the file.
    """

    name: str
    places: bool = True
    case_properties: bool = True
    interim: bool = True
    message_in_text: bool = False
    flat: bool = True
    safe_paths: bool = False
    attachments: Literal["beside", "project", "absolute"] = "beside"
    text_limit: int = 256 * 1024
    file_limit: int = 64 * MIB
    case_limit: int = 500_000


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("generic", flat=False, text_limit=MIB),
        Profile("github", text_limit=64 * 1024),
        Profile(
            "gitlab",
            case_properties=False,
            interim=False,
            message_in_text=True,
            attachments="project",
            file_limit=30_000_000,
        ),
        Profile("jenkins", places=False, case_properties=False, safe_paths=True, attachments="absolute"),
        Profile("buildkite", case_properties=False, interim=False, case_limit=5000),
    )
}
DEFAULT_PROFILE = "generic"


def profile_named(name: str, where: str = "--profile") -> Profile:
    """Return the profile called ``name``.

    Args:
        name: Its name.
        where: The source of the name, for the error.

    Raises:
        UsageError: There is no profile of that name.
    """
    if name not in PROFILES:
        raise UsageError(
            f"{where}: {name!r} is no JUnit profile", resolution="allowed: " + ", ".join(PROFILES)
        )
    return PROFILES[name]
