"""Sign container images on a registry as cosign does, with keys that tests make."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from support.oci import CONFIGURATION, MANIFEST, LayoutBuilder
from support.registry import Registry

PAYLOAD = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE = "dev.cosignproject.cosign/signature"
# cosign's, of an empty image
_EMPTY = {"architecture": "", "created": "0001-01-01T00:00:00Z", "os": "", "config": {}}


def payload(digest: str, reference: str, **critical: Any) -> bytes:
    """Return the payload that is signed: cosign's SIGNATURE_SPEC.md, "Simple Signing".

    Args:
        digest: The image's digest.
        reference: Its name, without a tag.
        **critical: Other claims.
    """
    claims = {
        "identity": {"docker-reference": reference},
        "image": {"docker-manifest-digest": digest},
        "type": "cosign container image signature",
        **critical,
    }
    return json.dumps({"critical": claims, "optional": None}, separators=(",", ":")).encode()


@dataclass
class Signer:
    """A key pair.

    Args:
        folder: The folder for its public key and temporary files.
    """

    folder: Path
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    @property
    def public(self) -> Path:
        """The file of its public key."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "key.pub"
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        path.write_bytes(self.key.public_key().public_bytes(serialization.Encoding.PEM, form))
        return path

    def sign(self, data: bytes) -> str:
        """Return the signature of data, as a text."""
        return base64.b64encode(self.key.sign(data, ec.ECDSA(hashes.SHA256()))).decode()


def attach(registry: Registry, folder: Path, name: str, digest: str, signed: list[tuple[bytes, str]]) -> None:
    """Store signatures of an image on a registry; earlier ones are replaced.

    Args:
        registry: The registry.
        folder: An empty folder.
        name: The image's name on it.
        digest: The image's digest.
        signed: Payloads and their signatures.
    """
    layout = LayoutBuilder(folder)
    layers = [layout.blob(data, PAYLOAD, annotations={SIGNATURE: text}) for data, text in signed]
    roots = {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]}
    configuration = layout.document({**_EMPTY, "rootfs": roots}, CONFIGURATION)
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": configuration, "layers": layers}
    reference = layout.publish(layout.document(manifest, MANIFEST), "signatures")
    registry.push(reference, f"{name}:{digest.replace(':', '-')}.sig")
