"""A cluster worker's side of a run: fetches a task's inputs, runs the task and returns its result.

It is a plug-in of the worker, one for each run, so that two runs on one cluster share nothing. Tasks run in
the worker's threads; their machines belong to the worker's process and do not outlive it.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distributed import Reschedule, Worker, WorkerPlugin, get_worker

from pytest_microvm.ci.cluster.blobs import Inbox
from pytest_microvm.ci.cluster.messages import Order, not_done, pack_reply
from pytest_microvm.ci.cluster.templates import Borrower, Lender
from pytest_microvm.ci.definition.task import Plan, Source, Task
from pytest_microvm.ci.results.result import RunResult, TaskResult
from pytest_microvm.ci.running.attempt import Attempt
from pytest_microvm.ci.running.commands import Stop, Stopped
from pytest_microvm.ci.running.executor import Work
from pytest_microvm.ci.sources.tar_tree import TarTree
from pytest_microvm.ci.sources.tree import Tree
from pytest_microvm.errors import ImageError, MicroVMError
from pytest_microvm.host.host import Host
from pytest_microvm.untrusted.text import sanitize_line

_GATHER = 0.2  # seconds to batch lines: an event costs the scheduler more than a line
_MOST_LINES = 200
_GONE = ("cancelled", "released", "forgotten")
_log = logging.getLogger("pytest_microvm")


def plugin_name(run: str) -> str:
    """Return the name of a run's plug-in."""
    return f"pytest-microvm-{run}"


def topic(run: str) -> str:
    """Return the name of the topic of a run's events."""
    return f"pytest-microvm-{run}"


def do(order: Order) -> bytes:
    """Run an order and return its reply; the cluster calls this function on a worker."""
    side = get_worker().plugins[plugin_name(order.run)]
    assert isinstance(side, WorkerSide)
    return side.do(order)


def deliver(run: str, request: str, data: bytes | None, dask_worker: Any = None) -> None:
    """Pass a file's piece to the request that waits for it; the submitting host calls this on a worker."""
    side = dask_worker.plugins.get(plugin_name(run))
    if side is not None:
        side.inbox.deliver(request, data)


def end_run(run: str, dask_worker: Any = None) -> None:
    """Stop a worker's tasks of a run; their results so far are still returned."""
    side = dask_worker.plugins.get(plugin_name(run))
    if side is not None:
        side.end()


def describe_template(run: str, key: str, dask_worker: Any = None) -> Any:
    """Return the metadata of a worker's template; other workers call this on it."""
    side = dask_worker.plugins.get(plugin_name(run))
    return None if side is None else side.lender.describe(key)


def template_piece(run: str, key: str, name: str, place: int, dask_worker: Any = None) -> Any:
    """Return a piece of a worker's template; other workers call this on it."""
    return dask_worker.plugins[plugin_name(run)].lender.piece(key, name, place)


