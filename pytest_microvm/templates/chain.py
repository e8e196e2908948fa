"""Template chains: a boot followed by the user's steps, link after link; each is made once and cached.

A link's key is the digest of its parent's key and of everything its step depends on. To make it, the
parent's memory and disk are copied, the machine continues from there, the step runs in it, and it is
frozen again. If several links are missing, one machine makes them, and a copy of it is frozen at each.
Two runs that need the same link wait for each other; a crash leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from pytest_microvm.agent.client import UnlimitedClient
from pytest_microvm.agent.process import GuestProcess, command_arguments
from pytest_microvm.cache.disk import explained
from pytest_microvm.errors import BootError, MachineCrashed
from pytest_microvm.hypervisors import Accelerator, Disk, Hypervisor, Launch
from pytest_microvm.images.cpio import CpioEntry, cpio_archive
from pytest_microvm.machine.grants import NO_GRANTS, Grants
from pytest_microvm.machine.instance import Instance
from pytest_microvm.templates.files import copy_sparse, format_scratch
from pytest_microvm.templates.store import KEPT
from pytest_microvm.templates.unpublished import UnpublishedTemplate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from pytest_microvm.images import Image
    from pytest_microvm.settings.spec import Limits, Resources
    from pytest_microvm.templates.store import Template, TemplateStore

FORMAT = 4
"""Part of every key; increase it when existing templates become unusable."""

IN_THE_MAKING = {"hostname": "template", "machine_id": "0" * 32}
"""The identity of a machine that becomes a template; each copy gets its own."""

_BOOT_TRIES = 3  # a boot did not come up in CI once, for an unknown reason
_LEAST_SLACK = 256 * 1024**2  # more than a machine writes between two checks of its disk


@dataclass(frozen=True)
class TemplateStep:
    """One link after the boot.

    Args:
        kind: Its name in lists: ``services``, ``prepared``, ``started``, ``workspace``, ``collected``.
        inputs: Everything it depends on besides its parent.
        work: Runs the step in a machine; returns the attachments to store with the template, by name.
        title: Progress message while it is made.
    """

    kind: str
    inputs: tuple[str, ...]
    work: Callable[[Instance], dict[str, bytes]] = field(compare=False)
    title: str = ""


@dataclass(frozen=True)
class Base:
    """The start of a chain: an image with its resources and accelerator.

    ``limits`` and ``grants`` do not affect templates, only the machines copied from them.
    """

    image: Image
    resources: Resources
    accelerator: Accelerator
    limits: Limits
    grants: Grants = NO_GRANTS


@dataclass(frozen=True)
class _InTheMaking:
    """A running machine with its own files, in a draft folder."""

    instance: Instance
    draft: Path


class Chain:
    """Makes, finds and copies templates.

    Args:
        hypervisor: Runs the machines.
        store: Stores the templates.
        guest_code: The package's own files for the guest (see :func:`guest_code_archive`).
        say: Called with progress messages.
        room: Reserves a place in the host budget for the machine in which a template is made.
        elsewhere: Fetches a missing template into the store if possible; returns whether it did.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        store: TemplateStore,
        guest_code: bytes,
        say: Callable[[str], None],
        room: Callable[[Base], AbstractContextManager[None]] = lambda _base: nullcontext(),
        *,
        elsewhere: Callable[[str], bool] = lambda _key: False,
    ) -> None:
        self._hypervisor = hypervisor
        self._store = store
        self._guest_code = guest_code
        self._say = say
        self._room = room
        self._elsewhere = elsewhere

    def key(self, base: Base, steps: Sequence[TemplateStep] = ()) -> str:
        """Return the key of the template that ``steps`` lead to."""
        launch = self._launch(base, self._store.folder)
        key = _digest(
            str(FORMAT),
            base.image.digest,
            hashlib.sha256(self._guest_code).hexdigest(),
            str(launch.cpus),
            str(launch.memory),
            str(base.resources.disk),
            str(launch.nested),
            *launch.words,
            *self._hypervisor.fingerprint(base.accelerator),
        )
        for step in steps:
            key = _digest(key, step.kind, *step.inputs)
        return key

    def ensure(self, base: Base, steps: Sequence[TemplateStep] = ()) -> Template:
        """Return the template that ``steps`` lead to, held open; missing links of the chain are made.

        Raises:
            BootError: The machine failed to boot three times.
            MachineError: A step failed.
            HostError: This computer lacks something.
        """
        key = self.key(base, steps)
        found = self._store.open(key)
        if found is not None:
            return found
        with self._alone(key, _title(base, steps)):
            found = self._found(key, steps)  # the previous holder of the lock may have made it
            if found is not None:
                return found
            with ExitStack() as stack:
                machine, made = self._done(base, steps, stack)
                self._freeze(machine.instance, key, machine.draft, self._meta(base, steps), made)
        found = self._store.open(key)
        if found is None:
            raise BootError("a template vanished as soon as it was made", resolution="run it again")
        return found

    def copy(self, template: Template, base: Base, name: str, *, own: Path | None = None) -> Instance:
        """Start a copy-on-write copy of ``template``; its writes are discarded.

        Args:
            template: What to copy.
            base: What it was made from.
            name: The machine's name.
            own: A folder for full copies of memory and disk, so that :meth:`keep` can freeze the machine;
                they take a few tenths of a second more.

        Raises:
            BootError: The hypervisor could not continue it.
        """
        scratch = Disk(template.scratch, ephemeral=True)
        try:
            if own is not None:
                copy_sparse(template.ram, own / "ram")
                copy_sparse(template.scratch, own / "scratch")
                launch = self._launch(base, own, share=True, state=template.state, name=name)
            else:
                launch = self._launch(
                    base, template.folder, scratch, ram=template.ram, state=template.state, name=name
                )
            return Instance(self._hypervisor.start(launch, base.accelerator), base.accelerator.patience)
        except FileNotFoundError as error:
            raise BootError(
                f"the cache lost {error.filename} just now", resolution="run again: it is made again"
            ) from error

    def keep(self, instance: Instance, base: Base, key: str, own: Path, facts: dict[str, Any]) -> None:
        """Freeze a machine that was copied with an ``own`` folder, as the template ``key``; the machine ends.

        Raises:
            MachineError: It could not be saved.
        """
        resources = {
            "cpus": base.resources.cpus,
            "memory": base.resources.memory,
            "disk": base.resources.disk,
            "nested": base.resources.nested,
        }
        meta = {"kind": KEPT, "image": base.image.name, "image_digest": base.image.digest, **resources}
        self._freeze(instance, key, own, {**meta, **facts}, {})

    def checkpoint(self, instance: Instance, key: str, own: Path) -> UnpublishedTemplate:
        """Copy the present state of a machine that was copied with an ``own`` folder; it runs on.

        Raises:
            MachineError: The state cannot be saved.
            HostError: The disk is full.
        """
        draft = self._store.new_draft()
        try:
            with explained(draft):
                _copy_state(instance, own, draft)
        except BaseException:
            self._store.drop(draft)
            raise
        return UnpublishedTemplate(key, draft, self._store.drop)

    def _found(self, key: str, steps: Sequence[TemplateStep]) -> Template | None:
        """Return a template from the store; if it is missing, fetch it into the store if possible."""
        found = self._store.open(key)
        if found is None and steps and self._elsewhere(key):
            found = self._store.open(key)
        return found

    def _done(
        self, base: Base, steps: Sequence[TemplateStep], stack: ExitStack
    ) -> tuple[_InTheMaking, dict[str, bytes]]:
        """Return a machine that has just run ``steps``, and the result of the last one.

        It continues from the longest cached part of the chain. Each link made on the way is published while
        the machine runs on, which saves the next link a start, and QEMU its translations.
        """
        if not steps:
            return self._booted(base, stack), {}
        machine = self._before(base, steps, stack)
        self._say(_title(base, steps))
        return machine, steps[-1].work(machine.instance)

    def _before(self, base: Base, steps: Sequence[TemplateStep], stack: ExitStack) -> _InTheMaking:
        """Return a machine that has run all ``steps`` but the last."""
        parents = steps[:-1]
        key = self.key(base, parents)
        found = self._store.open(key)
        if found is None:
            with self._alone(key, _title(base, parents)):
                found = self._found(key, parents)
                if found is None:
                    with ExitStack() as making:
                        machine, made = self._done(base, parents, making)
                        self._publish_copy(machine, key, self._meta(base, parents), made)
                        if not machine.instance.granted:
                            stack.push(making.pop_all())
                            self._watch(machine, base)
                            return machine
                    found = self._store.open(key)  # the grants of one link are not for the next one
        if found is None:
            raise BootError("a template vanished as soon as it was made", resolution="run it again")
        with found:
            machine = self._continued(found, base, stack)
        self._watch(machine, base)
        return machine

    def _booted(self, base: Base, stack: ExitStack) -> _InTheMaking:
        for attempt in range(1, _BOOT_TRIES + 1):
            self._say(_title(base, ()) + (" again" if attempt > 1 else ""))
            with ExitStack() as on_failure:
                draft = self._new_draft(base, on_failure)
                initramfs = draft / "initramfs"
                initramfs.write_bytes(base.image.initramfs.read_bytes() + self._guest_code)
                format_scratch(draft / "scratch", base.resources.disk + _disk_slack(base.resources.disk))
                launch = self._launch(base, draft, share=True, initramfs=initramfs)
                machine = self._started(launch, base, draft, on_failure)
                try:
                    _await_hello(machine.instance)
                except BootError:
                    if attempt == _BOOT_TRIES:
                        raise
                    continue
                initramfs.unlink()
                _warm_up(machine.instance)
                stack.push(on_failure.pop_all())
                return machine
        raise AssertionError("the last try returns or raises")

    def _continued(self, parent: Template, base: Base, stack: ExitStack) -> _InTheMaking:
        """Return a machine that continues from ``parent``, with its own files."""
        draft = self._new_draft(base, stack)
        copy_sparse(parent.ram, draft / "ram")
        copy_sparse(parent.scratch, draft / "scratch")
        return self._started(self._launch(base, draft, share=True, state=parent.state), base, draft, stack)

    def _new_draft(self, base: Base, stack: ExitStack) -> Path:
        stack.enter_context(self._room(base))
        return stack.enter_context(self._store.draft())

    def _started(self, launch: Launch, base: Base, draft: Path, stack: ExitStack) -> _InTheMaking:
        instance = Instance(self._hypervisor.start(launch, base.accelerator), base.accelerator.patience)
        stack.callback(instance.close)
        return _InTheMaking(instance, draft)

    def _watch(self, machine: _InTheMaking, base: Base) -> None:
        if machine.instance.guard is None:
            machine.instance.watch(replace(base.limits, timeout=None, cpu_seconds=None, lifetime=None))

    def _meta(self, base: Base, steps: Sequence[TemplateStep]) -> dict[str, Any]:
        if not steps:
            return {"kind": "boot", "image": base.image.name}
        return {"kind": steps[-1].kind, "image": base.image.name, "parent": self.key(base, steps[:-1])}

    def _publish_copy(
        self, machine: _InTheMaking, key: str, meta: dict[str, Any], made: dict[str, bytes]
    ) -> None:
        """Publish the present state of a machine as the template ``key``, and let it run on."""
        with self._store.draft() as copy:
            _copy_state(machine.instance, machine.draft, copy)
            self._publish(key, copy, meta, made)

    def _freeze(
        self, instance: Instance, key: str, draft: Path, meta: dict[str, Any], made: dict[str, bytes]
    ) -> None:
        """Publish a machine with its own files as the template ``key``; the machine ends."""
        instance.checkpoint(draft / "state")
        instance.close()  # its RAM file is complete only after the last write to it
        self._publish(key, draft, meta, made)

    def _publish(self, key: str, draft: Path, meta: dict[str, Any], made: dict[str, bytes]) -> None:
        for name, content in made.items():
            (draft / name).write_bytes(content)
        self._store.publish(key, draft, meta)

    def _launch(
        self,
        base: Base,
        folder: Path,
        scratch: Disk | None = None,
        *,
        ram: Path | None = None,
        share: bool = False,
        state: Path | None = None,
        initramfs: Path | None = None,
        name: str = "microvm-template",
    ) -> Launch:
        return Launch(
            architecture=base.image.architecture,
            kernel=base.image.kernel,
            initramfs=initramfs or base.image.initramfs,
            cpus=base.resources.cpus,
            memory=base.resources.memory,
            ram=ram or folder / "ram",
            share=share,
            disks=(
                Disk(base.image.rootfs, readonly=True),
                Disk(base.image.runtime, readonly=True),
                scratch or Disk(folder / "scratch"),
                *(Disk(layer, readonly=True) for layer in base.image.layers),
            ),
            state=state,
            name=name,
            throttle=base.limits.throttle,
            cpu_seconds=None if share else base.limits.cpu_seconds,
            nested=base.resources.nested,
        )

    @contextlib.contextmanager
    def _alone(self, key: str, title: str) -> Iterator[None]:
        """Hold the lock for making ``key``, against other processes and threads."""
        lock = FileLock(self._store.locks / key)
        with explained(self._store.folder):
            self._store.locks.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0.5)
            except Timeout:
                self._say(f"waiting for another run: {title}")
                lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _copy_state(instance: Instance, own: Path, folder: Path) -> None:
    """Copy a running machine's state, memory and disk to ``folder``; it stands still meanwhile."""
    instance.checkpoint(folder / "state")
    copy_sparse(own / "ram", folder / "ram")
    copy_sparse(own / "scratch", folder / "scratch")
    instance.resume()


