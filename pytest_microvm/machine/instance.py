"""A running VM with its links: greeted, watched, and asked why it ended."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pytest_microvm.agent.link import Drain, Link
from pytest_microvm.errors import BootError, MachineCrashed, MachineError, QuotaExceeded
from pytest_microvm.events import EventLog
from pytest_microvm.machine.console import ConsoleReader, Finding
from pytest_microvm.machine.grants import NOTHING, Given
from pytest_microvm.machine.quotas import Guard, watchdog
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
"""Seconds a boot may take before its machine is given up (about 3 under emulation)."""

_CLOCK_ERROR = 0.2  # seconds that a guest's clock may be late; on a busy host its first answer takes longer
_CLOCK_ATTEMPTS = 3
_RESTS = 5
_END_LINES = 60  # of the console, where a machine ended: a kernel panic with its headline


_ENDS = {
    "panic": "the guest's kernel panicked",
    "runner": "the pytest process in the guest ended",
}
"""Why a guest rebooted, by what was found on its console."""


class Vmm(Protocol):
    """What a hypervisor hands out: one running VM."""

    sockets: dict[str, socket.socket]

    @property
    def pid(self) -> int:
        """The VMM's process id."""

    @property
    def alive(self) -> bool:
        """Whether it still runs."""

    def checkpoint(self, state: Path) -> None:
        """Stop the guest and write its device state."""

    def resume(self) -> None:
        """Let a stopped guest run on."""

    def kill(self) -> None:
        """End it at once."""

    def end_reason(self) -> str:
        """Why it ended by itself, for people."""

    def usage(self) -> Usage:
        """What its process has used so far (all but the channel's bytes); the last known once it ended."""

    def ceiling_hit(self) -> int | None:
        """The memory ceiling of its process in bytes, if the host's kernel ended it there."""

    @property
    def not_enforced(self) -> tuple[str, ...]:
        """What was asked for and cannot be enforced on this host, a line each."""


@dataclass(frozen=True)
class Usage:
    """What a machine has used so far, as the host saw it.

    Args:
        cpu_seconds: CPU time of the VMM's process, all its threads.
        memory_bytes: Its resident memory now.
        peak_memory_bytes: The most it was.
        disk_bytes: What the machine has written to its scratch disk and still keeps there.
        received_bytes: What came from the machine over its channel.
        sent_bytes: What went to it.
    """

    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    peak_memory_bytes: int = 0
    disk_bytes: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True)
class MachineFacts:
    """What is known of a machine from its start.

    Args:
        id: Its name, unique on this host.
        image: The image's name.
        image_digest: The image's digest.
        accelerator: What runs it: ``kvm``, ``tcg``...
        accelerator_reason: Why that one, for people.
        ready_seconds: From asking for it to its first answer.
        limits: What it may use.
        environment: Variables that every command gets.
    """

    id: str
    image: str
    image_digest: str
    accelerator: str
    accelerator_reason: str
    ready_seconds: float
    limits: Limits
    environment: tuple[tuple[str, str], ...] = ()


