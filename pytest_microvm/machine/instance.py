"""A running VM with its links: resume handshake, quota enforcement, usage, and the cause of its end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pytest_microvm.agent.drain import Drain
from pytest_microvm.agent.link import Link
from pytest_microvm.errors import BootError, MachineCrashed, MachineError, QuotaExceeded
from pytest_microvm.events import EventLog
from pytest_microvm.machine.console import ConsoleReader, GuestFailure
from pytest_microvm.machine.grants import NOTHING, Given
from pytest_microvm.machine.quotas import QuotaGuard, watchdog
from pytest_microvm.network.port.service import MachineNetwork
from pytest_microvm.network.proxy.log import NetworkLog
from pytest_microvm.untrusted.redaction import Redactor
from pytest_microvm.untrusted.text import sanitize, sanitize_line

if TYPE_CHECKING:
    import socket

    from pytest_microvm.network.policy.rules import Policy
    from pytest_microvm.network.proxy.server import Proxy
    from pytest_microvm.settings.spec import Limits

BOOT_TIMEOUT = 60.0
"""Seconds a boot may take before it fails (about 3 are usual under emulation)."""

_CLOCK_ERROR = 0.2  # seconds that a guest's clock may be late; on a busy host its first answer takes longer
_CLOCK_ATTEMPTS = 3
_RESTS = 5
_END_LINES = 60  # console lines shown for a machine that ended: a kernel panic with its headline


_ENDS = {
    "panic": "the guest's kernel panicked",
    "runner": "the pytest process in the guest ended",
}
"""Causes of a guest's reboot, by kind of the finding on its console."""


class Vmm(Protocol):
    """A running VM, as a hypervisor returns it."""

    sockets: dict[str, socket.socket]

    @property
    def pid(self) -> int:
        """The VMM's process id."""

    @property
    def alive(self) -> bool:
        """True while the VM runs."""

    def checkpoint(self, state: Path) -> None:
        """Stop the guest and write its device state."""

    def resume(self) -> None:
        """Resume a stopped guest."""

    def kill(self) -> None:
        """End the VM at once."""

    def end_reason(self) -> str:
        """Return the reason, for users, that the VM ended by itself."""

    def usage(self) -> Usage:
        """Return its process's usage so far, without the channel's bytes; the last known once it ended."""

    def ceiling_hit(self) -> int | None:
        """Return its process's memory ceiling in bytes if the host's kernel ended the process there."""

    def cpu_limit_hit(self) -> bool:
        """Return True if the host's kernel ended its process for its CPU time."""

    @property
    def not_enforced(self) -> tuple[str, ...]:
        """Requested limits that this host cannot enforce, one line each."""


@dataclass(frozen=True)
class Usage:
    """Resources used by a machine so far, as measured by the host.

    Args:
        cpu_seconds: CPU time of the VMM process, all its threads.
        memory_bytes: Current resident memory of the VMM process.
        peak_memory_bytes: Peak resident memory.
        disk_bytes: Bytes that the machine has written to its scratch disk and still keeps there.
        received_bytes: Bytes received from the machine over its channel.
        sent_bytes: Bytes sent to the machine over its channel.
    """

    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    peak_memory_bytes: int = 0
    disk_bytes: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True)
class MachineFacts:
    """Facts about a machine that are fixed when it starts.

    Args:
        id: Its name, unique on this host.
        image: The image's name.
        image_digest: The image's digest.
        accelerator: The accelerator that runs it: ``kvm``, ``tcg``...
        accelerator_reason: The reason for that choice, for users.
        ready_seconds: Seconds from the request for a machine to its first answer.
        limits: Its quotas.
        environment: Variables that every command gets.
        fork_of: The machine whose checkpoint it began in, or the begin of that template's key; empty: it is
            no fork.
        restored: The fixtures that stood in that template, if an earlier run has set them up.
    """

    id: str
    image: str
    image_digest: str
    accelerator: str
    accelerator_reason: str
    ready_seconds: float
    limits: Limits
    environment: tuple[tuple[str, str], ...] = ()
    fork_of: str = ""
    restored: str = ""