def guest_code_archive(files: Iterable[tuple[str, bytes]]) -> bytes:
    """Return the initramfs segment with the agent's code: ``(path, content)`` below ``/guest-code``."""
    entries = [CpioEntry.directory("guest-code")]
    folders = set()
    for path, content in sorted(files):
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            folder = "/".join(parts[:depth])
            if folder not in folders:
                folders.add(folder)
                entries.append(CpioEntry.directory(f"guest-code/{folder}"))
        entries.append(CpioEntry.file(f"guest-code/{path}", content))
    return cpio_archive(entries)


def _await_hello(instance: Instance) -> None:
    """Wait for the agent's hello; raise an error if the boot fails or takes too long."""
    try:
        instance.link("agent").wait_hello(instance.boot_timeout)
    except TimeoutError as error:
        used = instance.usage().cpu_seconds
        within = f"within {instance.boot_timeout:.0f} s"
        raise instance.boot_error(
            f"no hello from the machine {within} (it used {used:.0f} s of CPU time)"
        ) from error
    except MachineCrashed as error:
        reason = instance.end_error("template").brief.partition(": ")[2]
        raise instance.boot_error(f"the machine ended while it booted: {reason}") from error


def _warm_up(instance: Instance) -> None:
    """Run the first requests of every copy once, so that the agent's code and data are in memory."""
    instance.adopt("agent", IN_THE_MAKING)
    link = instance.link("agent")
    for _ in range(2):
        request = command_arguments(["true"], {}, None, None)
        try:
            process = GuestProcess(
                UnlimitedClient(link), ["true"], request, stdin=False, text=False, pty=None
            )
        except FileNotFoundError:  # a container image may have no programs
            link.call("path", timeout=instance.boot_timeout, do="stat", path="/")
            continue
        with process:
            process.communicate(timeout=instance.boot_timeout)


def _title(base: Base, steps: Sequence[TemplateStep]) -> str:
    """Return the progress message for making a link."""
    return (steps[-1].title or steps[-1].kind) if steps else f"booting {base.image.name}"


def _disk_slack(quota: int) -> int:
    """Return the bytes that a disk has beyond its quota, so that an excess shows before the disk is full."""
    return quota // 4 + _LEAST_SLACK


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
