"""Pack mmdebstrap's output, or a folder, into a reproducible squashfs file system."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import tempfile
from collections import deque
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pytest_microvm.images.process import build_environment, build_error, follow, own_mounts, run, started

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_microvm.images.process import Progress

# Under emulation, lz4 costs a first run 5 % less CPU time than zstd, for a fifth more space. No compression
# costs it 9 % less, for 2.8 times the space (ADR 0025).
_FAST = ["-noappend", "-no-progress", "-quiet", "-comp", "lz4"]
_OPTIONS = [*_FAST, "-Xhc"]

# mksquashfs does not take the root folder itself from a tar archive; its mode would be 0777.
_TAR_ROOT = ["-root-mode", "0755"]

_PIPE = 1 << 20  # bytes in the pipe to mksquashfs; Linux lets every user have that many

_STAGES = {
    "I: running apt-get update": "fetching package lists",
    "I: downloading packages": "downloading packages",
    "I: extracting archives": "unpacking packages",
    "I: installing essential": "installing the essential packages",
    "I: installing remaining": "installing the kit's packages",
    "I: running --customize-hook": "setting up",
    "I: creating tarball": "packing",
}


def run_mmdebstrap(command: list[str], output: IO[bytes], *, epoch: int, progress: Progress) -> None:
    """Run mmdebstrap and write its archive to ``output``.

    It runs in its own mount namespace, so its mounts end with it. Without that, deleting its folder would be
    unsafe: /proc and /sys may still be mounted in there.

    Raises:
        BuildError: It failed.
    """
    with tempfile.TemporaryDirectory(prefix="pytest-microvm-", ignore_cleanup_errors=True) as temporary:
        Path(temporary).chmod(0o755)  # apt downloads as a user of its own
        environment = build_environment(SOURCE_DATE_EPOCH=str(epoch), TMPDIR=temporary)
        isolated = [*own_mounts(), *command]
        with started(isolated, environment=environment, stdout=output, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            tail = follow(process.stderr, _stages(progress))
            if process.wait() != 0:
                raise build_error("mmdebstrap", process.returncode, tail)


def squash_mmdebstrap(command: list[str], target: Path, *, epoch: int, progress: Progress) -> None:
    """Run mmdebstrap and pack its archive into ``target`` while it is written.

    Raises:
        BuildError: One of the programs failed.
    """
    environment = build_environment(SOURCE_DATE_EPOCH=str(epoch))
    with tempfile.TemporaryFile() as messages:
        packer = started(
            [*_as_root(), "mksquashfs", "-", str(target), "-tar", *_OPTIONS, *_TAR_ROOT],
            environment=environment, stdin=subprocess.PIPE, stdout=messages, stderr=messages,
        )  # fmt: skip
        with packer as packing:
            assert packing.stdin is not None
            run_mmdebstrap(command, packing.stdin, epoch=epoch, progress=progress)
            packing.stdin.close()
            if packing.wait() != 0:
                messages.seek(0)
                lines = messages.read().decode(errors="replace").splitlines()
                raise build_error("mksquashfs", packing.returncode, deque(lines[-30:]))


def squash_stream(write: Callable[[IO[bytes]], None], target: Path, *, epoch: int | None = None) -> None:
    """Pack the tar archive that ``write`` writes into ``target``.

    Args:
        write: Writes the archive.
        target: The file.
        epoch: Newest time stamp of any file, in seconds. The root folder gets it as well, so that the same
            archive always gives the same file: mksquashfs 4.5 ignores -root-time for archives. ``None``: the
            archive's time stamps are kept, and the root folder gets the current time.

    Raises:
        BuildError: mksquashfs failed.
    """
    # mksquashfs accepts only one of -mkfs-time and SOURCE_DATE_EPOCH
    times = ["-mkfs-time", "0"] if epoch is None else []
    clamped = {} if epoch is None else {"SOURCE_DATE_EPOCH": str(epoch)}
    with tempfile.TemporaryFile() as messages:
        packer = started(
            [*_as_root(), "mksquashfs", "-", str(target), "-tar", *_FAST, *_TAR_ROOT, *times],
            environment=build_environment(**clamped),
            stdin=subprocess.PIPE, stdout=messages, stderr=messages,
        )  # fmt: skip
        with packer as packing:
            assert packing.stdin is not None
            with contextlib.suppress(OSError):  # a limit of this user's; a smaller pipe is slower
                fcntl.fcntl(packing.stdin, fcntl.F_SETPIPE_SZ, _PIPE)
            try:
                write(packing.stdin)
                packing.stdin.close()
            except BrokenPipeError:
                pass  # its exit status says more
            if packing.wait() != 0:
                messages.seek(0)
                lines = messages.read().decode(errors="replace").splitlines()
                raise build_error("mksquashfs", packing.returncode, deque(lines[-30:]))


def _as_root() -> list[str]:
    """Return the argv prefix that makes a program believe that it runs as root.

    mksquashfs 4.5 makes its user the owner of the root folder that it packs from a tar archive; it accepts
    -root-uid, which has no effect then.
    """
    return [] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--"]


def squash_folder(folder: Path, target: Path, *, epoch: int) -> None:
    """Pack a folder into ``target``, owned by root, every time stamp ``epoch``.

    Raises:
        BuildError: mksquashfs failed.
    """
    times = ["-mkfs-time", str(epoch), "-all-time", str(epoch)]
    run(
        ["mksquashfs", str(folder), str(target), *_OPTIONS, "-all-root", *times],
        what="mksquashfs", environment=build_environment(),
    )  # fmt: skip


def _stages(progress: Progress) -> Callable[[str], None]:
    def heard(line: str) -> None:
        for sign, stage in _STAGES.items():
            if line.startswith(sign):
                progress(stage)

    return heard