class WorkerSide(WorkerPlugin):
    """One run on one worker.

    Args:
        run: The run's id.
        require_accel: The only accelerator that will do.
    """

    def __init__(self, run: str, require_accel: str | None) -> None:
        self.name = plugin_name(run)
        self._run = run
        self._require_accel = require_accel

    def setup(self, worker: Worker) -> None:
        """Set up the run's state; Dask calls this on the worker."""
        self._worker = worker
        self._jobs: dict[str, threading.Event] = {}
        self._ended = self._leaving = False
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="microvm-ci-")
        self.inbox = Inbox(self._ask)
        borrower = Borrower(worker, describe_template, template_piece, self._run)
        self.host = Host(
            require_accel=self._require_accel, retries=0, say=_log.info, elsewhere=borrower.fetch
        )
        self.lender = Lender(self.host.templates)

    def teardown(self, worker: Worker) -> None:
        """Stop all tasks and release resources, since the run is over or the worker is about to shut down."""
        del worker
        self._leaving = not self._ended
        self.end()
        self.lender.close()
        self.host.close()
        self._folder.cleanup()

    def transition(self, key: Any, start: str, finish: str, **_more: Any) -> None:
        """Cancel a task that Dask no longer wants: it was cancelled, or its submitter is gone."""
        del start
        if finish in _GONE:
            with self._lock:
                event = self._jobs.get(key)
            if event is not None:
                event.set()

    def end(self) -> None:
        """Stop running tasks soon."""
        with self._lock:
            self._ended = True
            events = list(self._jobs.values())
        for event in events:
            event.set()

    def do(self, order: Order) -> bytes:
        """Run an order and return its reply."""
        cancelled = threading.Event()
        with self._lock:
            self._jobs[order.key] = cancelled
            if self._ended:
                cancelled.set()
        self._tell({"kind": "began", "key": order.key, "task": order.task.id, "host": self._worker.name})
        reporter = _Reporter(self._tell)
        try:
            with tempfile.TemporaryDirectory(prefix="microvm-ci-") as folder:
                output = Path(folder)
                (output / order.task.id).mkdir()
                result = self._attempt(order, output, reporter, cancelled)
                if self._leaving:
                    raise Reschedule  # the run continues on other workers
                result = replace(result, worker=sanitize_line(str(self._worker.name)))
                return pack_reply(result, output / order.task.id)
        finally:
            reporter.close()
            with self._lock:
                del self._jobs[order.key]

    def _attempt(
        self, order: Order, output: Path, reporter: _Reporter, cancelled: threading.Event
    ) -> TaskResult:
        here = version("pytest-microvm")
        if order.version != here:
            what = f"this host has pytest-microvm {here}, the one that submitted the run {order.version}"
            return not_done(order.task, "infra", what)
        stop = Stop(cancelled)
        try:
            self._get_image(order, reporter, stop)
            sources = _OrderSources(self, order, stop)
            work = Work(sources, output, reporter, order.repository, order.default_branch)
            return Attempt(self.host, order.task, work, cancelled).run()
        except Stopped:
            return not_done(order.task, "cancelled", "the run was ended early")
        except MicroVMError as error:
            for line in str(error).splitlines():
                reporter.line(order.task, sanitize_line(line))
            return not_done(order.task, "infra", error.brief)

    def _get_image(self, order: Order, reporter: _Reporter, stop: Stop) -> None:
        """Ensure that this worker has the image; fetch missing files from the submitting host."""
        images = self.host.images
        try:
            images.get(order.task.job.spec.image)
        except ImageError:
            reporter.phase(order.task, "prepare")

            def say(line: str) -> None:
                reporter.line(order.task, line)

            images.adopt(
                order.image, order.manifest, lambda blob, path: self.inbox.fetch(blob, path, stop), say
            )

    def file(self, blob: str, stop: Stop) -> Path:
        """Return the path of a run's file with a given digest; fetch the file on first use.

        Raises:
            HostError: The file does not arrive.
            Stopped: A stop was requested.
        """
        path = Path(self._folder.name) / blob
        if not path.exists():
            draft = Path(tempfile.mkdtemp(dir=self._folder.name)) / blob  # two threads may fetch it at once
            self.inbox.fetch(blob, draft, stop)
            draft.replace(path)
        return path

    def _ask(self, question: Mapping[str, Any]) -> None:
        self._tell({"kind": "need", "worker": self._worker.address, **question})

    def _tell(self, message: Mapping[str, Any]) -> None:
        self._worker.log_event(topic(self._run), dict(message))


class _OrderSources:
    """The files of one order's source; see :class:`pytest_microvm.ci.running.executor.Sources`."""

    def __init__(self, side: WorkerSide, order: Order, stop: Stop) -> None:
        self._side = side
        self._order = order
        self._stop = stop

    def tree(self, source: Source) -> Tree:
        assert source == self._order.task.source
        return TarTree(self._side.file(self._order.sources, self._stop))

    def bundle(self, source: Source) -> Path:
        assert source == self._order.task.source
        assert self._order.bundle is not None
        return self._side.file(self._order.bundle, self._stop)


class _Reporter:
    """A watcher that forwards one task's events to the submitting host, log lines in batches."""

    def __init__(self, tell: Callable[[Mapping[str, Any]], None]) -> None:
        self._tell = tell
        self._lines: list[str] = []
        self._task = ""
        self._timer: threading.Timer | None = None
        self._lock = threading.RLock()

    def phase(self, task: Task, phase: str) -> None:
        with self._lock:
            self._flush()
            self._tell({"kind": "phase", "task": task.id, "phase": phase})

    def line(self, task: Task, text: str) -> None:
        with self._lock:
            self._task = task.id
            self._lines.append(text)
            if len(self._lines) >= _MOST_LINES:
                self._flush()
            elif self._timer is None:
                self._timer = threading.Timer(_GATHER, self._flush)
                self._timer.daemon = True
                self._timer.start()

    def began(self, plan: Plan) -> None:
        """Do nothing: the submitting host knows when its run starts and ends."""

    def done(self, task: Task, result: TaskResult) -> None:
        """Do nothing."""

    def ended(self, run: RunResult) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Send pending log lines."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            lines, self._lines = self._lines, []
            if lines:
                self._tell({"kind": "lines", "task": self._task, "lines": lines})
