"""Build a kit's root file system: one mmdebstrap run, packed as squashfs."""

from __future__ import annotations

import io
import shlex
import tarfile
from typing import TYPE_CHECKING

from pytest_microvm.images.debian import apt_options, merged_usr_hook, mirror_lines, mmdebstrap_command
from pytest_microvm.images.squashfs import squash_mmdebstrap
from pytest_microvm.images.wheels import download_wheels

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_microvm.images.kits import Kit
    from pytest_microvm.images.process import Progress

_STAGING = "microvm-build"  # at the new root during the build only
_NOT_KEPT = "/usr/share/doc /usr/share/info /usr/share/lintian /usr/share/locale /usr/share/man"
# During the build, dpkg leaves out what would be deleted at the end, and does not wait for the disk. This is
# a hook because mmdebstrap's own --dpkgopt=path-exclude sends every package through a slow filter.
_DPKG_CONFIG = "".join(f"path-exclude={folder}/*\\n" for folder in _NOT_KEPT.split()) + "force-unsafe-io\\n"
_DPKG_HOOK = f"printf '{_DPKG_CONFIG}' > \"$1/etc/dpkg/dpkg.cfg.d/microvm\""

_PIP_INSTALL = (
    "python3 -m pip install --quiet --no-index --no-deps --no-compile --break-system-packages "
    "--ignore-installed "  # a package of Debian's stays where it is, below the wheel in Python's search path
    "--root-user-action=ignore --disable-pip-version-check"
)
# A wheel is unpacked on the building computer, and not run: Python would read its .pth files as it starts.
_PYTHON = "python3 -I -S"
_COMPILE = f"{_PYTHON} -m compileall -q --invalidation-mode unchecked-hash"

# Runs first, inside the new root: mmdebstrap has copied the building computer's name into it.
_BEGIN = r"""
set -e
umask 022
cd /
export HOME=/root DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
rm -f /etc/hostname /etc/hosts
echo microvm > /etc/hostname
printf '127.0.0.1\tlocalhost microvm\n::1\tlocalhost ip6-localhost\n' > /etc/hosts
"""
# Runs last, except for mmdebstrap's own cleaning of /tmp. /tmp must not be touched here: it has the
# configuration of mmdebstrap's apt, without which apt would work on the building computer's lists.
# Nothing else of the building computer may remain either: its resolver, the credentials in a mirror's
# address, its apt options. .pyc files are made valid whatever the time stamps: bit 1 of a hash-based .pyc's
# flags means "check the source" (PEP 552), and SOURCE_DATE_EPOCH has made all of them hash-based.
_FINISH = r"""
rm -rf /%(staging)s /root/.cache /var/tmp/*
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/*
rm -f /var/cache/debconf/*-old /var/lib/dpkg/*-old
find /var/log -type f -delete
for folder in %(not_kept)s; do rm -rf $folder/*; done
rm -f /etc/apt/apt.conf.d/99mmdebstrap /etc/dpkg/dpkg.cfg.d/99mmdebstrap /etc/dpkg/dpkg.cfg.d/microvm
rm -f /etc/passwd- /etc/group- /etc/shadow- /etc/gshadow- /etc/.pwd.lock
rm -f /etc/resolv.conf /etc/machine-id
mkdir -p -m 0755 /var/cache/apt/archives
mkdir -m 0700 /var/cache/apt/archives/partial /var/lib/apt/lists/partial
sed -i -E 's#(://)[^/ @]*@#\1#' /etc/apt/sources.list
: > /etc/resolv.conf
: > /etc/machine-id
chmod 444 /etc/machine-id
"""
# In a machine, to open a file for writing copies it to the scratch disk.
TRUST_PYC = r"""
import pathlib
for folder in ("/usr/lib", "/usr/local/lib", "/usr/share/python3"):
    for path in pathlib.Path(folder).rglob("*.pyc"):
        with path.open("rb") as file:
            checked = file.read(8)[4:] == b"\3\0\0\0"
        if checked:
            with path.open("r+b") as file:
                file.seek(4)
                file.write(b"\1\0\0\0")
"""
"""The Python program that makes Python accept every ``.pyc`` file without a look at its source."""


def build_rootfs(folder: Path, kit: Kit, *, python: str, mode: str, epoch: int, progress: Progress) -> Path:
    """Build a kit's root file system in an empty folder.

    Args:
        folder: Where the file and everything temporary go.
        kit: The kit to build.
        python: Version of the suite's Python, for its wheels.
        mode: mmdebstrap's mode.
        epoch: Newest time stamp of any file, in seconds.
        progress: Called with each stage.

    Returns:
        The squashfs file.

    Raises:
        BuildError: A step failed.
        HostError: This computer lacks something that a step needs.
    """
    wheels: list[Path] = []
    if kit.wheels:
        progress(f"downloading {len(kit.wheels)} wheels")
        wheels = download_wheels(folder / "wheels", kit, python)
    staging = folder / "staging.tar"
    staging.write_bytes(staging_archive(kit, wheels))
    command = mmdebstrap_command(
        suite=kit.suite,
        architecture=kit.debian_architecture,
        variant="apt",
        packages=kit.packages,
        mirrors=mirror_lines(kit.suite, kit.mirror),
        mode=mode,
        apt=apt_options(),
        hooks=[
            "--skip=cleanup/apt",  # the setup script does it, with the same owners for every user
            *merged_usr_hook(kit.suite),
            f"--extract-hook={_DPKG_HOOK}",
            f"--customize-hook=tar-in {shlex.quote(str(staging))} /",
            f'--customize-hook=chroot "$1" /bin/sh -e /{_STAGING}/setup',
        ],
    )
    target = folder / "rootfs.squashfs"
    squash_mmdebstrap(command, target, epoch=epoch, progress=progress)
    return target


def staging_archive(kit: Kit, wheels: list[Path]) -> bytes:
    """Return the tar archive with the kit's files, its wheels and the script that puts them in place."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, file in enumerate(kit.files):
            _add(tar, f"files/{number}", file.content(), file.mode)
        for wheel in wheels:
            _add(tar, f"wheels/{wheel.name}", wheel.read_bytes(), 0o644)
        _add(tar, "trust_pyc.py", TRUST_PYC.encode(), 0o644)
        _add(tar, "setup", setup_script(kit).encode(), 0o755)
    return buffer.getvalue()


def setup_script(kit: Kit) -> str:
    """Return the shell script that runs in the new root once the packages are installed."""
    lines = [_BEGIN]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in kit.environment]
    for number, file in enumerate(kit.files):
        lines.append(f"install -D -m {file.mode:04o} /{_STAGING}/files/{number} {shlex.quote(file.target)}")
    if kit.wheels:
        lines.append(f"{_PIP_INSTALL} --find-links=/{_STAGING}/wheels {shlex.join(kit.wheels)}")
        lines.append(f"{_COMPILE} /usr/local/lib/python3*/dist-packages")
    lines.append(f"if command -v python3 > /dev/null; then {_PYTHON} /{_STAGING}/trust_pyc.py; fi")
    return "\n".join(lines) + _FINISH % {"staging": _STAGING, "not_kept": _NOT_KEPT}


def _add(tar: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    member = tarfile.TarInfo(f"{_STAGING}/{name}")
    member.size = len(data)
    member.mode = mode
    tar.addfile(member, io.BytesIO(data))
