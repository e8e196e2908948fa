"""Describe a built image as an OCI artifact, and check such artifacts, which anybody may have written.

The artifact is an image manifest of the OCI image specification 1.1 ("Guidelines for Artifact Usage"). Its
configuration is the image's own manifest, whose digest is the image's; its layers are the image's files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_microvm.errors import KitError
from pytest_microvm.images.blobs import canonical_json
from pytest_microvm.images.oci.documents import (
    MAX_LAYERS,
    Descriptor,
    ImageManifest,
    parse_descriptor,
    parse_document,
    parse_list,
    parse_text,
    parse_words,
    refused,
    wrong_platform,
)
from pytest_microvm.images.oci.references import Platform, platform_of
from pytest_microvm.images.records import ROLES
from pytest_microvm.images.resources import parse_resources
from pytest_microvm.untrusted.text import sanitize_line

ARTIFACT = "application/vnd.pytest-microvm.image.v1"
"""The kind of the artifact."""

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIGURATION = f"{ARTIFACT}+json"

_FILE = "application/vnd.pytest-microvm.{}.v1"  # a file, by its role
_LAYER = "layer"
_MAX_CONFIGURATION = 1024**2  # bytes
_MAX_FILE = 16 * 1024**3  # bytes
_MAX_VARIABLES = 1000
_MAX_SERVICES = 100
_FILE_DIGEST = re.compile(r"[0-9a-f]{64}")
_SERVICE = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_NEEDED = {"format", "architecture", "environment", "files", "resources"}
_KNOWN = _NEEDED | {"layers", "start", "services"}
_LEAST_RESOURCES = {"cpus", "memory", "disk"}
_MOST = 2**50  # bytes or seconds
_WHAT = "the manifest"
_PUSH_AGAIN = "build and push it again, with the version of pytest-microvm that pulls it"


def is_built(document: Mapping[str, Any]) -> bool:
    """Return True if a registry's document describes a built image, valid or not."""
    configuration = document.get("config")
    kind = configuration.get("mediaType") if isinstance(configuration, dict) else None
    return document.get("artifactType") == ARTIFACT or kind == CONFIGURATION


def parse_artifact(document: Mapping[str, Any]) -> ImageManifest:
    """Return the image's manifest as ``configuration``, and its files as ``layers``.

    Raises:
        PullError: It is invalid.
    """
    what = "the artifact"
    if document.get("schemaVersion") != 2 or document.get("mediaType", MANIFEST) != MANIFEST:  # noqa: PLR2004
        raise refused(what, "it is no OCI image manifest")
    configuration = parse_descriptor(document.get("config"), what)
    if (document.get("artifactType"), configuration.media_type) != (ARTIFACT, CONFIGURATION):
        raise refused(what, "its kind and that of its configuration differ")
    if configuration.size > _MAX_CONFIGURATION:
        raise refused(what, f"its configuration has more than {_MAX_CONFIGURATION // 1024**2} MiB")
    entries = parse_list(document.get("layers"), what, "layers", len(ROLES) + MAX_LAYERS)
    files = tuple(parse_descriptor(entry, what) for entry in entries)
    if any(file.size > _MAX_FILE for file in files):
        raise refused(what, f"a file has more than {_MAX_FILE // 1024**3} GiB")
    return ImageManifest(configuration, files)


def parse_image(
    data: bytes, artifact: ImageManifest, *, image_format: int, platform: Platform, shown: str
) -> dict[str, Any]:
    """Return a built image's own manifest.

    Args:
        data: The artifact's configuration, checked against its digest.
        artifact: The artifact, whose files must be the image's.
        image_format: The format that this version reads.
        platform: The wanted platform.
        shown: The image, for errors.

    Raises:
        PullError: It is invalid, of another version or for another platform, or the files are not its.
    """
    manifest = parse_document(data, _WHAT)
    if manifest.get("format") != image_format:
        raise refused(_WHAT, f"it has another format than {image_format}", _PUSH_AGAIN)
    check_image(data)
    if manifest["architecture"] != platform.machine:
        raise wrong_platform(shown, str(platform), [str(platform_of(manifest["architecture"]))])
    _check_files(artifact.layers, _kinds(manifest))
    return manifest


def check_image(data: bytes) -> None:
    """Check a built image's own manifest.

    It may not allow its machines anything: network rules and a mirrored environment are refused.

    Raises:
        PullError: It is invalid.
    """
    manifest = parse_document(data, _WHAT)
    try:
        sound = canonical_json(manifest) == data and manifest.keys() >= _NEEDED
    except RecursionError:
        sound = False
    if not sound:
        raise refused(_WHAT, "it has another form", _PUSH_AGAIN)
    if "network" in manifest:
        raise refused(
            _WHAT,
            "it allows its machines network access",
            "remove `network` from the kit, and write the rules where the image is used",
        )
    if unknown := manifest.keys() - _KNOWN:
        raise refused(_WHAT, f"unknown key {_quoted(min(unknown))}", _PUSH_AGAIN)
    if manifest["architecture"] not in ("x86_64", "aarch64"):
        raise refused(_WHAT, f"unknown architecture {_quoted(manifest['architecture'])}")
    _check_digests(manifest)
    _check_environment(manifest["environment"])
    _check_resources(manifest["resources"])
    _check_start(manifest.get("start", {}))
    _check_services(manifest.get("services", []))


