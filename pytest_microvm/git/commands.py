"""Run the host's git such that no repository, hook or configuration makes it run anything else.

No other module starts git (``tests/unit/test_one_git.py``). A repository that this process did not create is
used through :class:`pytest_microvm.git.repository.Repository`, which hides its configuration.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pytest_microvm.errors import HostError
from pytest_microvm.untrusted.program_path import absolute_path
from pytest_microvm.untrusted.text import sanitize

_TIMEOUT = 600.0  # seconds
_LIMITS = (("v", 4 * 1024 * 1024), ("t", 600), ("c", 0))  # KiB of memory, seconds of CPU time, no core
_MAX_OUTPUT = 1024 * 1024  # bytes
_MAX_WORD = 64 * 1024  # bytes of a line, a path or a header that it prints
_TAIL = 2000  # bytes of its stderr that are shown
_PIECE = 65536
_CONFIGURATION = "gitconfig"
_USERS = re.compile(r"HOME|XDG_CONFIG_HOME|GIT_CONFIG_(NOSYSTEM|SYSTEM|GLOBAL|COUNT|(KEY|VALUE)_[0-9]+)")

# Without these settings git could start a program, prompt the user, or write where it must not.
_SETTINGS = (
    "core.hooksPath=/dev/null", "core.fsmonitor=false", "core.sshCommand=false", "core.pager=cat",
    "core.packedGitLimit=512m", "core.attributesFile=/dev/null", "core.excludesFile=/dev/null",
    "core.alternateRefsCommand=false", "core.commitGraph=false", "core.untrackedCache=false",
    "credential.helper=", "gc.auto=0", "init.defaultBranch=main", "init.templateDir=",
    "log.showSignature=false", "maintenance.auto=false", "pack.threads=1", "protocol.allow=never",
    "safe.bareRepository=explicit", "safe.directory=*", "submodule.recurse=false",
)  # fmt: skip


class GitError(HostError):
    """A git command failed."""


def git_program() -> str | None:
    """Return the path of git; ``None`` if it is not installed."""
    return shutil.which("git", path=absolute_path())


def user_config(*arguments: str) -> str:
    """Run git-config(1) on the user's and the computer's configuration, and return its output.

    The output is data here; git obeys none of it, and no repository takes part.

    Args:
        *arguments: As for ``git config``.

    Raises:
        GitError: It failed, for example because there is no such key.
        HostError: git is not installed.
    """
    command = ("config", *arguments)
    with _started(command, local=False, stdin=subprocess.DEVNULL, environment=_users()) as process:
        return _outcome(process, "config")


def git(*arguments: str | Path, local: bool = False, stdin: IO[bytes] | None = None) -> str:
    """Run git and return its output.

    It gets none of the user's configuration and environment, and at most 4 GiB of memory and ten minutes: its
    input may be an attack.

    Args:
        *arguments: As for git.
        local: Whether it may read from another repository on this computer.
        stdin: A file to read from, at its present position.

    Raises:
        GitError: It failed.
        HostError: It is not installed.
    """
    with _started(arguments, local=local, stdin=stdin or subprocess.DEVNULL) as process:
        return _outcome(process, str(next(iter(arguments))))


@contextmanager
def git_talk(*arguments: str | Path) -> Iterator[Talk]:
    """Run git while the block runs, and exchange data with it beyond the limits of :func:`git`.

    It runs as in :func:`git`, but may print any amount and take ten minutes for each piece. A block that is
    left early kills it.

    Args:
        *arguments: As for git.

    Raises:
        GitError: It failed, or printed something unexpected.
        HostError: It is not installed.
    """
    with _started(arguments, local=False, stdin=subprocess.PIPE) as process:
        said = bytearray()
        assert process.stderr is not None, "it is a pipe"
        listener = threading.Thread(target=_drain, args=(process.stderr, said, -_TAIL), daemon=True)
        listener.start()
        finished = False
        try:
            yield Talk(process)
            finished = True
        except _EarlyExit:
            pass
        finally:
            if not finished:
                process.kill()
            assert process.stdin is not None, "it is a pipe"
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            assert process.stdout is not None, "it is a pipe"
            process.stdout.close()  # unread output must not block it
            returncode = process.wait()
            listener.join()
        if not finished or returncode not in (0, -signal.SIGPIPE):
            details = sanitize(said.decode("utf-8", "replace").strip()) or f"status {returncode}"
            raise GitError("git could not do its part", details=details)


class _EarlyExit(Exception):
    """git ended before its expected output; its stderr has the reason."""


class Talk:
    """A running git process that gets requests and returns responses."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None, "both are pipes"
        assert process.stdout is not None, "both are pipes"
        self._in = process.stdin
        self._out = process.stdout.fileno()
        self._read = bytearray()

    def ask(self, question: bytes) -> None:
        """Write a request to its stdin."""
        try:
            self._in.write(question)
            self._in.flush()
        except BrokenPipeError:
            raise _EarlyExit from None

    def words(self, end: bytes) -> Iterator[bytes]:
        """Yield all of its output, split at each byte ``end``.

        Raises:
            GitError: A word is too long, or does not arrive in time.
        """
        while self._read or self._more():
            yield self.until(end)

    def until(self, end: bytes) -> bytes:
        """Return its output up to the byte ``end``, without that byte.

        Raises:
            GitError: The output is too long, or does not arrive in time.
        """
        start = 0
        while (position := self._read.find(end, start)) < 0:
            start = len(self._read)
            if start > _MAX_WORD:
                raise GitError("git says too much", details=f"more than {_MAX_WORD} bytes without an end")
            if not self._more():
                raise _EarlyExit
        word = bytes(self._read[:position])
        del self._read[: position + 1]
        return word

    def exactly(self, size: int) -> bytes:
        """Return the next ``size`` bytes of its output.

        Raises:
            GitError: They do not arrive in time.
        """
        while len(self._read) < size:
            if not self._more():
                raise _EarlyExit
        data = bytes(self._read[:size])
        del self._read[:size]
        return data

    def _more(self) -> bool:
        ready = select.poll()
        ready.register(self._out, select.POLLIN)
        if not ready.poll(_TIMEOUT * 1000):
            raise GitError(f"git printed nothing for {_TIMEOUT:g} s")
        data = os.read(self._out, _PIECE)
        self._read += data
        return bool(data)