class Instance:
    """A running VM with its links: what templates hand to those who use machines.

    Args:
        vmm: The running VM; owned from here on.
    """

    def __init__(self, vmm: Vmm) -> None:
        self.vmm = vmm
        self.events = EventLog()
        self.requests = NetworkLog(self.events, self._redact)
        self.guard: Guard | None = None
        self.resumed_with: dict[str, Any] = {}
        self.given = NOTHING
        self.granted = False  # whether it was ever given anything: its proxy goes on serving by that
        self._violation = ""
        self._links: dict[str, Link] = {}
        self._lock = threading.Lock()
        self._reader = ConsoleReader()
        self.console = Drain(vmm.sockets["console"], self._heard)
        self.network = MachineNetwork(vmm.sockets["network"], self.proxy, self.requests, self._violated)

    @property
    def findings(self) -> list[Finding]:
        """What the guest's kernel reported on the console."""
        return [replace(found, text=self.redactor.text(found.text)) for found in self._reader.findings]

    @property
    def redactor(self) -> Redactor:
        """What takes its secrets out of what is shown."""
        return self.given.redactor

    def give(self, given: Given) -> None:
        """Let the machine have what it is given, before it is adopted."""
        self.given = given
        self.granted = self.granted or given is not NOTHING
        self.events.redact = given.redactor.text

    def take_away(self) -> None:
        """Take back what the machine was given to be prepared with; its template shall not trust it."""
        if self.given.trust:
            self.link("agent").call("resume", timeout=BOOT_TIMEOUT, **{**self.resumed_with, "trust": ""})
        self.give(NOTHING)

    def narrow(self, policy: Policy) -> None:
        """Lower what it may reach, before it has asked for anything."""
        self.given = replace(self.given, access=replace(self.given.access, policy=policy))

    def proxy(self) -> Proxy:
        """Return what its connections to the network are served by, made when the first one comes."""
        from pytest_microvm.network.proxy.meter import Meter  # noqa: PLC0415 - a machine may never ask
        from pytest_microvm.network.proxy.server import Proxy  # noqa: PLC0415

        limits = None if self.guard is None else self.guard.limits  # none while it is being prepared
        quotas = (limits.network_bytes, limits.connections, limits.bandwidth) if limits else (None,) * 3
        meter = Meter(*quotas, self._exceeded_network)
        return Proxy(self.given.access, self.requests, meter, redact=self.redactor.text)

    def _redact(self, text: str) -> str:
        return self.redactor.text(text)  # what it was given is only known once it has woken up

    def _violated(self) -> None:
        self._violation = "its network process broke the protocol"
        self.vmm.kill()

    def _exceeded_network(self, quota: str, limit: float, observed: float) -> None:
        if self.guard is not None:
            self.guard.exceed(quota, limit, observed)

    def watch(self, limits: Limits) -> None:
        """Enforce ``limits`` from now on: the machine has been handed out."""
        self.usage()  # of one that ends before the watchdog's first look this is all that is known
        self.guard = Guard(limits, self.usage, self._end_for)
        watchdog().add(self.guard)

    def link(self, port: str) -> Link:
        """Return the link to ``port``, made when first asked for."""
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
        timeout: float = BOOT_TIMEOUT,
    ) -> Link:
        """Greet a copy on ``port`` and make it its own before anything else happens in it.

        Args:
            port: The port whose guest end does it.
            identity: ``hostname`` and ``machine_id``; entropy and time are added here.
            given: What the machine is given, once (see ``guest/resume.py``).
            timeout: Seconds to wait.

        Raises:
            BootError: The guest did not answer, or did not take what it is given.
        """
        link = self.link(port)
        given = given or {}
        for attempt in range(_CLOCK_ATTEMPTS):
            begin = time.monotonic()
            self.resumed_with = {"entropy": os.urandom(64).hex(), "time": time.time(), **identity}
            try:
                result = link.call(
                    "resume", timeout=timeout, **self.resumed_with, **({} if attempt else given)
                )
            except (TimeoutError, MachineCrashed) as error:
                raise self.boot_error(f"a machine did not wake up: {error}") from error
            refused = [] if attempt else _not_taken(result, given)
            if refused:
                raise self.boot_error(f"a machine did not take what it was given: {refused[0]}")
            if time.monotonic() - begin < _CLOCK_ERROR:  # its clock is late by less than this took
                break
        return link

    def checkpoint(self, state: Path) -> None:
        """Stop the guest and write its device state; its network's end is at rest then.

        A copy has another host, to which its network process must not go on with a conversation. One that is
        at rest keeps quiet for a second, in which the machine stops; if it took longer, it rests once more.

        Raises:
            MachineError: It cannot be saved, or does not come to rest.
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
        """Let a machine that was stopped by :meth:`checkpoint` run on."""
        self.vmm.resume()

    def boot_error(self, brief: str) -> BootError:
        """Return an error that quotes the console."""
        return BootError(
            brief, details=self.console_text(_END_LINES), resolution="run `pytest-microvm doctor`"
        )

    def console_text(self, lines: int = 30) -> str:
        """Return the console's last lines, made safe to print."""
        text = self.redactor.text(self.console.tail().decode(errors="replace").replace("\r\n", "\n"))
        return sanitize("\n".join(text.split("\n")[-lines:]).strip())

    def end_error(self, name: str) -> MachineError:
        """Return why the machine, which has ended, did: a quota, or a crash with the console's tail.

        Args:
            name: What it is called.
        """
        exceeded = self.exceeded()
        if exceeded is not None:
            return exceeded
        reason = self._end_reason()
        self.events.add("crashed", reason)
        said = [f"the guest's console: {finding.text}" for finding in self.findings]
        return MachineCrashed(
            f"machine {name} ended: {reason}",
            details="\n".join([*said, self.console_text(_END_LINES)]),
            resolution="the console above is the machine's own; its last command is the likely cause",
        )

    def exceeded(self) -> QuotaExceeded | None:
        """Return the quota that ended it, or is about to: a new exception for each who asks."""
        self.console.tail()  # what is still unread may say so
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
        if guard is not None and guard.limits.cpu_seconds and usage.cpu_seconds > guard.limits.cpu_seconds:
            return QuotaExceeded("cpu_seconds", guard.limits.cpu_seconds, usage.cpu_seconds)
        return None

    def _end_for(self, verdict: QuotaExceeded) -> None:
        self.events.add(
            "quota", verdict.brief, quota=verdict.quota, limit=verdict.limit, observed=verdict.observed
        )
        self.vmm.kill()

    def _end_reason(self) -> str:
        """Return why it ended by itself, for people; the console tells a panic from a reboot."""
        reason = self._violation or self.vmm.end_reason()
        if reason.startswith("the guest rebooted"):  # the console knows better why
            kinds = {finding.kind for finding in self.findings}
            for kind, why in _ENDS.items():
                if kind in kinds:
                    return why
        return reason

    def _heard(self, data: bytes) -> None:
        """Look at what came from the console; the guest's kernel may report what the host cannot see."""
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
        """Return what it has used so far; the last known figures once it ended."""
        ends: list[Link | MachineNetwork] = [*self._links.values(), self.network]
        return replace(
            self.vmm.usage(),
            received_bytes=sum(each.bytes_received for each in ends) + self.console.received,
            sent_bytes=sum(each.bytes_sent for each in ends),
        )

    def close(self) -> None:
        """End the VM and let go of everything; a second call does nothing."""
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
    """Return which of ``given`` the guest says it could not take, with why."""
    skipped = result.get("skipped")
    if not isinstance(skipped, list):
        return []
    lines = [sanitize_line(line, 200) for line in skipped if isinstance(line, str)]
    return [line for line in lines if line.partition(":")[0] in given]
