"""A container registry on loopback: Debian's docker-registry, with a folder as its storage."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support import guards

LOGIN = "tester:correct-horse"
_HTPASSWD = "tester:$2b$05$abcdefghijklmnopqrstuuZ0Fx87Pb/Aqb0E90lfvCwzXnaFKUHpS\n"  # bcrypt of the password


@dataclass(frozen=True)
class Registry:
    """A running registry.

    Args:
        address: Its host and port.
        storage: The folder that it stores blobs in.
        home: The home folder of a user whose skopeo knows how to reach it.
    """

    address: str
    storage: Path
    home: Path

    def push(self, reference: str, name: str) -> str:
        """Copy an image, or all of an index, to the registry; return its reference there."""
        target = f"docker://{self.address}/{name}"
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", "--all", reference, target]
        environment = {**os.environ, "HOME": str(self.home)}
        subprocess.run(command, check=True, env=environment, timeout=guards.PROCESS)
        return target

    def blob(self, digest: str) -> Path:
        """Return the file of a blob in its storage."""
        name = digest.partition(":")[2]
        return self.storage / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"

    def log_in(self, login: str = LOGIN) -> None:
        """Give the user a login."""
        user, _colon, password = login.partition(":")
        auth = self.home / "auth.json"
        command = ["skopeo", "login", "--authfile", auth, "-u", user, "--password-stdin", self.address]
        environment = {**os.environ, "HOME": str(self.home)}
        subprocess.run(
            command, input=password, text=True, check=True, env=environment, timeout=guards.PROCESS,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip


@contextmanager
def registry(
    folder: Path, *, tls: tuple[Path, Path] | None = None, login: bool = False
) -> Iterator[Registry]:
    """Run a registry.

    Args:
        folder: An empty folder for its files, and for its user's home.
        tls: Its certificate and key; ``None``: it speaks no TLS, and its user's skopeo is told so.
        login: Whether it wants the login :data:`LOGIN`.
    """
    configuration = {
        "version": 0.1,
        "log": {"level": "info"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}, "delete": {"enabled": True}},
        "http": {"addr": "127.0.0.1:0", "secret": "x"},
    }
    if tls is not None:
        configuration["http"]["tls"] = {"certificate": str(tls[0]), "key": str(tls[1])}
    if login:
        (folder / "htpasswd").write_text(_HTPASSWD)
        configuration["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
    (folder / "config.yml").write_text(json.dumps(configuration))  # YAML contains JSON
    command = ["docker-registry", "serve", str(folder / "config.yml")]
    environment = {**os.environ, "OTEL_TRACES_EXPORTER": "none"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
    try:
        assert process.stderr is not None
        address = next(_addresses(process.stderr))
        drained = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        home = folder / "home"
        settings = home / ".config" / "containers"
        settings.mkdir(parents=True)
        if tls is None:
            insecure = f'[[registry]]\nlocation = "{address}"\ninsecure = true\n'
            (settings / "registries.conf").write_text(insecure)
        yield Registry(address, folder / "storage", home)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        drained.wait()


def _addresses(lines: Iterator[bytes]) -> Iterator[str]:
    for line in lines:
        if found := re.search(rb"listening on (127\.0\.0\.1:\d+)", line):
            yield found[1].decode()