def artifact_of(data: bytes, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the document that describes a built image to registries.

    Args:
        data: The image's own manifest.
        sizes: The bytes of its files, by their digests.
    """
    files = _kinds(parse_document(data, _WHAT))
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": ARTIFACT,
        "config": descriptor_of(data, CONFIGURATION),
        "layers": [
            {"mediaType": kind, "digest": f"sha256:{digest}", "size": sizes[digest]}
            for digest, kind in files.items()
        ],
    }


def descriptor_of(data: bytes, kind: str) -> dict[str, Any]:
    """Return the descriptor of a document."""
    return {"mediaType": kind, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}


def _kinds(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the media types of an image's files by their digests, in order; a file with two roles is one."""
    roles = [(manifest["files"][role], role) for role in ROLES]
    roles += [(digest, _LAYER) for digest in manifest.get("layers", [])]
    kinds: dict[str, str] = {}
    for digest, role in roles:
        kinds.setdefault(digest, _FILE.format(role))
    return kinds


def _check_files(files: tuple[Descriptor, ...], kinds: Mapping[str, str]) -> None:
    what = "the artifact"
    there = [file.digest.partition(":")[2] for file in files]
    for digest, kind in kinds.items():
        if digest not in there:
            raise refused(what, f"it lacks the file {digest[:12]} ({kind})")
    for digest, file in zip(there, files, strict=True):
        if digest not in kinds:
            raise refused(what, f"the file {digest[:12]} is none of the image's ({_quoted(file.media_type)})")
        if file.media_type != kinds[digest]:
            raise refused(what, f"the file {digest[:12]} has the kind {_quoted(file.media_type)}")
    if len(set(there)) != len(there):
        raise refused(what, "it has a file twice")


def _check_digests(manifest: Mapping[str, Any]) -> None:
    files = manifest["files"]
    if not isinstance(files, dict) or files.keys() != set(ROLES):
        raise refused(_WHAT, f"files: expected {', '.join(ROLES)}")
    layers = parse_list(manifest.get("layers", []), _WHAT, "layers", MAX_LAYERS - 1)
    for digest in [*files.values(), *layers]:
        if not isinstance(digest, str) or not _FILE_DIGEST.fullmatch(digest):
            raise refused(_WHAT, f"files: expected a SHA-256 digest, got {_quoted(digest)}")


def _check_environment(value: object) -> None:
    if not isinstance(value, dict) or len(value) > _MAX_VARIABLES:
        raise refused(_WHAT, f"environment: expected at most {_MAX_VARIABLES} variables")
    for name, text in value.items():
        if not parse_text(name, _WHAT, "environment") or "=" in name or not isinstance(text, str):
            raise refused(_WHAT, f"environment: invalid variable {_quoted(name)}")
        parse_text(text, _WHAT, "environment")


def _check_resources(value: object) -> None:
    try:
        parsed = parse_resources(Path("manifest"), "resources", value)
    except KitError as error:
        raise refused(_WHAT, sanitize_line(error.brief, 300)) from None
    if parsed != value or not parsed.keys() >= _LEAST_RESOURCES:
        raise refused(_WHAT, "resources: expected numbers, and at least cpus, memory and disk")
    if max(parsed.values()) > _MOST:
        raise refused(_WHAT, "resources: a number is impossible")


def _check_start(value: object) -> None:
    if not isinstance(value, dict) or not value.keys() <= {"entrypoint", "arguments", "workdir", "user"}:
        raise refused(_WHAT, "start: expected entrypoint, arguments, workdir and user")
    for key in ("entrypoint", "arguments"):
        parse_words(value.get(key), _WHAT, key)
    if not (parse_text(value.get("workdir"), _WHAT, "workdir") or "/").startswith("/"):
        raise refused(_WHAT, "workdir: expected an absolute path")
    parse_text(value.get("user"), _WHAT, "user")


def _check_services(value: object) -> None:
    for service in parse_list(value, _WHAT, "services", _MAX_SERVICES):
        if not isinstance(service, dict) or service.keys() != {"name", "start", "ready"}:
            raise refused(_WHAT, "services: expected name, start and ready")
        name, *_commands = (parse_text(service[key], _WHAT, "services") for key in ("name", "start", "ready"))
        if not _SERVICE.fullmatch(name):
            raise refused(_WHAT, f"services: invalid name {_quoted(name)}")


def _quoted(value: object) -> str:
    return sanitize_line(repr(value), 100)
