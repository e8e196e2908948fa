"""Connections to a cluster: with TLS, or within this computer only.

Any client of a Dask scheduler can run any code on all of its workers. So nothing is sent to, or accepted
from, an address of another computer without certificates on both sides; a cluster that lives only as long as
a run has certificates of its own, since other users of this computer can reach its ports, too.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dask.config
from distributed import Client, LocalCluster, Worker, WorkerPlugin
from distributed.security import Security

from pytest_microvm.errors import HostError, UsageError
from pytest_microvm.templates.budget import default_limits
from pytest_microvm.templates.runtime_folder import runtime_folder

CONNECT_TIMEOUT = 60.0
_NAME = "pytest-microvm"
ALLOWED_FAILURES = 1
"""How many workers may be lost during a task: the task is started once more, not twice."""


def dask_settings() -> dict[str, Any]:
    """Return Dask's configuration: no web pages, which lack authentication, and a private folder for files.

    Dask imports modules from the folder of its files, by default ``dask-scratch-space`` in the folder for
    temporary files: another user who creates that folder first could place modules there.

    Raises:
        HostError: The private folder is open to other users.
    """
    return {
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
        "temporary-directory": dask.config.get("temporary-directory", None) or str(runtime_folder()),
    }


@dataclass(frozen=True)
class Certificates:
    """The TLS certificates of a host, as files in PEM form.

    Args:
        ca: The authority that signed all hosts' certificates.
        cert: This host's certificate.
        key: Its private key.
    """

    ca: Path
    cert: Path
    key: Path


def security_for(address: str, certificates: Certificates | None) -> Security | None:
    """Return the TLS settings for a scheduler; ``None`` if it is on this computer and needs none.

    Args:
        address: ``tls://host:port``, or ``tcp://127.0.0.1:port``.
        certificates: This host's certificates.

    Raises:
        UsageError: The address is another computer's and has no TLS, or certificates are missing.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host or port is None or parts.scheme not in ("tls", "tcp"):
        raise UsageError(
            f"{address!r} is no address of a scheduler", resolution="write tls://HOST:PORT, such as port 8786"
        )
    if parts.scheme == "tcp":
        if not _loopback(host):
            raise UsageError(
                f"{address} is another computer's address without encryption",
                details="whoever can talk to a scheduler, or in between, can run any code on its workers",
                resolution="start the scheduler with TLS, and give tls://HOST:PORT with --tls-ca, --tls-cert "
                "and --tls-key (docs/how-to/cluster.md)",
            )
        return None
    if certificates is None:
        raise UsageError(
            f"{address} needs certificates", resolution="give --tls-ca, --tls-cert and --tls-key, all three"
        )
    for path in (certificates.ca, certificates.cert, certificates.key):
        if not os.access(path, os.R_OK):
            raise UsageError(f"{path} cannot be read", resolution="give certificates as files in PEM form")
    ca, cert, key = str(certificates.ca), str(certificates.cert), str(certificates.key)
    return Security(
        require_encryption=True,
        tls_ca_file=ca,
        tls_client_cert=cert,
        tls_client_key=key,
        tls_worker_cert=cert,
        tls_worker_key=key,
    )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _silent() -> Iterator[None]:
    """Keep Dask's log off the terminal, which shows the run; results report what was lost."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def connected(address: str, certificates: Certificates | None) -> Iterator[Client]:
    """Connect to a running scheduler.

    Raises:
        UsageError: :func:`security_for` refuses the address.
        HostError: The scheduler does not respond, or has no worker.
    """
    security = security_for(address, certificates)
    with ExitStack() as stack:
        stack.enter_context(_silent())
        try:
            client = Client(
                address, security=security, timeout=CONNECT_TIMEOUT, set_as_default=False, name=_NAME
            )
        except (OSError, TimeoutError) as error:
            raise HostError(
                f"the scheduler {address} does not answer: {error}",
                resolution="see whether it runs, and whether certificates and addresses are right",
            ) from error
        stack.enter_context(client)
        try:
            client.wait_for_workers(1, timeout=CONNECT_TIMEOUT)
        except TimeoutError as error:
            raise HostError(
                f"the scheduler {address} has no workers",
                resolution=f"start some: `pytest-microvm ci worker {address}`",
            ) from error
        yield client


class _Uninterrupted(WorkerPlugin):
    """Makes workers ignore Ctrl-C, which a terminal sends to all processes; the submitter handles it."""

    name = "pytest-microvm-uninterrupted"

    def setup(self, worker: Worker) -> None:
        """Ignore SIGINT; Dask calls this on the worker."""
        del worker
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def own_cluster(slots: int) -> Iterator[Client]:
    """Run a cluster on this computer for the duration of the ``with`` block.

    Args:
        slots: How many tasks run at the same time.

    Raises:
        HostError: The cluster did not start.
    """
    workers = min(slots, os.cpu_count() or 1)
    threads = math.ceil(slots / workers)
    cpus, memory = default_limits()
    resources = {"vcpus": cpus / workers, "memory": memory / workers, "kvm": threads}
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(dask_settings()))
        try:
            cluster = stack.enter_context(
                LocalCluster(
                    n_workers=workers,
                    threads_per_worker=threads,
                    processes=True,
                    host="127.0.0.1",
                    protocol="tls",
                    security=Security.temporary(),
                    dashboard_address=None,
                    worker_dashboard_address=None,
                    silence_logs=logging.CRITICAL,
                    scheduler_kwargs={
                        "allowed_failures": ALLOWED_FAILURES,
                        "dashboard": False,
                        "dashboard_address": "127.0.0.1:0",
                    },
                    resources=resources,
                    memory_limit=0,
                    plugins=(_Uninterrupted(),),
                )
            )
            client = stack.enter_context(Client(cluster, set_as_default=False, name=_NAME))
        except ImportError as error:
            raise HostError(
                f"certificates cannot be made: {error}", resolution="install pytest-microvm[distributed]"
            ) from error
        except (OSError, TimeoutError, RuntimeError) as error:
            raise HostError(
                f"a cluster on this computer did not start: {error}", resolution="use --executor local"
            ) from error
        yield client
