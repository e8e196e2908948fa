"""Messages between the host that submits a run and the workers that run its tasks.

Orders are values of this package, from the submitting host to a worker. A reply holds output and files of
machines: it is JSON and a tar archive, and is read as untrusted input.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pytest_microvm.ci.definition.task import Task
from pytest_microvm.ci.results.result import TaskResult, Verdict, task_from_json
from pytest_microvm.errors import TransferError
from pytest_microvm.settings.spec import format_size
from pytest_microvm.untrusted.extraction import ExtractionLimits, extract
from pytest_microvm.untrusted.text import sanitize_line

MAX_FILES = 10_000
MAX_BYTES = 256 * 1024**2
"""Bytes of files that one task returns; further files are left out, and the log lists them."""

_HEAD = 8  # bytes of the length of the JSON


@dataclass(frozen=True, repr=False)
class Order:
    """One attempt at a task, for a worker.

    Args:
        run: The run's id, part of the names of the cluster's topics and plug-ins.
        key: The attempt's id.
        version: The submitting host's version of this package.
        task: The task; its image is named by digest.
        image: The image's name, for people.
        manifest: The image's manifest.
        sources: SHA-256 of the archive with the source's files.
        bundle: SHA-256 of the git bundle; ``None`` if the job does not need it.
        repository: An identifier that separates this repository's prepared templates from another's.
        default_branch: The branch whose prepared templates all branches may use.
        require_accel: The only accelerator that will do.
    """

    run: str
    key: str
    version: str
    task: Task
    image: str
    manifest: bytes
    sources: str
    bundle: str | None
    repository: str
    default_branch: str
    require_accel: str | None = None

    def __repr__(self) -> str:  # Dask logs and displays it
        return f"<order {self.key}>"


def not_done(task: Task, verdict: Verdict, reason: str) -> TaskResult:
    """Return the result of a task that ran on no machine."""
    return TaskResult(
        task.id,
        task.source.branch,
        task.source.commit,
        task.job.name,
        verdict,
        sanitize_line(reason),
        allow_failure=task.job.allow_failure,
    )


def pack_reply(result: TaskResult, folder: Path) -> bytes:
    """Return a task's result and its folder's files as one blob: JSON, then a tar archive.

    Args:
        result: The result.
        folder: The task's folder; artifacts beyond the limits are left out, with a line in ``log.txt``.
    """
    chosen, left = _chosen(folder)
    if left:
        gone = {f"{result.id}/{path}" for path in left}
        result = _without(result, gone)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            for path in sorted(left):
                log.write(f"not taken back: {sanitize_line(path)}: more than {format_size(MAX_BYTES)}\n")
    head = json.dumps(asdict(result)).encode()
    blob = io.BytesIO()
    blob.write(len(head).to_bytes(_HEAD, "big") + head)
    with tarfile.open(fileobj=blob, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for path in chosen:
            archive.add(folder / path, path, recursive=False)
    return blob.getvalue()


def unpack_reply(blob: bytes, folder: Path) -> TaskResult:
    """Return the result from a reply, and extract its files into ``folder``, which is created.

    Raises:
        TransferError: The reply is damaged, or exceeds the limits.
    """
    size = int.from_bytes(blob[:_HEAD], "big")
    try:
        result = task_from_json(json.loads(blob[_HEAD : _HEAD + size]))
    except (ValueError, KeyError, TypeError) as error:
        raise TransferError(f"a worker sent a damaged result: {sanitize_line(str(error))}") from error
    folder.mkdir(parents=True, exist_ok=True)
    extract(
        io.BytesIO(blob[_HEAD + size :]), folder, ExtractionLimits(2 * MAX_BYTES, 2 * MAX_FILES, left_out={})
    )
    return result


def _chosen(folder: Path) -> tuple[list[str], set[str]]:
    """Return the files to send, logs and reports first, and the files that exceed the limits."""
    sizes = dict(_files(folder))
    ordered = sorted(sizes, key=lambda path: (path.startswith("artifacts/"), path))
    chosen: list[str] = []
    total = 0
    for path in ordered:
        if total + sizes[path] <= MAX_BYTES and len(chosen) < MAX_FILES:
            chosen.append(path)
            total += sizes[path]
    return chosen, set(sizes).difference(chosen)


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    for here, _folders, names in os.walk(folder):
        for name in names:
            path = Path(here) / name
            if path.is_file() and not path.is_symlink():
                yield str(path.relative_to(folder)), path.stat().st_size


def _without(result: TaskResult, gone: set[str]) -> TaskResult:
    values: Mapping[str, object] = asdict(result)
    return task_from_json({**values, "artifacts": [path for path in result.artifacts if path not in gone]})
