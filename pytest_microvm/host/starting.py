"""Start machines as copies of templates: each has a place in the host budget and an identity of its own."""

from __future__ import annotations

import secrets
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_microvm.errors import BootError
from pytest_microvm.host.kept import KeptMachine
from pytest_microvm.machine.grants import NOTHING, Given
from pytest_microvm.machine.instance import Instance, MachineFacts
from pytest_microvm.machine.microvm import Checkpoint, MicroVM
from pytest_microvm.templates.chain import IN_THE_MAKING
from pytest_microvm.templates.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from pytest_microvm.templates.budget import HostBudget
    from pytest_microvm.templates.chain import Base, Chain
    from pytest_microvm.templates.store import Template, TemplateStore
    from pytest_microvm.templates.unpublished import UnpublishedTemplate


@dataclass(frozen=True)
class StartedCopy:
    """A running copy of a template.

    Args:
        instance: The machine.
        facts: Its facts.
        base: What its template was made from.
        own: Its own folder if it is keepable.
    """

    instance: Instance
    facts: MachineFacts
    base: Base
    own: Path | None


class MachineStarter:
    """Starts machines, and holds their places in the host budget until they are released.

    Args:
        budget: Returns the host budget, which is made at first use.
        store: Returns the template store, likewise.
        chain: Returns what copies the templates of a base.
        sound: Returns a template, or its replacement if it or its image was damaged.
        say: Called with a line about work that takes long.
        warn: Called with lines to report once, such as limits that this host cannot enforce.
        retries: How often to replace a machine that does not wake up.
    """

    def __init__(
        self,
        budget: Callable[[], HostBudget],
        store: Callable[[], TemplateStore],
        chain: Callable[[Base], Chain],
        sound: Callable[[Template, Base], Template],
        *,
        say: Callable[[str], None],
        warn: Callable[[Sequence[str]], None],
        retries: int,
    ) -> None:
        self._budget = budget
        self._store = store
        self._chain = chain
        self._sound = sound
        self._say = say
        self._warn = warn
        self._retries = retries
        self._pools: dict[tuple[str, str], Pool[Any]] = {}
        self._places: dict[str, Instance | None] = {}  # in the budget; None: nothing runs there yet
        self._own: dict[str, Path] = {}
        self._spare: dict[str, Callable[[], None]] = {}
        self._unpublished: list[UnpublishedTemplate] = []
        self._lock = threading.Lock()

    def copy(self, template: Template, base: Base, port: str, *, keepable: bool = False) -> StartedCopy:
        """Start a copy of ``template``, as soon as the host budget has room for it."""
        begin = time.monotonic()
        template = self._sound(template, base)  # before a place is reserved: making it again needs one
        with self._place("vm") as name:
            self._take(name, base)
            return self._start(template, base, port, name, begin, keepable=keepable)

    def try_copy(
        self, template: Template, base: Base, port: str, *, keepable: bool = False
    ) -> StartedCopy | None:
        """Start a copy of ``template``, or return ``None`` if the host budget has no room for it now."""
        begin = time.monotonic()
        template = self._sound(template, base)
        with self._place("vm") as name:
            if self._budget().try_take(name, base.image.name, base.limits.cpus, base.limits.memory):
                return self._start(template, base, port, name, begin, keepable=keepable)
            del self._places[name]
        return None

    def machine(self, template: Template, base: Base, *, keepable: bool = False) -> MicroVM:
        """Start a machine that is a copy of ``template``, as soon as there is room for it."""
        return self._handle(self.copy(template, base, "agent", keepable=keepable))

    def try_machine(self, template: Template, base: Base) -> MicroVM | None:
        """Start a machine that is a copy of ``template``, or return ``None`` if there is no room now."""
        copied = self.try_copy(template, base, "agent")
        return None if copied is None else self._handle(copied)

    def pooled(self, template: Template, base: Base, size: int) -> MicroVM | None:
        """Return a machine from the pool of ``size`` copies of ``template``; ``None`` if none is ready."""

        def make() -> MicroVM | None:
            machine = self.try_machine(template, base)
            if machine is not None:
                _warm(machine)
            return machine

        def new() -> Pool[MicroVM]:
            return Pool(size, make, MicroVM.close, lambda machine: machine.alive)

        return self.pool(("agent", f"{template.key} {id(base)}"), new).take()

    def pool(self, key: tuple[str, str], make: Callable[[], Pool[Any]]) -> Pool[Any]:
        """Return the pool called ``key``, created at first use; a full budget takes machines from it."""
        with self._lock:
            if key not in self._pools:
                self._pools[key] = make()
            return self._pools[key]

    def close_pool(self, key: tuple[str, str]) -> None:
        """Close the pool called ``key``, if there is one."""
        with self._lock:
            pool = self._pools.pop(key, None)
        if pool is not None:
            pool.close()

    def wait_ready(self) -> None:
        """Wait until every pool is full, or has found no room."""
        for pool in list(self._pools.values()):
            pool.wait_full()

    def keep(self, copied: StartedCopy, about: str) -> KeptMachine:
        """Freeze a keepable copy on disk, and release it."""
        assert copied.own is not None
        facts = copied.facts
        meta = {"about": about, "name": facts.id, "environment": list(facts.environment)}
        try:
            self._chain(copied.base).keep(copied.instance, copied.base, facts.id, copied.own, meta)
        finally:
            self.release(copied)
        return KeptMachine(facts.id, facts.image, about, time.time())

    def checkpoint(self, copied: StartedCopy) -> UnpublishedTemplate:
        """Copy the present state of a keepable copy, which runs on."""
        assert copied.own is not None
        template = self._chain(copied.base).checkpoint(copied.instance, copied.facts.id, copied.own)
        self._unpublished.append(template)
        return template

    def spare(self, copied: StartedCopy, end: Callable[[], None]) -> None:
        """Allow a machine to be ended when the host budget has no room for another one of this process."""
        self._spare[copied.facts.id] = end

    def release(self, copied: StartedCopy) -> None:
        """Return a copy's place to the host budget, and remove its own folder."""
        self._release(copied.facts.id)

    @contextmanager
    def room(self, base: Base) -> Iterator[None]:
        """Hold a place in the host budget while a template is made."""
        with self._place("template") as name:
            self._take(name, base)
            yield
        self._release(name)

    def close(self) -> None:
        """Close the pools, end every machine that was not released, remove all checkpoints."""
        with self._lock:
            pools, self._pools = list(self._pools.values()), {}
        for pool in pools:
            pool.close()
        for name in list(self._places):
            self._end(name)
        for template in self._unpublished:
            template.close()

    @contextmanager
    def _place(self, kind: str) -> Iterator[str]:
        """Name a place in the host budget; if the block fails, end its machine and return the place."""
        name = f"{kind}-{secrets.token_hex(4)}"
        self._places[name] = None
        try:
            yield name
        except BaseException:
            self._end(name)
            raise

    def _take(self, name: str, base: Base) -> None:
        """Wait for room in the host budget; pooled machines make room first."""
        limits = base.limits
        self._budget().take(
            name, base.image.name, limits.cpus, limits.memory, say=self._say, reclaim=self._reclaim
        )

    def _reclaim(self) -> bool:
        if any(pool.give_up_one() for pool in list(self._pools.values())):
            return True
        for end in list(self._spare.values()):
            end()
            return True
        return False

    def _end(self, name: str) -> None:
        instance = self._places.get(name)
        if instance is not None:
            instance.close()
        self._release(name)

    def _release(self, name: str) -> None:
        own = self._own.pop(name, None)
        if own is not None:
            self._store().drop(own)
        self._budget().release(name)
        self._places.pop(name, None)
        self._spare.pop(name, None)

    def _start(
        self, template: Template, base: Base, port: str, name: str, begin: float, *, keepable: bool
    ) -> StartedCopy:
        """Start a copy in the place ``name``; it was requested at ``begin``."""
        if keepable and base.grants.secrets:
            keepable = False
            self._warn(["machines that hold secrets are not kept: their memory would be on disk"])
        own = self._store().new_draft() if keepable else None
        if own is not None:
            self._own[name] = own
        instance = self._places[name] = self._awake(template, base, port, name, own)
        self._budget().started(name, instance.vmm.pid)
        self._warn(instance.vmm.not_enforced)
        facts = machine_facts(base, name, time.monotonic() - begin)
        instance.events.add("started", f"{name} from image {facts.image}", accelerator=facts.accelerator)
        return StartedCopy(instance, facts, base, own)

    def _awake(self, template: Template, base: Base, port: str, name: str, own: Path | None) -> Instance:
        """Return a copy that has woken up with its own identity and grants; replace those that do not."""
        identity: dict[str, Any] = {"hostname": name, "machine_id": secrets.token_hex(16)}
        if base.limits.pids is not None:
            identity["pids"] = base.limits.pids
        given = base.grants.for_machine(name)
        for retry in range(self._retries + 1):
            try:
                instance = self._chain(base).copy(template, base, name, own=own)
                try:
                    instance.give(given)
                    instance.adopt(port, identity, given.message())
                except BaseException:
                    instance.close()
                    raise
            except BootError as error:
                if retry == self._retries:
                    raise
                self._say(f"infra: {error.brief}; starting another machine ({retry + 1} of {self._retries})")
            else:
                return instance
        raise AssertionError("unreachable: the last try returns or raises")

    def _handle(self, copied: StartedCopy) -> MicroVM:
        """Return the object that a user holds, which releases the copy when it is closed."""

        def keep(about: str) -> None:
            self.keep(copied, about)

        base = copied.base
        fixed = copied.own is None or base.grants.secrets or base.grants.credentials
        return MicroVM(
            copied.instance,
            copied.facts,
            on_close=lambda: self.release(copied),
            on_keep=None if copied.own is None else keep,
            on_checkpoint=None if fixed else lambda: self._forkable(copied),
        )

    def _forkable(self, copied: StartedCopy) -> Checkpoint:
        template = self.checkpoint(copied)

        def fork() -> MicroVM:
            forked = self.copy(template, copied.base, "agent")
            facts = replace(forked.facts, fork_of=copied.facts.id)
            machine = self._handle(replace(forked, facts=facts))
            machine.instance.watch(copied.base.limits)
            return machine

        return Checkpoint(copied.facts.id, fork, template.close)


def machine_facts(base: Base, name: str, ready_seconds: float) -> MachineFacts:
    """Return the facts of a machine made from ``base``."""
    return MachineFacts(
        id=name,
        image=base.image.name,
        image_digest=base.image.digest,
        accelerator=base.accelerator.name,
        accelerator_reason=base.accelerator.reason,
        ready_seconds=ready_seconds,
        limits=base.limits,
        environment=base.resources.environment,
    )


def _warm(machine: MicroVM) -> None:
    """Run a command in a waiting machine, so that code is translated now, not when the machine is needed."""
    try:
        with suppress(FileNotFoundError):  # a container image may have no programs
            machine.run(["true"], timeout=machine.instance.boot_timeout)
    except BaseException as error:
        machine.close()
        if isinstance(error, subprocess.TimeoutExpired):
            raise BootError(f"machine {machine.id} did not run its first command") from error
        raise


def machine_in_the_making(base: Base, instance: Instance, given: Given = NOTHING) -> MicroVM:
    """Return a :class:`MicroVM` for a machine that becomes a template; the template's maker owns it."""
    instance.give(given)
    instance.adopt("agent", IN_THE_MAKING, given.message())
    return MicroVM(instance, machine_facts(base, "template", 0.0))
