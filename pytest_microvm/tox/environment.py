"""Select the variables for a machine: those the project sets, and passed ones that are meaningful there."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

GUEST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""The search path for commands after the environment's own folders."""

PASSED = ("FORCE_COLOR", "NO_COLOR", "PYTHON_GIL")
"""Variables that are passed by default; tox passes more, which concern this computer's files and tools."""

PASSED_ON_TERMINAL = ("TERM",)

NEVER_PASSED = (
    "PATH", "HOME", "PWD", "OLDPWD", "SHELL", "TMPDIR", "TEMP", "TMP", "NETRC", "TERMINFO",
    "SSH_AUTH_SOCK", "SSH_AGENT_PID", "SSH_CLIENT", "SSH_CONNECTION", "SSH_TTY",
    "GPG_AGENT_INFO", "GNUPGHOME", "DBUS_SESSION_BUS_ADDRESS", "DISPLAY", "WAYLAND_DISPLAY", "XAUTHORITY",
    "XDG_*", "LD_LIBRARY_PATH", "LD_PRELOAD", "NIX_LD", "NIX_LD_LIBRARY_PATH", "PYTHONHOME",
    "VIRTUAL_ENV", "CONDA_*", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "FTP_PROXY", "NO_PROXY",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT",
    "PYTEST_MICROVM_*", "TOX_*",
)  # fmt: skip
"""Variables that name a file, a socket or a setting of this computer; even ``pass_env = *`` skips them."""

NOT_PREPARED_WITH = ("PYTHONHASHSEED",)
"""Variables that change in each run: installations must not depend on them."""


def passed(patterns: Iterable[str], host: Mapping[str, str]) -> dict[str, str]:
    """Return this computer's variables that are passed to a machine.

    Args:
        patterns: Names of ``pass_env``, with ``*`` and ``?``, upper or lower case.
        host: This computer's variables.
    """
    wanted, never = _matching(patterns), _matching(NEVER_PASSED)
    return {name: value for name, value in host.items() if wanted.match(name) and not never.match(name)}


def prepared_with(variables: Mapping[str, str], passed_names: Iterable[str]) -> dict[str, str]:
    """Return the variables for installing dependencies: no passed ones, and none that changes per run.

    A template is a file with the machine's memory in it, and may be used for a long time: a passed variable
    is often a token, and often has another value the next time.
    """
    left_out = {*passed_names, *NOT_PREPARED_WITH}
    return {name: value for name, value in variables.items() if name not in left_out}


def path_of(own: Iterable[object], existing: str | None) -> str:
    """Return the search path for commands: the environment's folders first, without duplicates."""
    folders = [*map(str, own), *(existing or GUEST_PATH).split(":")]
    return ":".join(dict.fromkeys(folder for folder in folders if folder))


def _matching(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns) or r"(?!)", re.IGNORECASE)
