"""Parse the documents of a container image, which anybody may have written: index, manifest, configuration.

The forms are those of the OCI image specification 1.1, and Docker's image manifest version 2, schema 2.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from pytest_microvm.errors import PullError
from pytest_microvm.images.oci.references import Platform
from pytest_microvm.untrusted.text import sanitize_line

MAX_DOCUMENT = 4 * 1024**2
"""Bytes of a document; registries have the same limit."""

MAX_LAYERS = 127
"""Layers of an image, as in Docker."""

_MAX_BLOB = 64 * 1024**3  # bytes of a compressed layer
_MAX_ENTRIES = 1000  # of an index
_MAX_VARIABLES = 1000
_MAX_WORDS = 1000
_MAX_TEXT = 128 * 1024  # bytes of a variable or an argument; Linux has the same limit (execve(2))
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_INDEXES = frozenset([
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
])  # fmt: skip
_MANIFESTS = frozenset([
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
])  # fmt: skip
_CONFIGURATIONS = frozenset([
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
])  # fmt: skip
# How a layer is packed is seen in its first bytes: registries' names for it are not reliable.
_LAYERS = re.compile(
    r"application/vnd\.(oci\.image\.layer\.(nondistributable\.)?v1\.tar|docker\.image\.rootfs\.diff\.tar)"
    r"([+.](gzip|zstd))?"
)
_NAME = "org.opencontainers.image.ref.name"


@dataclass(frozen=True)
class Descriptor:
    """A reference of one document to another one, or to a layer.

    Args:
        digest: ``sha256:...``.
        size: Bytes.
        media_type: Its kind.
        platform: The system and architecture that it is for, such as ``linux/amd64``; empty: it does not say.
        name: Its name in a folder's index, usually a tag.
    """

    digest: str
    size: int
    media_type: str
    platform: str = ""
    name: str = ""

    @property
    def is_index(self) -> bool:
        """True if it refers to an index, not to an image."""
        return self.media_type in _INDEXES


@dataclass(frozen=True)
class ImageManifest:
    """An image: its configuration and its layers, the lowest first."""

    configuration: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True)
class ImageConfiguration:
    """What an image says about its machines.

    Args:
        platform: Its system and architecture.
        diff_ids: Digests of its layers' uncompressed archives, the lowest first.
        environment: Variables.
        entrypoint: The beginning of its command line.
        arguments: The rest of its command line, unless the user gives another one.
        workdir: Its working directory; empty: ``/``.
        user: The user of its command: ``USER`` or ``USER:GROUP``, names or numbers; empty: root.
    """

    platform: str
    diff_ids: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = field(default=())
    entrypoint: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""


def parse_document(data: bytes, what: str) -> dict[str, Any]:
    """Return the object in a document's JSON text.

    Raises:
        PullError: It is not JSON, not an object, or too large.
    """
    if len(data) > MAX_DOCUMENT:
        raise refused(what, f"it has more than {MAX_DOCUMENT // 1024**2} MiB")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise refused(what, f"it is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise refused(what, "it is no JSON object")
    return document


def parse_index(document: dict[str, Any]) -> list[Descriptor]:
    """Return the entries of an index.

    Raises:
        PullError: It is not one.
    """
    entries = parse_list(document.get("manifests"), "the index", "manifests", _MAX_ENTRIES)
    return [parse_descriptor(entry, "the index") for entry in entries]


def is_index(document: dict[str, Any]) -> bool:
    """Return True if a document is an index; its kind may be stated in it, or not."""
    kind = document.get("mediaType")
    return kind in _INDEXES or (kind is None and "manifests" in document)


def parse_manifest(document: dict[str, Any]) -> ImageManifest:
    """Return the image that a manifest describes.

    Raises:
        PullError: It is something else: an artifact, an image of another kind, an image of an old format.
    """
    what = "the manifest"
    if document.get("schemaVersion") != 2:  # noqa: PLR2004 - of both formats
        raise refused(what, "it has a format that is older than 2017 (schema 1)", "push the image again")
    kind = document.get("mediaType")
    if kind is not None and kind not in _MANIFESTS:
        raise refused(what, f"it is of the kind {_quoted(kind)}")
    configuration = parse_descriptor(document.get("config"), what)
    if configuration.media_type not in _CONFIGURATIONS:
        raise refused(what, f"it is no image, but has the kind {_quoted(configuration.media_type)}")
    if configuration.size > MAX_DOCUMENT:
        raise refused(what, f"its configuration has more than {MAX_DOCUMENT // 1024**2} MiB")
    entries = parse_list(document.get("layers"), what, "layers", MAX_LAYERS)
    layers = tuple(parse_descriptor(entry, what) for entry in entries)
    for layer in layers:
        if not _LAYERS.fullmatch(layer.media_type):
            raise refused(what, f"a layer has the kind {_quoted(layer.media_type)}")
    return ImageManifest(configuration, layers)


def parse_configuration(document: dict[str, Any], layers: int) -> ImageConfiguration:
    """Return an image's configuration.

    Args:
        document: The document.
        layers: The number of layers in its manifest.

    Raises:
        PullError: It is damaged, or does not belong to the manifest.
    """
    what = "the configuration"
    roots = document.get("rootfs")
    if not isinstance(roots, dict) or roots.get("type") != "layers":
        raise refused(what, "it has no layers")
    diff_ids = parse_list(roots.get("diff_ids"), what, "rootfs.diff_ids", MAX_LAYERS)
    if not all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in diff_ids):
        raise refused(what, "rootfs.diff_ids holds something else than SHA-256 digests")
    if len(diff_ids) != layers:
        raise refused(what, f"it has {len(diff_ids)} layers, and the manifest has {layers}")
    inner = document.get("config") or {}
    if not isinstance(inner, dict):
        raise refused(what, "config is no object")
    workdir = parse_text(inner.get("WorkingDir"), what, "WorkingDir")
    system, architecture = (parse_text(document.get(key), what, key) for key in ("os", "architecture"))
    return ImageConfiguration(
        platform=f"{system}/{architecture}",
        diff_ids=tuple(diff_ids),
        environment=_variables(inner.get("Env"), what),
        entrypoint=parse_words(inner.get("Entrypoint"), what, "Entrypoint"),
        arguments=parse_words(inner.get("Cmd"), what, "Cmd"),
        workdir=workdir if workdir.startswith("/") or not workdir else f"/{workdir}",
        user=parse_text(inner.get("User"), what, "User"),
    )


def choose(entries: list[Descriptor], platform: Platform, shown: str) -> Descriptor:
    """Return the entry of an index that is for a platform; an entry that does not say its platform may be.

    Raises:
        PullError: There is none.
    """
    wanted = str(platform)
    found = [entry for entry in entries if entry.platform == wanted]
    unknown = [entry for entry in entries if not entry.platform]
    if not found and len(unknown) == 1 and len(entries) == 1:
        return unknown[0]
    if not found:
        raise wrong_platform(shown, wanted, [entry.platform for entry in entries if entry.platform])
    return found[0]


def wrong_platform(shown: str, wanted: str, offered: list[str]) -> PullError:
    """Return the error for an image that is not for the wanted platform."""
    known = sorted({sanitize_line(one, 100) for one in offered if not one.startswith("unknown")})
    return PullError(
        f"{shown} has no image for {wanted}",
        reason="absent",
        details="it is for " + (", ".join(known[:50]) or "no platform"),
        resolution="pull it for another platform (--platform), or build it for this one",
    )


def refused(what: str, why: str, resolution: str = "") -> PullError:
    """Return the error for a part of an image that cannot be used."""
    return PullError(
        f"{what} of the image is refused: {why}",
        reason="refused",
        resolution=resolution or "build the image again, or pull another one",
    )


def parse_descriptor(value: object, what: str) -> Descriptor:
    """Return a reference to another document or a blob.

    Raises:
        PullError: It is invalid.
    """
    if not isinstance(value, dict):
        raise refused(what, "it refers to nothing where it has to")
    digest, size, kind = value.get("digest"), value.get("size"), value.get("mediaType")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise refused(what, f"expected a SHA-256 digest, got {_quoted(digest)}")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _MAX_BLOB:
        raise refused(what, f"expected a size of at most {_MAX_BLOB // 1024**3} GiB, got {_quoted(size)}")
    if not isinstance(kind, str):
        raise refused(what, f"expected a media type, got {_quoted(kind)}")
    notes = value.get("annotations")
    name = notes.get(_NAME) if isinstance(notes, dict) else None
    return Descriptor(
        digest, size, kind, _platform(value.get("platform")), name if isinstance(name, str) else ""
    )


def _platform(value: object) -> str:
    if not isinstance(value, dict):
        return ""
    return f"{value.get('os')}/{value.get('architecture')}"


def _variables(value: object, what: str) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    for item in parse_list(value or [], what, "Env", _MAX_VARIABLES):
        name, equals, text = parse_text(item, what, "Env").partition("=")
        if not name or not equals:
            raise refused(what, f"Env: expected NAME=VALUE, got {_quoted(item)}")
        found[name] = text
    return tuple(sorted(found.items()))


def parse_words(value: object, what: str, key: str) -> tuple[str, ...]:
    """Return a list of texts; an absent one is empty.

    Raises:
        PullError: It is something else.
    """
    return tuple(parse_text(item, what, key) for item in parse_list(value or [], what, key, _MAX_WORDS))


def parse_text(value: object, what: str, key: str) -> str:
    """Return a text that Linux can take; an absent one is empty.

    Raises:
        PullError: It is something else.
    """
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value or len(value) > _MAX_TEXT or not _encodes(value):
        raise refused(what, f"{key}: expected text, got {_quoted(value)}")
    return value


def _encodes(text: str) -> bool:
    """Return False for half a character, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_list(value: object, what: str, key: str, most: int) -> list[Any]:
    """Return a list of at most ``most`` items.

    Raises:
        PullError: It is something else.
    """
    if not isinstance(value, list):
        raise refused(what, f"{key}: expected a list, got {_quoted(value)}")
    if len(value) > most:
        raise refused(what, f"{key}: at most {most} are possible, it has {len(value)}")
    return value


def _quoted(value: object) -> str:
    return sanitize_line(repr(value), 100)