class Instance:
    """A running VM with its links, as templates return it.

    Args:
        vmm: The running VM; the instance owns it.
        patience: Factor for how long it may take to boot and to answer (see ``Accelerator``).
    """

    def __init__(self, vmm: Vmm, patience: float = 1.0) -> None:
        self.vmm = vmm
        self.boot_timeout = BOOT_TIMEOUT * patience
        self.events = EventLog()
        self.requests = NetworkLog(self.events, self._redact)
        self.guard: QuotaGuard | None = None
        self.resumed_with: dict[str, Any] = {}
        self.given = NOTHING
        self.granted = False  # whether it ever had grants: a proxy made then keeps applying them
        self._violation = ""
        self._links: dict[str, Link] = {}
        self._lock = threading.Lock()
        self._reader = ConsoleReader()
        self.console = Drain(vmm.sockets["console"], self._heard)
        self.network = MachineNetwork(vmm.sockets["network"], self.proxy, self.requests, self._violated)

    @property
    def findings(self) -> list[GuestFailure]:
        """Failures that the guest's kernel reported on the console, redacted."""
        return [replace(found, text=self.redactor.text(found.text)) for found in self._reader.findings]

    @property
    def redactor(self) -> Redactor:
        """The redactor that removes its secrets from output."""
        return self.given.redactor

    def give(self, given: Given) -> None:
        """Set the machine's grants, before it is adopted."""
        self.given = given
        self.granted = self.granted or given is not NOTHING
        self.events.redact = given.redactor.text

    def take_away(self) -> None:
        """Revoke the grants of the prepare step, so that the template does not trust their certificates."""
        if self.given.trust:
            self.link("agent").call("resume", timeout=self.boot_timeout, **{**self.resumed_with, "trust": ""})
        self.give(NOTHING)

    def narrow(self, policy: Policy) -> None:
        """Restrict its network policy, before its first request."""
        self.given = replace(self.given, access=replace(self.given.access, policy=policy))

    def proxy(self) -> Proxy:
        """Return a new proxy for its network connections; called at the first connection."""
        from pytest_microvm.network.proxy.meter import Meter  # noqa: PLC0415 - a machine may never connect
        from pytest_microvm.network.proxy.server import Proxy  # noqa: PLC0415

        limits = None if self.guard is None else self.guard.limits  # none while it is being prepared
        quotas = (limits.network_bytes, limits.connections, limits.bandwidth) if limits else (None,) * 3
        meter = Meter(*quotas, self._exceeded_network)
        return Proxy(self.given.access, self.requests, meter, redact=self.redactor.text)

    def _redact(self, text: str) -> str:
        return self.redactor.text(text)  # looked up late: the grants are only known once it has resumed

    def _violated(self) -> None:
        self._violation = "its network process broke the protocol"
        self.vmm.kill()

    def _exceeded_network(self, quota: str, limit: float, observed: float) -> None:
        if self.guard is not None:
            self.guard.exceed(quota, limit, observed)

    def watch(self, limits: Limits) -> None:
        """Enforce ``limits`` from now on: the machine has been handed out."""
        self.usage()  # the only figures if the machine ends before the watchdog's first check
        self.guard = QuotaGuard(limits, self.usage, self._end_for)
        watchdog().add(self.guard)

    def link(self, port: str) -> Link:
        """Return the link to ``port``, created on first use."""
        with self._lock:
            if port not in self._links:
                self._links[port] = link = Link(self.vmm.sockets[port], on_violation=self.vmm.kill)
                link.redactor = self.redactor
            return self._links[port]

    def adopt(
        self,
        port: str,
        identity: Mapping[str, Any],
        given: Mapping[str, Any] | None = None,
    ) -> Link:
        """Resume a copy over ``port`` with its own identity and grants, before any other request.

        Args:
            port: The port whose guest end handles the request.
            identity: ``hostname`` and ``machine_id``; entropy and time are added here.
            given: The machine's grants, sent once (see ``guest/resume.py``).

        Raises:
            BootError: The guest did not answer, or did not accept its grants.
        """
        link = self.link(port)
        given = given or {}
        for attempt in range(_CLOCK_ATTEMPTS):
            begin = time.monotonic()
            self.resumed_with = {"entropy": os.urandom(64).hex(), "time": time.time(), **identity}
            try:
                result = link.call(
                    "resume", timeout=self.boot_timeout, **self.resumed_with, **({} if attempt else given)
                )
            except (TimeoutError, MachineCrashed) as error:
                raise self.boot_error(f"a machine did not wake up: {error}") from error
            refused = [] if attempt else _not_taken(result, given)
            if refused:
                raise self.boot_error(f"a machine did not take what it was given: {refused[0]}")
            if time.monotonic() - begin < _CLOCK_ERROR:  # its clock is late by less than the call took
                break
        return link

    def checkpoint(self, state: Path) -> None:
        """Stop the guest while its network process is at rest, and write its device state.

        A copy's network process must not continue a conversation that began with this machine's host end.
        At rest it stays silent for a second, in which the machine stops; if stopping takes longer, the
        attempt is repeated.

        Raises:
            MachineError: The state cannot be saved, or the network process does not come to rest.
        """
        for _ in range(_RESTS):
            try:
                self.network.rest()
            except TimeoutError as error:
                raise MachineError(
                    f"a machine cannot be frozen: {error}",
                    resolution="was its process microvm-network ended?",
                ) from error
            self.vmm.checkpoint(state)
            if self.network.silent:
                return
            self.vmm.resume()
        raise MachineError(
            "a machine cannot be frozen: it used its network all the time",
            resolution="end what it runs in the background",
        )

    def resume(self) -> None:
        """Resume a machine that was stopped by :meth:`checkpoint`."""
        self.vmm.resume()

    def boot_error(self, brief: str) -> BootError:
        """Return a boot error that quotes the console."""
        return BootError(
            brief, details=self.console_text(_END_LINES), resolution="run `pytest-microvm doctor`"
        )

    def console_text(self, lines: int = 30) -> str:
        """Return the console's last lines, made safe to print."""
        text = self.redactor.text(self.console.tail().decode(errors="replace").replace("\r\n", "\n"))
        return sanitize("\n".join(text.split("\n")[-lines:]).strip())

    def end_error(self, name: str) -> MachineError:
        """Return the error that ended the machine: a quota, or a crash with the console's tail.

        Args:
            name: The machine's name.
        """
        exceeded = self.exceeded()
        if exceeded is None:
            reason = self._end_reason()
            exceeded = self.exceeded()  # only now the process has surely ended
        if exceeded is not None:
            return exceeded
        self.events.add("crashed", reason)
        said = [f"the guest's console: {finding.text}" for finding in self.findings]
        return MachineCrashed(
            f"machine {name} ended: {reason}",
            details="\n".join([*said, self.console_text(_END_LINES)]),
            resolution="the console above is the machine's own; its last command is the likely cause",
        )

    def exceeded(self) -> QuotaExceeded | None:
        """Return the exceeded quota that ended the machine, or is about to, as a new exception per call."""
        self.console.tail()  # unread output may report an exceeded quota
        guard = self.guard
        if guard is not None and guard.verdict is not None:
            verdict = guard.verdict
            return QuotaExceeded(verdict.quota, verdict.limit, verdict.observed, details=verdict.details)
        if self.vmm.alive:
            return None
        usage, ceiling = self.usage(), self.vmm.ceiling_hit()
        if ceiling is not None:
            details = "the machine's process on the host, not the guest, reached its ceiling"
            return QuotaExceeded("memory", ceiling, max(ceiling, usage.peak_memory_bytes), details=details)
        limit = guard.limits.cpu_seconds if guard is not None else None
        if limit and (usage.cpu_seconds > limit or self.vmm.cpu_limit_hit()):
            return QuotaExceeded("cpu_seconds", limit, max(limit, usage.cpu_seconds))
        return None

    def _end_for(self, verdict: QuotaExceeded) -> None:
        self.events.add(
            "quota", verdict.brief, quota=verdict.quota, limit=verdict.limit, observed=verdict.observed
        )
        self.vmm.kill()

    def _end_reason(self) -> str:
        """Return the reason, for users, that it ended by itself; a reboot's cause comes from the console."""
        reason = self._violation or self.vmm.end_reason()
        if reason.startswith("the guest rebooted"):  # the console has the cause
            kinds = {finding.kind for finding in self.findings}
            for kind, why in _ENDS.items():
                if kind in kinds:
                    return why
        return reason

    def _heard(self, data: bytes) -> None:
        """Search console output for failures that only the guest's kernel can see."""
        for found in self._reader.feed(data):
            finding = replace(found, text=self.redactor.text(found.text))
            self.events.add("finding", finding.text, seen_by="guest", finding=finding.kind)
            guard = self.guard
            if guard is not None and finding.kind == "memory":
                seen = max(guard.limits.memory, self.usage().memory_bytes)
                guard.exceed("memory", guard.limits.memory, seen, finding.text)
            elif guard is not None and finding.kind == "pids" and guard.limits.pids is not None:
                guard.exceed("pids", guard.limits.pids, guard.limits.pids + 1, finding.text)

    def usage(self) -> Usage:
        """Return the machine's usage so far; the last known figures once it ended."""
        ends: list[Link | MachineNetwork] = [*self._links.values(), self.network]
        return replace(
            self.vmm.usage(),
            received_bytes=sum(each.bytes_received for each in ends) + self.console.received,
            sent_bytes=sum(each.bytes_sent for each in ends),
        )

    def close(self) -> None:
        """End the VM and release its resources; a second call does nothing."""
        if self.guard is not None:
            watchdog().remove(self.guard)
        self.usage()
        self.vmm.kill()
        self.console.tail()
        self.network.close()
        for link in self._links.values():
            link.close()
        self.console.close()
        for sock in self.vmm.sockets.values():
            sock.close()


def _not_taken(result: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return the entries of ``given`` that the guest reports as not applied, each with its reason."""
    skipped = result.get("skipped")
    if not isinstance(skipped, list):
        return []
    lines = [sanitize_line(line, 200) for line in skipped if isinstance(line, str)]
    return [line for line in lines if line.partition(":")[0] in given]
