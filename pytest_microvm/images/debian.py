"""Command lines for mmdebstrap, with this computer's mirrors and apt options."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.errors import HostError
from pytest_microvm.images.process import build_environment
from pytest_microvm.programs.needed import INSTALL

if TYPE_CHECKING:
    from collections.abc import Sequence

MODES = ("root", "unshare")

_KEYRINGS = tuple(
    Path("/usr/share/keyrings/debian-archive-keyring").with_suffix(suffix) for suffix in (".gpg", ".pgp")
)
# Without this hook a new root gets usrmerge, and with it all of Perl, to make four symbolic links.
_MERGED_USR = Path("/usr/share/mmdebstrap/hooks/merged-usr")
_RELEASES = ("forky", "trixie", "bookworm", "bullseye")  # Debian's, the newest first
_SUITES_BEFORE_MERGED_USR = ("buster", "bullseye")
_INDEX = re.compile(r"'(?P<uri>[^']+?)/?dists/(?P<suite>[^/']+)/main/binary-[^/']+/Packages[^']*' .*")
# This computer's apt settings for reaching and trusting its mirrors hold for the build as well.
_APT_OPTIONS = re.compile(
    r"Acquire::(?:https?::(?:Proxy|Timeout|CAInfo)|Check-Valid-Until|Check-Date|Retries)\b.* \".+\";"
)


def default_mode() -> str:
    """Return mmdebstrap's mode for this user: ``root``, or ``unshare`` (a user namespace)."""
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
    return [f"deb {signed} {uri} {name} main" for name, uri in debian_sources(suite, _configured_indexes())]


def debian_sources(suite: str, indexes: Sequence[str]) -> list[tuple[str, str]]:
    """Pick Debian's own archive out of this computer's package sources.

    Args:
        suite: Debian suite.
        indexes: What ``apt-get --print-uris update`` prints.

    Returns:
        Pairs of a suite (itself, its updates, its security updates) and its address; none if this computer
        does not have Debian's archive. A mirror has all suites: the addresses of another release count.
    """
    found = {(match["suite"], match["uri"]) for line in indexes if (match := _INDEX.fullmatch(line.strip()))}
    if (sources := _sources_of(suite, found)) or suite not in _RELEASES:
        return sources
    for release in _RELEASES:
        if sources := _sources_of(release, found):
            return [(name.replace(release, suite), uri) for name, uri in sources]
    return []


def _sources_of(suite: str, found: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the sources of a suite; only Debian publishes ``<suite>-updates`` beside it."""
    base = [
        (suite, uri) for name, uri in sorted(found) if name == suite and (f"{suite}-updates", uri) in found
    ]
    if not base:
        return []
    security = [(name, uri) for name, uri in sorted(found) if name == f"{suite}-security"]
    return [*base, *((f"{suite}-updates", uri) for _name, uri in base), *security]


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
        resolution=INSTALL,
    )


def _configured_indexes() -> list[str]:
    # --print-uris only reads the configuration: it needs neither package lists nor privileges.
    return _apt("apt-get", "--print-uris", "update")


def _apt(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return []  # not a Debian host
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=build_environment())
    return done.stdout.splitlines() if done.returncode == 0 else []


def apt_options() -> list[str]:
    """Return this computer's apt settings that matter for reaching a mirror."""
    return [line for line in _apt("apt-config", "dump") if _APT_OPTIONS.fullmatch(line)]


def mmdebstrap_command(
    *, suite: str, architecture: str, variant: str, packages: Sequence[str], mirrors: Sequence[str],
    mode: str, apt: Sequence[str] = (), hooks: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Return the command line that writes a root file system as tar to its standard output.

    Args:
        suite: Debian suite.
        architecture: Debian's name for it, such as ``amd64``.
        variant: mmdebstrap's name for the initial set of packages.
        packages: Packages to add.
        mirrors: Lines of ``sources.list``; none leaves the choice to mmdebstrap.
        mode: ``root`` or ``unshare``.
        apt: Options for apt.
        hooks: Hook options, such as ``--customize-hook=...``.
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
        *hooks,
        "--",
        suite,
        "-",
        *mirrors,
    ]


def merged_usr_hook(suite: str) -> list[str]:
    """Return the hook option that makes /bin, /sbin and /lib links into /usr from the start."""
    usable = _MERGED_USR.is_dir() and suite not in _SUITES_BEFORE_MERGED_USR
    return [f"--hook-dir={_MERGED_USR}"] if usable else []
