"""Verify signatures of container images, in the form in which cosign stores them on registries.

Sources: cosign's SIGNATURE_SPEC.md (storage, payload), containers-signature(5) (the payload's claims).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_microvm.errors import PullError, UsageError
from pytest_microvm.images.oci.documents import parse_document, refused
from pytest_microvm.images.oci.references import Reference, repository_of
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from pytest_microvm.images.oci.skopeo import Skopeo

_PAYLOAD = "application/vnd.dev.cosign.simplesigning.v1+json"
_SIGNATURE = "dev.cosignproject.cosign/signature"
_TYPE = "cosign container image signature"
_MOST_SIGNATURES = 100  # of one image
_MAX_PAYLOAD = 256 * 1024  # bytes; cosign's have 250, and the configuration of 100 signatures 20,000
_MAX_KEY = 64 * 1024  # bytes of a key's file
_SHOWN = 5  # signatures of which an error says what is wrong


@dataclass(frozen=True)
class SigningKey:
    """The public part of a key that signs images: ECDSA on the curve P-256, as of `cosign generate-key-pair`.

    Args:
        path: Its file.
        key: The key.
        fingerprint: The SHA-256 of its SubjectPublicKeyInfo.
    """

    path: Path
    key: EllipticCurvePublicKey
    fingerprint: str

    def signed(self, payload: bytes, signature: bytes) -> bool:
        """Return True if a signature of a payload was made with this key."""
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA  # noqa: PLC0415
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415

        try:
            self.key.verify(signature, payload, ECDSA(SHA256()))
        except InvalidSignature:
            return False
        return True


def read_key(path: Path) -> SigningKey:
    """Read a public key in the PEM format.

    Raises:
        UsageError: It cannot be read, is another kind of key, or the package cryptography is missing.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    except ImportError:
        raise UsageError(
            "verifying signatures of images needs the package cryptography",
            resolution="pip install 'pytest-microvm[signatures]'",
        ) from None
    try:
        with path.open("rb") as file:
            key = serialization.load_pem_public_key(file.read(_MAX_KEY))
    except OSError as error:
        raise UsageError(f"the key {path} cannot be read: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _no_key(path, "it is not a public key in the PEM format") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _no_key(path, "it is another kind of key")
    encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return SigningKey(path, key, hashlib.sha256(encoded).hexdigest())


def verify(skopeo: Skopeo, reference: Reference, digest: str, keys: Sequence[SigningKey]) -> SigningKey:
    """Verify that one of a user's keys has signed an image; nothing of the image itself is fetched.

    Args:
        skopeo: Reaches the registry.
        reference: The image's reference.
        digest: The digest of the document that the reference leads to: an index or a manifest.
        keys: The keys, of which one is enough.

    Returns:
        The key.

    Raises:
        PullError: No signature of this image, for this name, by one of these keys is there.
    """
    tag = digest.replace(":", "-") + ".sig"
    try:
        data = skopeo.inspect(Reference("docker", reference.name, tag=tag))
    except PullError as error:
        if error.reason != "absent":
            raise
        raise _unverified(reference, digest, keys, ["it has none"]) from None
    parts = _parts(parse_document(data, "the signature"))
    if parts is None:
        raise _unverified(reference, digest, keys, ["there are too many, or too large ones"])
    entries = _entries(parts)
    reasons = []
    with tempfile.TemporaryDirectory(prefix="pytest-microvm-") as folder:
        blobs = Path(folder, "blobs")
        blobs.mkdir()
        if entries:
            document = f"sha256:{hashlib.sha256(data).hexdigest()}"
            skopeo.copy(reference.at(document), Path(folder, "layout"), blobs, lambda: _arrived(Path(folder)))
        for payload_digest, signature in entries:
            payload = _payload(blobs, payload_digest)
            key = next((key for key in keys if key.signed(payload, signature)), None)
            wrong = "it was made with another key, or damaged" if key is None else ""
            wrong = wrong or _wrong(payload, reference, digest)
            if key is not None and not wrong:
                return key
            reasons.append(wrong)
    raise _unverified(reference, digest, keys, reasons or ["it has none"])


def _parts(document: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the entries of the payloads in a manifest; ``None`` if fetching them would take long."""
    layers, configuration = document.get("layers"), document.get("config")
    if not isinstance(layers, list) or len(layers) > _MOST_SIGNATURES:
        return None
    parts = [*layers, configuration]
    sizes = [part.get("size") if isinstance(part, dict) else None for part in parts]
    small = all(isinstance(size, int) and 0 <= size <= _MAX_PAYLOAD for size in sizes)
    return layers if small else None


def _arrived(folder: Path) -> int:
    """Return the bytes in a folder.

    Raises:
        PullError: There are more than the manifest announced.
    """
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            total += 0 if path.is_dir() else path.lstat().st_size
    if total > 2 * (_MOST_SIGNATURES + 1) * _MAX_PAYLOAD:
        raise refused("a signature", "its registry sends more than it announces")
    return total


def _entries(layers: list[dict[str, Any]]) -> list[tuple[str, bytes]]:
    """Return the signatures in a manifest: each payload's digest, and its signature."""
    found = []
    for entry in layers:
        if entry.get("mediaType") != _PAYLOAD:
            continue
        notes = entry.get("annotations")
        text = notes.get(_SIGNATURE) if isinstance(notes, dict) else None
        try:
            signature = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        except binascii.Error:
            signature = b""
        found.append((str(entry.get("digest")), signature))
    return found


def _payload(blobs: Path, digest: str) -> bytes:
    """Return the payload with a digest, or nothing, which no key has signed."""
    for path in blobs.glob("sha256/*"):
        if digest == f"sha256:{path.name}":
            with path.open("rb") as file:
                return file.read(_MAX_PAYLOAD)
    return b""


def _wrong(payload: bytes, reference: Reference, digest: str) -> str:
    """Return why a signed payload is not about an image; empty: it is."""
    try:
        content = json.loads(payload, object_pairs_hook=_once)
        critical = content["critical"]
        signed, identity = (
            critical["image"]["docker-manifest-digest"],
            critical["identity"]["docker-reference"],
        )
        kind, known = critical["type"], critical.keys() == {"image", "identity", "type"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "its payload is not one of cosign"
    if not known or kind != _TYPE:
        return "its payload is not one of cosign"
    if signed != digest:
        return f"it is of another image, {sanitize_line(str(signed), 100)}"
    if not isinstance(identity, str) or not _is_for(identity, reference):
        return f"it is for another name, {sanitize_line(str(identity), 200)}"
    return ""


def _is_for(identity: str, reference: Reference) -> bool:
    """Return True if a signature's identity is a reference's repository; and its tag, if both have one."""
    name, _at, _digest = identity.partition("@")
    path, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:  # the colon of a port
        path, tag = name, ""
    if tag and reference.tag and not reference.digest and tag != reference.tag:
        return False
    return repository_of(path) == repository_of(reference.name)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key comes twice in an object")
    return dict(pairs)


def _no_key(path: Path, why: str) -> UsageError:
    return UsageError(
        f"the key {path} cannot be used: {why}",
        resolution="name the public part of an ECDSA key on the curve P-256, such as cosign.pub",
    )


def _unverified(
    reference: Reference, digest: str, keys: Sequence[SigningKey], reasons: Sequence[str]
) -> PullError:
    lines = [f"signature {number}: {why}" for number, why in enumerate(reasons[:_SHOWN], 1)]
    accepted = ", ".join(str(key.path) for key in keys) or "none: no image of it is accepted"
    return PullError(
        f"{reference} is refused: it has no signature that your configuration accepts",
        reason="unverified",
        details="\n".join([f"digest: {digest}", *lines, f"accepted keys: {accepted}"]),
        resolution="sign it (cosign sign --key KEY NAME@DIGEST), or change [signatures] of your config.toml",
    )
