"""Container images made by tests: layers from a list of members, written as a folder in the OCI layout."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_microvm.programs.needed import architecture

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIGURATION = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}[architecture()]
OTHER_ARCHITECTURE = "arm64" if ARCHITECTURE == "amd64" else "amd64"
BUSYBOX = Path("/bin/busybox")  # Debian's busybox-static


def member(name: str, content: bytes | str | None = None, **attributes: Any) -> tuple[tarfile.TarInfo, bytes]:
    """Return a member of a layer's archive: a file if it has content, else what ``type`` says."""
    info = tarfile.TarInfo(name)
    data = content.encode() if isinstance(content, str) else content or b""
    info.size, info.mode = len(data), 0o644
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, data


def folder(name: str, **attributes: Any) -> tuple[tarfile.TarInfo, bytes]:
    """Return a folder."""
    return member(name, type=tarfile.DIRTYPE, **{"mode": 0o755, **attributes})


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    """Return a symbolic link."""
    return member(name, type=tarfile.SYMTYPE, linkname=target, mode=0o777)


def hard_link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    """Return a hard link."""
    return member(name, type=tarfile.LNKTYPE, linkname=target)


def program(name: str, source: Path) -> tuple[tarfile.TarInfo, bytes]:
    """Return a copy of a program of this computer."""
    return member(name, source.read_bytes(), mode=0o755)


def archive(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """Return a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def digest(data: bytes) -> str:
    """Return the digest of data as OCI writes it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def compressed(data: bytes, how: str) -> bytes:
    """Return data compressed with ``gzip`` or ``zstd``, or as it is (``tar``)."""
    if how == "zstd":
        return subprocess.run(["zstd", "-q", "-c"], input=data, capture_output=True, check=True).stdout
    return gzip.compress(data, 1, mtime=0) if how == "gzip" else data


@dataclass
class LayoutBuilder:
    """A folder in the OCI layout.

    Args:
        path: The folder, created at first use.
    """

    path: Path
    entries: list[dict[str, Any]] = field(default_factory=list)

    def blob(self, data: bytes, kind: str, **more: Any) -> dict[str, Any]:
        """Store a blob, and return its descriptor."""
        blobs = self.path / "blobs" / "sha256"
        blobs.mkdir(parents=True, exist_ok=True)
        (blobs / digest(data).partition(":")[2]).write_bytes(data)
        return {"mediaType": kind, "digest": digest(data), "size": len(data), **more}

    def document(self, value: Any, kind: str, **more: Any) -> dict[str, Any]:
        """Store a JSON document, and return its descriptor."""
        return self.blob(json.dumps(value).encode(), kind, **more)

    def image(
        self,
        *layers: bytes,
        config: Mapping[str, Any] | None = None,
        compression: str = "gzip",
        architecture: str = ARCHITECTURE,
        **changes: Any,
    ) -> dict[str, Any]:
        """Store an image of uncompressed layers, and return its manifest's descriptor.

        Args:
            *layers: Archives of its layers, the lowest first.
            config: What it says about its command: ``Env``, ``Cmd`` and so on.
            compression: How its layers are compressed.
            architecture: OCI's name of its architecture.
            **changes: Keys of the manifest to replace.
        """
        document = {
            "architecture": architecture,
            "os": "linux",
            "config": dict(config or {}),
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.document(document, CONFIGURATION),
            "layers": [self.blob(compressed(layer, compression), LAYER) for layer in layers],
            **changes,
        }
        platform = {"os": "linux", "architecture": architecture}
        return self.document(manifest, MANIFEST, platform=platform)

    def publish(self, descriptor: Mapping[str, Any], tag: str = "") -> str:
        """Add an image or an index to the folder's index, and return its reference."""
        notes = {"annotations": {"org.opencontainers.image.ref.name": tag}} if tag else {}
        self.entries.append({**descriptor, **notes})
        self.write_index()
        return f"oci:{self.path}" + (f":{tag}" if tag else "")

    def write_index(self) -> None:
        """Write the folder's own files."""
        (self.path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self.entries}))


def busybox_layer(*applets: str, more: Iterable[tuple[tarfile.TarInfo, bytes]] = ()) -> bytes:
    """Return a layer with a static busybox, links for its applets, and more members."""
    links = [symlink(f"bin/{name}", "busybox") for name in applets]
    return archive([folder("bin"), program("bin/busybox", BUSYBOX), *links, *more])
