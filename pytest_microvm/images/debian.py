"""Say what mmdebstrap shall do: mirrors as this computer has them, options, the command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.errors import HostError
from pytest_microvm.images.process import build_environment

if TYPE_CHECKING:
    from collections.abc import Sequence

MODES = ("root", "unshare")

_KEYRINGS = tuple(
    Path("/usr/share/keyrings/debian-archive-keyring").with_suffix(suffix) for suffix in (".gpg", ".pgp")
)
_TARGET_FORMAT = "$(CREATED_BY)|$(ORIGIN)|$(CODENAME)|$(COMPONENT)|$(REPO_URI)"
# What this computer's apt was told about reaching and trusting its mirrors holds for the build as well.
_APT_OPTIONS = re.compile(
    r"Acquire::(?:https?::(?:Proxy|Timeout|CAInfo)|Check-Valid-Until|Check-Date|Retries)\b.* \".+\";"
)


def default_mode() -> str:
    """Return how mmdebstrap gets the rights it needs: as root, or with a user namespace."""
    return "root" if os.geteuid() == 0 else "unshare"


def mirror_lines(suite: str, mirror: str) -> list[str]:
    """Return the lines for apt's ``sources.list``; none leaves the choice to mmdebstrap.

    Args:
        suite: Debian suite.
        mirror: The kit's own mirror: an address, or a whole ``deb ...`` line; empty for this computer's.

    Raises:
        HostError: Debian's archive keys are not installed.
    """
    signed = f"[signed-by={keyring()}]"
    if mirror:
        return [mirror if mirror.startswith("deb ") else f"deb {signed} {mirror} {suite} main"]
    lines = []
    for target in _index_targets():
        created_by, origin, codename, component, uri = target.split("|")
        wanted = (suite, f"{suite}-updates", f"{suite}-security")
        if (created_by, origin, component) == ("Packages", "Debian", "main") and codename in wanted:
            lines.append((wanted.index(codename), f"deb {signed} {uri} {codename} main"))
    if not any(order == 0 for order, _line in lines):
        return []
    return [line for _order, line in sorted(set(lines))]


def keyring() -> Path:
    """Return the file with Debian's archive keys.

    Raises:
        HostError: It is not installed.
    """
    for path in _KEYRINGS:
        if path.is_file():
            return path
    raise HostError(
        "images cannot be built: Debian's archive keys are not installed",
        resolution="apt-get install debian-archive-keyring",
    )


def _index_targets() -> list[str]:
    return _apt("apt-get", "indextargets", "--format", _TARGET_FORMAT)


def _apt(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return []  # not a Debian host
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=build_environment())
    return done.stdout.splitlines() if done.returncode == 0 else []


def apt_options() -> list[str]:
    """Return this computer's apt settings that matter for reaching a mirror."""
    return [line for line in _apt("apt-config", "dump") if _APT_OPTIONS.fullmatch(line)]


def mmdebstrap_command(
    *, suite: str, architecture: str, variant: str, packages: Sequence[str], mirrors: Sequence[str], mode: str,
    apt: Sequence[str] = (), exclude: Sequence[str] = (), hooks: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Return the command line that writes a root file system as tar to its standard output.

    Args:
        suite: Debian suite.
        architecture: Debian's word for it, such as ``amd64``.
        variant: mmdebstrap's word for the set of packages to begin with.
        packages: Packages to add.
        mirrors: Lines of ``sources.list``; none leaves the choice to mmdebstrap.
        mode: ``root`` or ``unshare``.
        apt: Options for apt.
        exclude: Patterns of paths that dpkg leaves out.
        hooks: Commands run before the end, with the new root's path as ``$1``.
    """
    return [
        "mmdebstrap",
        f"--mode={mode}",
        f"--variant={variant}",
        f"--architectures={architecture}",
        "--format=tar",
        *([f"--include={','.join(packages)}"] if packages else []),
        *([] if mirrors else [f"--keyring={keyring()}"]),
        *(f"--aptopt={option}" for option in apt),
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in exclude),
        *(f"--customize-hook={hook}" for hook in hooks),
        "--",
        suite,
        "-",
        *mirrors,
    ]
