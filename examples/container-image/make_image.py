"""Write a small container image as a folder in the OCI layout, as `docker build -o type=oci` does.

It has a static busybox (Debian's package busybox-static), a file, a user and an entry point.
"""

import gzip
import hashlib
import io
import json
import platform
import sys
import tarfile
from pathlib import Path

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
OCI = "application/vnd.oci.image"
FILES = {
    "bin/busybox": (Path("/bin/busybox").read_bytes(), 0o755),
    "etc/passwd": (b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/srv:/bin/sh\n", 0o644),
    "srv/greet": (b'#!/bin/sh\necho "$GREETING, ${1:-world}, from $(id -un) in $(pwd)"\n', 0o755),
}
CONFIG = {
    "Entrypoint": ["/srv/greet"],
    "User": "app",
    "WorkingDir": "/srv",
}


def main(folder, greeting):
    """Write the image."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, (data, mode) in FILES.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))
        for name in ("sh", "cat", "id"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    layer = buffer.getvalue()
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def blob(data, kind, **more):
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"{OCI}.{kind}", "digest": f"sha256:{digest}", "size": len(data), **more}

    roots = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]}
    config = {**CONFIG, "Env": [f"GREETING={greeting}"]}
    about = {"architecture": ARCHITECTURE, "os": "linux", "config": config, "rootfs": roots}
    manifest = {
        "schemaVersion": 2,
        "config": blob(json.dumps(about).encode(), "config.v1+json"),
        "layers": [blob(gzip.compress(layer, mtime=0), "layer.v1.tar+gzip")],
    }
    name = {"annotations": {"org.opencontainers.image.ref.name": "latest"}}
    entry = blob(json.dumps(manifest).encode(), "manifest.v1+json", **name)
    index = {"schemaVersion": 2, "manifests": [entry]}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


if __name__ == "__main__":
    main(Path(sys.argv[1]), greeting=sys.argv[2] if len(sys.argv) > 2 else "hello")
