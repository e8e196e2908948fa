"""Run skopeo(1), which reaches registries, archives and Docker's daemon as this user."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pytest_microvm.errors import HostError, PullError
from pytest_microvm.images.oci.documents import MAX_DOCUMENT, refused
from pytest_microvm.images.process import build_environment, started
from pytest_microvm.programs.needed import require
from pytest_microvm.untrusted.text import sanitize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pytest_microvm.images.oci.references import Platform, Reference

# Where skopeo finds logins, registries' settings, signature policies, and Docker's daemon.
_PASSED_ON = (
    "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "REGISTRY_AUTH_FILE", "CONTAINERS_REGISTRIES_CONF",
    "CONTAINERS_REGISTRIES_CONF_DIR", "REGISTRIES_CONFIG_PATH", "DOCKER_CONFIG", "DOCKER_HOST",
    "DOCKER_CERT_PATH", "DOCKER_TLS_VERIFY",
)  # fmt: skip
_POLICIES = ("/etc/containers/policy.json", "/usr/share/containers/policy.json")
_POLL = 0.5  # seconds between two looks at how much has arrived
_RETRIES = "2"
_MESSAGES = 64 * 1024  # bytes of skopeo's messages that are kept
_LINES = 10

_LOGIN = "log in with skopeo, podman or docker (skopeo login REGISTRY); see also whether the name is right"
_REACH = "see whether the registry's name and port are right, and whether this computer reaches it; run again"
_TRUST = "put the authority's certificate where skopeo looks: ~/.config/containers/certs.d/REGISTRY/ca.crt"
_PLAIN = (
    "a registry without TLS has to be named in ~/.config/containers/registries.conf: "
    '[[registry]] with location = "REGISTRY" and insecure = true'
)
_ARTIFACTS = "push to a registry that stores OCI artifacts and lets its users push"
_NAME = "see whether the name and the tag are right"
_REASONS: tuple[tuple[str, str, str, str], ...] = (
    # what skopeo says (lower case), the kind of failure, what happened, what to do
    ("no space left on device", "full", "", ""),
    ("server gave http response to https client", "unreachable", "its registry does not speak TLS", _PLAIN),
    ("x509:", "unreachable", "the certificate of its registry is not trusted", _TRUST),
    ("authentication required", "denied", "its registry wants a login", _LOGIN),
    ("unauthorized", "denied", "its registry keeps it from this user", _LOGIN),
    ("invalid username/password", "denied", "its registry refuses this user's login", _LOGIN),
    ("requested access to the resource is denied", "denied", "its registry keeps it from this user", _LOGIN),
    ("403 (forbidden)", "denied", "its registry keeps it from this user", _LOGIN),
    ("digest did not match", "refused", "what arrived has another digest than it should", "run again"),
    ("unexpected eof", "refused", "a part of it ended too early", "run again; whole parts are kept"),
    ("manifest invalid", "refused", "its registry does not take such artifacts", _ARTIFACTS),
    ("operation is unsupported", "refused", "its registry takes no images", _ARTIFACTS),
    ("manifest unknown", "absent", "its registry has no such image", _NAME),
    ("name unknown", "absent", "its registry has no such image", _NAME),
    ("blob unknown", "refused", "its registry has lost a part of it", "push it again"),
    ("toomanyrequests", "unreachable", "its registry limits how often it is asked", "wait, or log in"),
    ("no such host", "unreachable", "there is no such registry", _REACH),
    ("connection refused", "unreachable", "its registry does not answer", _REACH),
    ("network is unreachable", "unreachable", "its registry cannot be reached", _REACH),
    ("i/o timeout", "unreachable", "its registry does not answer", _REACH),
    ("connection reset", "unreachable", "its registry ended the connection", _REACH),
    ("cannot connect to the docker daemon", "unreachable", "there is no Docker daemon", "start one"),
    ("no such image", "absent", "Docker's daemon has no such image", _NAME),
    ("no descriptor found for reference", "absent", "it has no image of that name", _NAME),
    ("more than one image in oci", "absent", "it has several images", "name one: add :TAG"),
    ("no image found in", "absent", "it has no image for this platform", _NAME),
    ("no such file or directory", "absent", "it is not there", "see whether the path is right"),
)  # fmt: skip


class Skopeo:
    """skopeo, as this user runs it.

    Args:
        wanted: The reference that the user wrote, for errors.
        folder: For temporary files.
        platform: The platform whose image is chosen where there are several.
        timeout: Seconds without a sign of progress after which a registry counts as hanging.
        verb: What is done with it, for errors: ``pulled`` or ``pushed``.

    Raises:
        HostError: skopeo is not installed.
    """

    def __init__(
        self, wanted: Reference, folder: Path, platform: Platform, timeout: float, verb: str = "pulled"
    ) -> None:
        require("pulls")
        self._failed = f"{wanted} cannot be {verb}"
        self._folder = folder
        self._platform = platform
        self._timeout = timeout
        self._environment = {
            **build_environment(**{name: os.environ[name] for name in _PASSED_ON if name in os.environ}),
            "TMPDIR": str(folder),
        }

    def inspect(self, reference: Reference, *, configuration: bool = False) -> bytes:
        """Return the bytes of a reference's manifest or index, or of an image's configuration.

        Raises:
            PullError: There is none, or it cannot be had.
        """
        words = ["inspect", "--retry-times", _RETRIES, *(["--config"] if configuration else []), "--raw"]
        with tempfile.TemporaryFile(dir=self._folder) as output:
            self._run([*words, reference.source], output, lambda _process: 0)
            output.seek(0)
            data = output.read(MAX_DOCUMENT + 1)
        if len(data) > MAX_DOCUMENT:
            raise refused("a document", f"it has more than {MAX_DOCUMENT // 1024**2} MiB")
        return data

    def copy(self, reference: Reference, layout: Path, blobs: Path, arrived: Callable[[], int]) -> None:
        """Copy an image into an OCI layout; blobs that are there are not fetched again.

        Args:
            reference: The image.
            layout: The layout's folder, which is created; its only image gets the tag ``image``.
            blobs: The folder of its blobs.
            arrived: Returns the bytes that have arrived; called twice a second.

        Raises:
            PullError: It cannot be had.
            HostError: The disk is full.
        """
        words = ["copy", "--quiet", "--retry-times", _RETRIES, "--dest-oci-accept-uncompressed-layers"]
        words += ["--dest-shared-blob-dir", str(blobs)]
        if reference.transport == "docker-daemon" and "DOCKER_HOST" in self._environment:
            words += ["--src-daemon-host", self._environment["DOCKER_HOST"]]  # it does not look there itself
        self._run([*words, reference.source, f"oci:{layout}:image"], None, lambda _process: arrived())

    def push(self, source: str, target: Reference, sent: Callable[[int], None]) -> None:
        """Copy an image to a registry, byte by byte: with another digest it would have another name.

        Args:
            source: skopeo's name of it.
            target: Its name on the registry, and its tag.
            sent: Called with the bytes that were sent, twice a second.

        Raises:
            PullError: The registry does not take it, or cannot be reached.
        """

        def progress(process: int) -> int:
            done = _transferred(process)
            sent(done)
            return done

        words = ["copy", "--quiet", "--preserve-digests", "--retry-times", _RETRIES]
        self._run([*words, source, target.source], None, progress)

    def _run(self, words: Sequence[str], output: IO[bytes] | None, moved: Callable[[int], int]) -> None:
        """Run skopeo to its end, or until nothing has moved for the time limit.

        ``moved`` gets its process id, and returns a number that grows with each sign of progress.
        """
        command = ["skopeo", *self._policy(), "--tmpdir", str(self._folder), "--override-os", "linux"]
        command += ["--override-arch", self._platform.architecture, *words]
        with tempfile.TemporaryFile(dir=self._folder) as messages:
            running = started(
                command, environment=self._environment, stdout=output or subprocess.DEVNULL, stderr=messages
            )
            with running as process:
                last, since = moved(process.pid), time.monotonic()
                while (status := _ended(process)) is None:
                    now = moved(process.pid)
                    if now != last:
                        last, since = now, time.monotonic()
                    elif time.monotonic() - since > self._timeout:
                        raise _hangs(self._failed, self._timeout)
            if status != 0:
                messages.seek(0)
                raise _explained(self._failed, status, messages.read(_MESSAGES).decode(errors="replace"))

    def _policy(self) -> list[str]:
        """Return the option that does without a signature policy, which skopeo demands, if there is none."""
        home = self._environment.get("HOME", "/")
        known = [Path(home, ".config/containers/policy.json"), *map(Path, _POLICIES)]
        return [] if any(path.exists() for path in known) else ["--insecure-policy"]


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """Wait a moment for a process; return its status, or ``None`` while it runs."""
    try:
        return process.wait(_POLL)
    except subprocess.TimeoutExpired:
        return None


def _transferred(process: int) -> int:
    """Return the bytes that a process has written to files and sockets; 0 if this system does not tell."""
    try:
        lines = Path(f"/proc/{process}/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("wchar:")), 0)


def _hangs(failed: str, seconds: float) -> PullError:
    return PullError(
        f"{failed}: nothing has arrived for {seconds:g} s",
        reason="unreachable",
        resolution="run again: what has arrived whole is kept; --timeout SECONDS waits longer",
    )


def _explained(failed: str, status: int, messages: str) -> PullError | HostError:
    """Return the error for a failed skopeo, by its messages."""
    text = messages.lower()
    lines = "\n".join(_short(messages.splitlines()))
    for sign, reason, what, step in _REASONS:
        if sign not in text:
            continue
        if reason == "full":
            return HostError(
                "the disk with the cache is full",
                details=lines,
                resolution="free some disk, or set PYTEST_MICROVM_CACHE to a folder on another disk",
            )
        return PullError(
            f"{failed}: {what}",
            reason=reason,  # type: ignore[arg-type]  # the table has no other ones
            details=lines,
            resolution=step,
        )
    return PullError(
        f"{failed}: skopeo failed (exit code {status})",
        reason="unreachable",
        details=lines,
        resolution="see what skopeo says above",
    )


def _short(lines: Iterable[str]) -> list[str]:
    """Return the last messages without times and levels."""
    found = []
    for line in lines:
        _before, said, message = line.partition(' msg="')
        found.append(message.removesuffix('"').replace('\\"', '"') if said else line)
    return [sanitize(line) for line in found[-_LINES:]]
