"""Which variables reach a machine: what the project sets, and what it passes that means something there."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

GUEST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where commands are looked for after the environment's own."""

PASSED = ("FORCE_COLOR", "NO_COLOR", "PYTHON_GIL")
"""What is passed without being asked for; tox passes more, which is about this computer's files and tools."""

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
"""What names a file, a socket or a setting of this computer; ``pass_env = *`` does not change that."""

NOT_PREPARED_WITH = ("PYTHONHASHSEED",)
"""Set anew in each run: what is installed must not depend on it."""


def passed(patterns: Iterable[str], host: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of this computer that a machine gets.

    Args:
        patterns: Names of ``pass_env``, with ``*`` and ``?``, upper or lower case.
        host: This computer's variables.
    """
    wanted, never = _matching(patterns), _matching(NEVER_PASSED)
    return {name: value for name, value in host.items() if wanted.match(name) and not never.match(name)}


def prepared_with(variables: Mapping[str, str], passed_names: Iterable[str]) -> dict[str, str]:
    """Return the variables that dependencies are installed with: none that was passed.

    A template is a file with the machine's memory in it, and may be used for long: what is passed is often a
    token, and as often another value the next time.
    """
    left_out = {*passed_names, *NOT_PREPARED_WITH}
    return {name: value for name, value in variables.items() if name not in left_out}


def path_of(own: Iterable[object], existing: str | None) -> str:
    """Return the search path of commands: the environment's folders first, none of them twice."""
    folders = [*map(str, own), *(existing or GUEST_PATH).split(":")]
    return ":".join(dict.fromkeys(folder for folder in folders if folder))


def _matching(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns) or r"(?!)", re.IGNORECASE)
