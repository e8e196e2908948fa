"""``pytest-microvm ci worker``: make this computer a worker of a cluster."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.errors import HostError, MicroVMError, UsageError
from pytest_microvm.host.host import Host
from pytest_microvm.hypervisors.probe import KVM_DEVICE
from pytest_microvm.settings.spec import format_cpus, format_size, parse_cpus, parse_size
from pytest_microvm.templates.budget import default_limits
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from distributed.security import Security

    from pytest_microvm.ci.cluster.connection import Certificates

_DESCRIPTION = """Do jobs of `pytest-microvm ci run --executor dask` on this computer, until it is ended. Who
may talk to the scheduler may run any code here, as you: an address of another computer needs TLS."""
_EXAMPLES = """examples:
  pytest-microvm ci worker tcp://127.0.0.1:8786
  pytest-microvm ci worker tls://ci.example:8786 --slots 8 --memory 24G \\
      --tls-ca ca.pem --tls-cert worker.pem --tls-key worker.key

See docs/how-to/cluster.md for the scheduler and for certificates."""
_ADDRESS = "a Dask scheduler: tls://HOST:PORT, or tcp://127.0.0.1:PORT"
_EXIT_LOST = 1
_CONNECT_TIMEOUT = 60.0
_LEAVE_TIMEOUT = 60.0


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb ``worker``."""
    parser = verbs.add_parser(
        "worker", help="run jobs for other computers", description=_DESCRIPTION, epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("scheduler", metavar="SCHEDULER", help=_ADDRESS)
    parser.add_argument("--slots", type=int, metavar="N", help="jobs at a time (default: cores)")
    parser.add_argument("--vcpus", metavar="N", help="vCPUs of all machines (default: the host budget)")
    parser.add_argument("--memory", metavar="SIZE", help="their memory (default: the host budget)")
    parser.add_argument("--name", help="this computer's name in results (default: host name and process)")
    add_certificate_options(parser)
    parser.set_defaults(run=_run)


def add_cluster_options(parser: argparse._ActionsContainer) -> None:
    """Add the options of `ci run` for a cluster."""
    parser.add_argument(
        "--executor", choices=("local", "dask"), default="local",
        help="where jobs run: here, or on a Dask cluster (default: local)",
    )  # fmt: skip
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help=f"{_ADDRESS} (default: a cluster here, for this run)"
    )
    add_certificate_options(parser)


def add_certificate_options(parser: argparse._ActionsContainer) -> None:
    """Add the options for this computer's TLS certificates."""
    for name, what in (
        ("ca", "the authority that signed all certificates of the cluster"),
        ("cert", "this computer's certificate"),
        ("key", "its private key"),
    ):
        parser.add_argument(f"--tls-{name}", type=Path, metavar="FILE", help=f"{what}, in PEM form")


def certificates(arguments: argparse.Namespace) -> Certificates | None:
    """Return the certificates that the options name; ``None`` if there are none.

    Raises:
        UsageError: Some of the three options are missing.
    """
    require_dask()
    from pytest_microvm.ci.cluster.connection import Certificates  # noqa: PLC0415

    given = [arguments.tls_ca, arguments.tls_cert, arguments.tls_key]
    if not any(given):
        return None
    if not all(given):
        raise UsageError("--tls-ca, --tls-cert and --tls-key belong together", resolution="give all three")
    return Certificates(*given)


def require_dask() -> None:
    """Raise an error if Dask is missing.

    Raises:
        HostError: Dask is not installed.
    """
    if find_spec("distributed") is None:
        raise HostError("Dask is not installed", resolution="pip install 'pytest-microvm[distributed]'")


def _run(arguments: argparse.Namespace) -> int:
    require_dask()
    from pytest_microvm.ci.cluster.connection import security_for  # noqa: PLC0415

    security = security_for(arguments.scheduler, certificates(arguments))
    slots = arguments.slots if arguments.slots is not None else os.cpu_count() or 1
    if slots < 1:
        raise UsageError(
            f"invalid --slots: expected 1 or more jobs, got {slots}", resolution="leave it out: one per core"
        )
    cpus, memory = default_limits()
    cpus = parse_cpus(arguments.vcpus, "--vcpus") if arguments.vcpus else cpus
    memory = parse_size(arguments.memory, "--memory") if arguments.memory else memory
    resources = {"vcpus": float(cpus), "memory": float(memory), "kvm": float(slots * _has_kvm())}
    name = arguments.name or f"{socket.gethostname()}-{os.getpid()}"
    print(
        f"{sanitize_line(name)}: {slots} jobs at a time, {format_cpus(cpus)} vCPUs,"
        f" {format_size(memory // 1024**2 * 1024**2)}, {'KVM' if resources['kvm'] else 'no KVM'}",
        flush=True,
    )
    return asyncio.run(_work(arguments.scheduler, security, slots, resources, name))


async def _work(
    scheduler: str, security: Security | None, slots: int, resources: dict[str, float], name: str
) -> int:
    """Run a worker until the scheduler or a signal ends it; return the exit status.

    There is no nanny, a process that would restart this one: systemd or a container does that. The kernel
    kills a machine when the process that started it dies, so a worker leaves none behind.
    """
    import dask.config  # noqa: PLC0415 - only for this command
    from distributed import Worker  # noqa: PLC0415

    from pytest_microvm.ci.cluster.connection import dask_settings  # noqa: PLC0415

    dask.config.set(dask_settings())
    logging.getLogger("distributed.worker").setLevel(logging.WARNING)  # INFO has a line for each call
    ended = asyncio.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signal_number, ended.set)
    worker = Worker(
        scheduler,
        nthreads=slots,
        name=name,
        resources=resources,
        security=security,
        host="127.0.0.1" if security is None else None,
        memory_limit=0,  # no limit: the memory is the machines', which the host budget counts
        dashboard=False,
        dashboard_address="127.0.0.1:0",
        death_timeout=_CONNECT_TIMEOUT,
    )
    try:
        await worker
    except (OSError, TimeoutError) as error:
        raise HostError(
            f"the scheduler {scheduler} does not answer: {error}",
            resolution="see whether it runs, and whether certificates and addresses are right",
        ) from error
    print(f"connected to {scheduler}", flush=True)
    lost = asyncio.create_task(worker.finished())
    await asyncio.wait([lost, asyncio.create_task(ended.wait())], return_when=asyncio.FIRST_COMPLETED)
    with contextlib.suppress(OSError, TimeoutError):
        await worker.close(timeout=_LEAVE_TIMEOUT)  # its jobs end their machines, and move to other workers
    if ended.is_set():
        return 0
    print("pytest-microvm: the scheduler ended the connection", file=sys.stderr)
    return _EXIT_LOST


def _has_kvm() -> bool:
    """Return True if machines run with KVM here: tested with an image if there is one, else by the device."""
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return False
    host = Host()
    stored = host.images.list()
    try:
        return not stored or host.accelerator(stored[0].image).name == "kvm"
    except MicroVMError:
        return False
    finally:
        host.close()
