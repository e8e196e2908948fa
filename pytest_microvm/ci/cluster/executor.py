"""Run tasks on several hosts: a Dask scheduler finds each task a worker that has room for its machine.

A task's attempt is one key of the cluster. It can be started again, for its return value is its only effect:
Dask does so when a worker is lost. That happens once; a second loss is the task's result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import secrets
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distributed import KilledWorker

from pytest_microvm.ci.cluster.blobs import Offers
from pytest_microvm.ci.cluster.connection import ALLOWED_FAILURES, Certificates, connected, own_cluster
from pytest_microvm.ci.cluster.messages import Order, not_done, unpack_reply
from pytest_microvm.ci.cluster.worker import WorkerSide, deliver, do, end_run, plugin_name, topic
from pytest_microvm.ci.definition.task import Source, Task
from pytest_microvm.ci.results.result import TaskResult
from pytest_microvm.ci.running.executor import Work
from pytest_microvm.ci.sources.tar_tree import write_tree
from pytest_microvm.errors import HostError, MicroVMError, UsageError
from pytest_microvm.host.host import Host
from pytest_microvm.images.image import Image
from pytest_microvm.untrusted.text import sanitize_line

MOST = 64
"""How many tasks are submitted to a cluster at once; its scheduler decides where and when each runs."""

_END = {"kind": "end"}
_GONE = (OSError, RuntimeError)
"""The errors that Dask raises once the scheduler is gone."""


class DaskExecutor:
    """Runs tasks on a cluster (implements :class:`pytest_microvm.ci.running.executor.Executor`).

    Args:
        host: This computer; the cluster's machines boot from its images.
        work: The data that all tasks share.
        slots: How many tasks run at the same time.
        scheduler: The scheduler's address; ``None`` starts a cluster on this computer, for this run.
        certificates: This host's certificates, for a scheduler on another computer.
        project: The folder with the kits that jobs name.
        require_accel: The only accelerator that will do.

    Raises:
        UsageError: The scheduler's address is refused.
        HostError: The scheduler cannot be reached, or has no workers that can run this.
    """

    def __init__(
        self,
        host: Host,
        work: Work,
        slots: int,
        *,
        scheduler: str | None = None,
        certificates: Certificates | None = None,
        project: Path | None = None,
        require_accel: str | None = None,
    ) -> None:
        self.slots = min(slots, MOST)
        self._host = host
        self._work = work
        self._project = project
        self._require_accel = require_accel
        self._run = secrets.token_hex(6)
        self._attempts: dict[str, int] = {}
        self._tasks: dict[str, Task] = {}
        self._began: dict[str, list[str]] = {}  # the hosts that started an attempt, by its key
        self._remote: dict[str, Any] = {}  # Dask's futures, by key
        self._sources: dict[Source, str] = {}
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._told: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="microvm-ci-")))
            cluster = connected(scheduler, certificates) if scheduler else own_cluster(self.slots)
            self._client = stack.enter_context(cluster)
            self._offers = Offers(self._client, deliver, self._run)
            stack.callback(self._offers.close)
            self._equip()
            stack.callback(self._leave)
            listener = threading.Thread(target=self._listen, daemon=True, name="microvm-cluster")
            listener.start()
            stack.callback(listener.join)
            stack.callback(self._told.put, _END)
            self._client.subscribe_topic(topic(self._run), lambda event: self._told.put(event[1]))
            stack.callback(self._client.unsubscribe_topic, topic(self._run))
            self._threads = ThreadPoolExecutor(max_workers=self.slots, thread_name_prefix="microvm-ci")
            stack.callback(self._threads.shutdown, wait=True, cancel_futures=True)
            self._stack = stack.pop_all()

    def submit(self, task: Task) -> Future[TaskResult]:
        """Start a task."""
        return self._threads.submit(self._do, task)

    def cancel(self) -> None:
        """Stop running tasks soon, and start no further ones."""
        self._cancelled.set()
        with self._lock:
            waiting = [remote for key, remote in self._remote.items() if key not in self._began]
        for remote in waiting:  # first: a task that ends makes room
            remote.cancel()
        if self._connected():
            with contextlib.suppress(*_GONE):
                self._client.run(end_run, self._run, on_error="ignore")

    def close(self) -> None:
        """Cancel running tasks without waiting for them, and disconnect from the cluster."""
        self.cancel()
        with self._lock:
            running = list(self._remote.values())
        for remote in running:
            remote.cancel(force=True)
        self._stack.close()

    def _equip(self) -> None:
        """Install this run's plug-in on every worker, including workers that join later.

        Raises:
            HostError: A worker cannot load it.
        """
        try:
            self._client.register_plugin(WorkerSide(self._run, self._require_accel))
        except (ImportError, AttributeError) as error:
            raise HostError(
                f"a worker of the cluster cannot do this: {error}",
                resolution=f"install pytest-microvm {version('pytest-microvm')} on all hosts of the cluster",
            ) from error

    def _leave(self) -> None:
        if self._connected():
            with contextlib.suppress(*_GONE):
                self._client.unregister_worker_plugin(plugin_name(self._run))

    def _connected(self) -> bool:
        """Return True if the scheduler is reachable; if not, Dask would retry each call for a minute.

        Workers that lose their scheduler stop their tasks themselves.
        """
        return bool(self._client.status == "running")

    # One task

    def _do(self, task: Task) -> TaskResult:
        """Run an attempt at a task on a worker and return its result."""
        folder = self._work.output / task.id
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._attempts[task.id] = self._attempts.get(task.id, 0) + 1
            self._tasks[task.id] = task
        key = self._key(task)
        try:
            order, image = self._order(task, key)
            result = unpack_reply(self._answer(order, image), folder)
            result = replace(result, lost_workers=max(0, len(self._began.get(key, ())) - 1))
        except UsageError as error:
            result = not_done(task, "failed", error.brief)
        except (MicroVMError, OSError) as error:
            result = not_done(task, "infra", str(error).splitlines()[0])
        except CancelledError:
            result = self._lost(task, key) if self._lost_too_often(key) else self._ended_early(task)
        except KilledWorker:
            result = self._lost(task, key)
        if not (folder / "log.txt").exists():
            (folder / "log.txt").write_text(f"{result.verdict}: {result.reason}\n", encoding="utf-8")
        return result

    def _answer(self, order: Order, image: Image) -> bytes:
        """Submit an order and wait for its reply.

        Raises:
            CancelledError: The order was cancelled, by this run or with the cluster.
            KilledWorker: Too many workers were lost during the order.
            HostError: A worker could not run the order at all.
        """
        resources = _resources(order.task, image, self._require_accel)
        if self._cancelled.is_set():
            raise CancelledError
        if not self._connected():
            raise HostError("the connection to the scheduler is lost", resolution="see its log")
        self._check_room(order.task, resources)
        remote = self._client.submit(do, order, key=order.key, resources=resources, pure=False)
        with self._lock:
            self._remote[order.key] = remote
        try:
            if self._cancelled.is_set():  # cancelled since the check above
                remote.cancel()
            answer: bytes = remote.result()
        except (CancelledError, KilledWorker):
            raise
        except Exception as error:  # a worker of another version may raise anything
            raise HostError(
                f"a worker failed: {type(error).__name__}: {error}", resolution="see the worker's log"
            ) from error
        finally:
            with self._lock:
                del self._remote[order.key]
            remote.release()
        return answer

    def _order(self, task: Task, key: str) -> tuple[Order, Image]:
        """Return an order and its image, and offer all files that the order names."""
        with self._making:  # build each image and archive only once
            image = self._host.image(task.job.spec)
            sources = self._sources_of(task.source)
            bundle = self._offers.add(self._work.sources.bundle(task.source)) if task.job.git else None
        self._offers.add_known({path.name: path for path in image.files().values()})
        job = replace(task.job, spec=replace(task.job.spec, image=f"sha256:{image.digest}", python=None))
        order = Order(
            run=self._run,
            key=key,
            version=version("pytest-microvm"),
            task=replace(task, job=job),
            image=image.name,
            manifest=self._host.images.manifest(image),
            sources=sources,
            bundle=bundle,
            repository=self._work.repository,
            default_branch=self._work.default_branch,
            require_accel=self._require_accel,
        )
        return order, image

    def _sources_of(self, source: Source) -> str:
        if source not in self._sources:
            path = self._folder / f"{len(self._sources)}.tar"
            write_tree(self._work.sources.tree(source), path)
            self._sources[source] = self._offers.add(path)
        return self._sources[source]

    def _key(self, task: Task) -> str:
        """Return an attempt's id: a digest of repository, commit, task and number, with the run's id."""
        source = task.source
        facts = [self._work.repository, source.commit, task.id, self._attempts[task.id]]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        return f"microvm-ci-{digest}-{self._run}"

    def _check_room(self, task: Task, wanted: Mapping[str, float]) -> None:
        """Report it if no worker has room for a task; one may still join."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        for worker in workers:
            if all(worker["resources"].get(name, 0) >= size for name, size in wanted.items()):
                return
        sizes = ", ".join(f"{name} {size:g}" for name, size in wanted.items())
        self._work.watcher.line(task, f"waiting: no worker of the cluster has room for {sizes}")

    # Messages from workers

    def _listen(self) -> None:
        """Handle the workers' messages in the order of their arrival."""
        while (message := self._told.get()) is not _END:
            if message["kind"] == "need":
                self._offers.answer(message)
            else:
                self._hear(message)

    def _hear(self, message: Mapping[str, Any]) -> None:
        task = self._tasks[message["task"]]
        watcher = self._work.watcher
        if message["kind"] == "began":
            self._note_begin(task, message["key"], sanitize_line(str(message["host"])))
        elif message["kind"] == "phase":
            watcher.phase(task, sanitize_line(message["phase"], 40))
        else:
            for line in message["lines"]:
                watcher.line(task, line)

    def _note_begin(self, task: Task, key: str, host: str) -> None:
        with self._lock:
            hosts = self._began.setdefault(key, [])
            hosts.append(host)
            remote = self._remote.get(key)
        if len(hosts) > 1:
            self._work.watcher.line(task, f"infra: worker {hosts[-2]} was lost; begun again on {host}")
        if remote is not None and (len(hosts) > ALLOWED_FAILURES + 1 or self._cancelled.is_set()):
            remote.cancel(force=True)

    def _lost_too_often(self, key: str) -> bool:
        return len(self._began.get(key, ())) > ALLOWED_FAILURES + 1

    def _lost(self, task: Task, key: str) -> TaskResult:
        hosts = self._began.get(key, [])[: ALLOWED_FAILURES + 1]
        reason = f"{len(hosts)} workers were lost while they did it: {', '.join(hosts)}"
        return replace(not_done(task, "infra", reason), lost_workers=len(hosts))

    def _ended_early(self, task: Task) -> TaskResult:
        if self._cancelled.is_set():
            return not_done(task, "cancelled", "the run was ended early")
        return not_done(task, "infra", "the cluster gave it up: its scheduler was restarted, or is gone")


def _resources(task: Task, image: Image, require_accel: str | None) -> dict[str, float]:
    """Return the worker resources that a task's machine needs."""
    spec = task.job.spec
    resources = {
        "vcpus": float(spec.cpus or image.resources["cpus"]),
        "memory": float(spec.memory or image.resources["memory"]),
    }
    return {**resources, "kvm": 1.0} if require_accel == "kvm" else resources
