"""Runs the host's git so that no repository, hook or configuration makes it run anything else."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import IO

from pytest_microvm.errors import HostError
from pytest_microvm.sanitize import sanitize

_TIMEOUT = 600.0  # seconds
_LIMITS = (("v", 4 * 1024 * 1024), ("t", 600), ("c", 0))  # KiB of memory, seconds of CPU time, no core
_MAX_OUTPUT = 1024 * 1024  # bytes
_TAIL = 2000  # bytes of what it said that are shown
_PIECE = 65536

# Without them it could start a program, ask somebody, or write where nothing is to be written.
_SETTINGS = (
    "core.hooksPath=/dev/null", "core.fsmonitor=false", "core.sshCommand=false", "core.pager=cat",
    "core.packedGitLimit=512m", "core.attributesFile=/dev/null", "core.excludesFile=/dev/null",
    "credential.helper=", "gc.auto=0", "init.defaultBranch=main", "init.templateDir=",
    "log.showSignature=false", "maintenance.auto=false", "pack.threads=1", "protocol.allow=never",
    "safe.directory=*", "submodule.recurse=false",
)  # fmt: skip


class GitError(HostError):
    """git refused."""


def git(*arguments: str | Path, local: bool = False, stdin: IO[bytes] | None = None) -> str:
    """Run git and return what it printed.

    It gets nothing of the user's configuration and environment, at most 4 GiB of memory and ten minutes: what
    it reads may be an attack.

    Args:
        *arguments: As for git.
        local: Whether it may read from another repository on this computer.
        stdin: A file that it reads from, at its present position.

    Raises:
        GitError: It failed.
        HostError: It is not installed.
    """
    program = shutil.which("git")
    if program is None:
        raise HostError("git is not installed", resolution="install git, or mount the directory as copy")
    settings = [*_SETTINGS, *(["protocol.file.allow=always"] if local else [])]
    options = [part for setting in settings for part in ("-c", setting)]
    limits = "".join(f"ulimit -{letter} {most} 2>/dev/null; " for letter, most in _LIMITS)
    with (
        tempfile.TemporaryDirectory(prefix="microvm-git-") as home,
        subprocess.Popen(
            ["/bin/sh", "-c", limits + 'exec "$@"', "sh", program, "--no-pager", *options, *arguments],
            env=_environment(home), cwd=home, stdin=stdin or subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process,
    ):  # fmt: skip
        return _outcome(process, str(next(iter(arguments))))


def _outcome(process: subprocess.Popen[bytes], what: str) -> str:
    """Return what git printed; however much it says, it costs no memory."""
    said, printed = bytearray(), bytearray()
    assert process.stdout is not None, "both are pipes"
    assert process.stderr is not None, "both are pipes"
    readers = [
        threading.Thread(target=_drain, args=(process.stderr, said, -_TAIL), daemon=True),
        threading.Thread(target=_drain, args=(process.stdout, printed, _MAX_OUTPUT + 1), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        returncode = process.wait(_TIMEOUT)
    except BaseException as error:
        process.kill()
        if isinstance(error, subprocess.TimeoutExpired):
            raise GitError(f"git {what}: not done after {_TIMEOUT:g} s") from error
        raise
    finally:
        for reader in readers:
            reader.join()
    if returncode or len(printed) > _MAX_OUTPUT:
        details = sanitize(said.decode("utf-8", "replace").strip()) or f"status {returncode}"
        raise GitError("git could not do its part", details=details)
    return printed.decode("utf-8", "surrogateescape")


def _drain(pipe: IO[bytes], kept: bytearray, size: int) -> None:
    """Read a pipe to its end and keep the first ``size`` bytes, or the last if that is negative."""
    with contextlib.suppress(OSError, ValueError):
        while data := pipe.read(_PIECE):
            if size < 0:
                kept += data
                del kept[:size]
            else:
                kept += data[: max(0, size - len(kept))]


def _environment(home: str) -> dict[str, str]:
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": home,
        "LC_ALL": "C",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_SYSTEM": os.devnull,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "false",
        "GIT_EDITOR": "false",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_OPTIONAL_LOCKS": "0",
    }
