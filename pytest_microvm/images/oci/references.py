"""Parse references to container images and names of platforms, as skopeo(1) writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pytest_microvm.errors import UsageError

Transport = Literal["docker", "oci", "oci-archive", "docker-daemon"]

FORMS = (
    "docker://REGISTRY/NAME[:TAG][@sha256:DIGEST], oci:FOLDER[:TAG], oci-archive:FILE[:TAG] or "
    "docker-daemon:NAME:TAG"
)
"""The forms of references, for errors and help."""

_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}  # OCI's name: ours
_PREFIXES: dict[str, Transport] = {
    "docker://": "docker",
    "oci:": "oci",
    "oci-archive:": "oci-archive",
    "docker-daemon:": "docker-daemon",
}
_MOST = 2048  # characters
# The grammar of docker's references (distribution/reference); an address of IPv6 may stand for the host.
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_DIGEST = r"sha256:[0-9a-f]{64}"
_NAMED = re.compile(
    rf"(?P<name>(?:{_HOST}/)?{_PART}(?:/{_PART})*)(?::(?P<tag>{_TAG}))?(?:@(?P<digest>{_DIGEST}))?"
)
_TAGGED = re.compile(rf"(?P<path>.+?)(?::(?P<tag>{_TAG}))?", re.DOTALL)


@dataclass(frozen=True)
class Platform:
    """A platform of container images; machines run Linux.

    Args:
        architecture: OCI's name of the architecture: ``amd64`` or ``arm64``.
    """

    architecture: str

    def __str__(self) -> str:
        return f"linux/{self.architecture}"

    @property
    def machine(self) -> str:
        """This package's name of the architecture: ``x86_64`` or ``aarch64``."""
        return _ARCHITECTURES[self.architecture]


@dataclass(frozen=True)
class Reference:
    """A reference to a container image.

    Args:
        transport: How it is reached.
        name: The name on a registry or in a daemon; the absolute path of a folder or an archive.
        tag: Its tag; empty: none is given.
        digest: Its digest, ``sha256:...``; empty: none is given.
    """

    transport: Transport
    name: str
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        prefix = next(text for text, transport in _PREFIXES.items() if transport == self.transport)
        tag = f":{self.tag}" if self.tag else ""
        return f"{prefix}{self.name}{tag}" + (f"@{self.digest}" if self.digest else "")

    @property
    def source(self) -> str:
        """Skopeo's name of it: with a digest, without the tag, which skopeo does not accept beside it."""
        return str(Reference(self.transport, self.name, "" if self.digest else self.tag, self.digest))

    @property
    def short(self) -> str:
        """The last part of its name, for display."""
        return self.name.rpartition("/")[2]

    def at(self, digest: str) -> Reference:
        """Return the reference to another manifest of the same repository."""
        return Reference(self.transport, self.name, digest=digest)


NAMED_PREFIX = re.compile(rf"{_HOST}(?:/{_PART})*")
"""A registry, and perhaps the beginning of a name on it."""


def is_host(part: str) -> bool:
    """Return True if the first part of an image's name is a registry, as Docker tells them apart."""
    return bool({".", ":"} & set(part)) or part == "localhost" or part != part.lower()


def host_of(part: str) -> str:
    """Return a registry's host in one form: without the port that it has anyway."""
    return part.lower().removesuffix(":443")


def repository_of(name: str) -> str:
    """Return an image's name on a registry in one form, so that names can be compared.

    Docker's own registry has ``library/app`` by the name ``app``, too, so both become the shorter one. A name
    without a registry stays as it is.
    """
    first, slash, path = name.partition("/")
    if not (slash and is_host(first)):
        return name
    short = path.removeprefix("library/")
    return f"{host_of(first)}/{path if '/' in short else short}"


def is_reference(text: str) -> bool:
    """Return True if a text that names an image is a reference, valid or not, and not the name of a kit."""
    return text.startswith(tuple(_PREFIXES))


def parse_reference(text: str, base: Path) -> Reference:
    """Parse a reference.

    Args:
        text: The reference.
        base: The folder that relative paths are relative to.

    Raises:
        UsageError: It is not a reference.
    """
    prefix = next((prefix for prefix in _PREFIXES if text.startswith(prefix)), "")
    transport, rest = _PREFIXES.get(prefix), text[len(prefix) :]
    if transport is None or len(text) > _MOST or not rest.isprintable():
        raise _invalid(text)
    if transport in ("oci", "oci-archive"):
        found = _TAGGED.fullmatch(rest)
        if found is None:
            raise _invalid(text)
        return Reference(
            transport, str((base / Path(found["path"]).expanduser()).absolute()), found["tag"] or ""
        )
    found = _NAMED.fullmatch(rest)
    if found is None or (transport == "docker-daemon" and not (found["tag"] or found["digest"])):
        raise _invalid(text)
    return Reference(transport, found["name"], found["tag"] or "", found["digest"] or "")


def parse_target(text: str) -> Reference:
    """Parse the name that a pushed image gets, ``REGISTRY/NAME[:TAG]``; ``docker://`` may be before it.

    Raises:
        UsageError: It is invalid, or names no registry.
    """
    text = text.removeprefix("docker://")
    found = _NAMED.fullmatch(text) if len(text) <= _MOST else None
    host, slash, _rest = text.partition("/")
    # As in docker's references: what has no dot and no port is part of a name on docker's own registry.
    if not found or found["digest"] or not slash or not (host == "localhost" or {".", ":"} & set(host)):
        raise UsageError(
            f"invalid name of a pushed image: expected REGISTRY/NAME[:TAG], got {text[:200]!r}",
            resolution="write it like registry.example/team/kit:1.2",
        )
    return Reference("docker", found["name"], found["tag"] or "")


def parse_platform(text: str) -> Platform:
    """Parse a platform such as ``linux/amd64``.

    Raises:
        UsageError: Machines cannot have it.
    """
    system, _slash, architecture = text.partition("/")
    architecture = architecture.removesuffix("/v8") if architecture.startswith("arm64") else architecture
    if system != "linux" or architecture not in _ARCHITECTURES:
        known = " or ".join(f"linux/{name}" for name in _ARCHITECTURES)
        raise UsageError(
            f"invalid platform: expected {known}, got {text!r}",
            resolution="machines run Linux on these architectures: name one of them",
        )
    return Platform(architecture)


def platform_of(machine: str) -> Platform:
    """Return the platform of a machine's architecture, ``x86_64`` or ``aarch64``."""
    return Platform(next(name for name, ours in _ARCHITECTURES.items() if ours == machine))


def _invalid(text: str) -> UsageError:
    return UsageError(
        f"invalid image reference: expected {FORMS}, got {text[:200]!r}",
        resolution="write it like docker://registry.example/team/app:1.2 or oci:build/image",
    )