@contextmanager
def _started(
    arguments: Sequence[str | Path],
    *,
    local: bool,
    stdin: IO[bytes] | int,
    environment: dict[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start git with a temporary home, or with ``environment``; see :func:`git`."""
    program = git_program()
    if program is None:
        raise HostError(
            "git is not installed", resolution="install git: without it nobody knows what a repository has"
        )
    settings = [*_SETTINGS, *(["protocol.file.allow=always"] if local else [])]
    options = [part for setting in settings if environment is None for part in ("-c", setting)]
    limits = "".join(f"ulimit -{letter} {most} 2>/dev/null; " for letter, most in _LIMITS)
    with (
        _home() as home,
        subprocess.Popen(
            ["/bin/sh", "-c", limits + 'exec "$@"', "sh", program, "--no-pager", *options, *arguments],
            env=environment or _environment(home, local=local), cwd=home, stdin=stdin,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process,
    ):  # fmt: skip
        yield process


@contextmanager
def _home() -> Iterator[str]:
    """Create a home whose configuration also applies to the git at the other repository of a fetch.

    Settings given with ``-c`` do not (``local_repo_env`` in git's environment.c), and that git also refuses
    repositories of another user, as root has them in a container (git 2.39.5, for one). The same release
    heeds ``safe.bareRepository`` only where no repository can set it: here, and with ``-c``.
    """
    with tempfile.TemporaryDirectory(prefix="microvm-git-") as home:
        text = "[safe]\n\tdirectory = *\n\tbareRepository = explicit\n"
        Path(home, _CONFIGURATION).write_text(text, encoding="ascii")
        yield home


def _outcome(process: subprocess.Popen[bytes], what: str) -> str:
    """Wait for git and return its output; memory stays bounded, however much it prints."""
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
        end = time.monotonic() + _TIMEOUT
        for reader in readers:  # the pipes close when git ends; waiting for a process would poll
            reader.join(max(0, end - time.monotonic()))
        returncode = process.wait(max(0, end - time.monotonic()))
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


def _environment(home: str, *, local: bool) -> dict[str, str]:
    return {
        "PATH": absolute_path(),
        "HOME": home,
        "LC_ALL": "C",
        "GIT_CEILING_DIRECTORIES": str(Path(home).parent),  # nothing there is a repository of ours
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_SYSTEM": os.devnull,
        "GIT_CONFIG_GLOBAL": f"{home}/{_CONFIGURATION}",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ALLOW_PROTOCOL": "file" if local else "none",  # it overrides a repository's own configuration
        "GIT_ASKPASS": "false",
        "GIT_EDITOR": "false",
        "GIT_GRAFT_FILE": os.devnull,
        "GIT_NO_LAZY_FETCH": "1",  # since 2.45; before that no protocol is allowed to a fetch
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_OPTIONAL_LOCKS": "0",
    }


def _users() -> dict[str, str]:
    """Return the environment in which git finds the user's configuration, and no repository."""
    kept = {key: value for key, value in os.environ.items() if _USERS.fullmatch(key)}
    here = {"PATH": absolute_path(), "LC_ALL": "C", "GIT_CEILING_DIRECTORIES": tempfile.gettempdir()}
    return {**kept, **here}
