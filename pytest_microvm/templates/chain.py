"""Template chains: boot, then what its user wants in it, link after link; each made once and cached.

A link's key is the digest of its parent's key and of everything its step depends on. To make it, the
parent's memory and disk are copied, the machine runs on from there, the step works in it, and it is
frozen again. Two runs that need the same link wait for one another; a crash leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from pytest_microvm.disk import explained
from pytest_microvm.errors import BootError, MachineCrashed
from pytest_microvm.grants import NO_GRANTS, Grants
from pytest_microvm.hypervisors import Accelerator, Disk, Hypervisor, Launch
from pytest_microvm.images.cpio import CpioEntry, cpio_archive
from pytest_microvm.instance import BOOT_TIMEOUT, Instance
from pytest_microvm.process import GuestProcess, command_arguments
from pytest_microvm.templates.files import copy_sparse, format_scratch
from pytest_microvm.templates.store import KEPT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from pytest_microvm.images import Image
    from pytest_microvm.spec import Limits, Resources
    from pytest_microvm.templates.store import Template, TemplateStore

FORMAT = 2
"""Part of every key; raise it when templates made before can no longer be used."""

IN_THE_MAKING = {"hostname": "template", "machine_id": "0" * 32}
"""The identity of a machine that becomes a template; its copies get one each."""

_BOOT_TRIES = 2
_LEAST_SLACK = 256 * 1024**2  # more than a machine writes between two looks at it


@dataclass(frozen=True)
class Step:
    """One link after the boot.

    Args:
        kind: What it is called in lists: ``prepared``, ``started``, ``workspace``, ``collected``.
        inputs: Everything it depends on besides its parent.
        work: Does it in a machine; what it returns is kept beside the template, name by name.
        title: What is said while it is made.
    """

    kind: str
    inputs: tuple[str, ...]
    work: Callable[[Instance], dict[str, bytes]] = field(compare=False)
    title: str = ""


@dataclass(frozen=True)
class Base:
    """What the chain begins with: an image on given resources, run by a given accelerator.

    ``limits`` and ``grants`` shape no template: they are for the machines that come of it.
    """

    image: Image
    resources: Resources
    accelerator: Accelerator
    limits: Limits
    grants: Grants = NO_GRANTS


class Chain:
    """Makes, finds and copies templates.

    Args:
        hypervisor: What runs the machines.
        store: Where templates are kept.
        guest_code: The package's own files for the guest (see :func:`guest_code_archive`).
        say: Told what is being made.
        room: Holds a place in the host budget for the machine in which a template is made.
        elsewhere: Gets a template that is missing into the store, if it can; tells whether it did.
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

    def key(self, base: Base, steps: Sequence[Step] = ()) -> str:
        """Return the key of the template that ``steps`` lead to."""
        launch = self._launch(base, self._store.folder)
        key = _digest(
            str(FORMAT),
            base.image.digest,
            hashlib.sha256(self._guest_code).hexdigest(),
            str(launch.cpus),
            str(launch.memory),
            str(base.resources.disk),
            *launch.words,
            *self._hypervisor.fingerprint(base.accelerator),
        )
        for step in steps:
            key = _digest(key, step.kind, *step.inputs)
        return key

    def ensure(self, base: Base, steps: Sequence[Step] = ()) -> Template:
        """Return the template that ``steps`` lead to, held; what is missing of the chain is made.

        Raises:
            BootError: The machine did not come up, twice.
            MachineError: A step failed.
            HostError: This computer lacks something.
        """
        key = self.key(base, steps)
        found = self._store.open(key)
        if found is not None:
            return found
        title = steps[-1].title if steps else f"booting {base.image.name}"
        with self._alone(key, title):
            found = self._store.open(key)  # whoever held the lock may have made it
            if found is None and steps and self._elsewhere(key):
                found = self._store.open(key)
            if found is not None:
                return found
            if steps:
                with self.ensure(base, steps[:-1]) as parent:
                    self._extend(parent, base, steps[-1], key)
            else:
                self._boot(base, key)
        found = self._store.open(key)
        if found is None:
            raise BootError("a template vanished as soon as it was made", resolution="run it again")
        return found

    def copy(self, template: Template, base: Base, name: str, *, own: Path | None = None) -> Instance:
        """Start a copy-on-write copy of ``template``; nothing it writes is kept.

        Args:
            template: What to copy.
            base: What it was made from.
            name: The machine's name.
            own: A folder for memory and disk of its own, so that :meth:`keep` can freeze it: copied
                whole, which takes a few tenths of a second more.

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
            return Instance(self._hypervisor.start(launch, base.accelerator))
        except FileNotFoundError as error:
            raise BootError(
                f"the cache lost {error.filename} just now", resolution="run again: it is made again"
            ) from error

    def keep(self, instance: Instance, base: Base, key: str, own: Path, facts: dict[str, Any]) -> None:
        """Freeze a machine that was copied with folders of its own, as the template ``key``; it ends.

        Raises:
            MachineError: It could not be saved.
        """
        resources = {
            "cpus": base.resources.cpus,
            "memory": base.resources.memory,
            "disk": base.resources.disk,
        }
        meta = {"kind": KEPT, "image": base.image.name, "image_digest": base.image.digest, **resources}
        self._freeze(instance, key, own, {**meta, **facts})

    def _boot(self, base: Base, key: str) -> None:
        for attempt in range(1, _BOOT_TRIES + 1):
            self._say(f"booting {base.image.name}" + (" again" if attempt > 1 else ""))
            with self._room(base), self._store.draft() as draft:
                initramfs = draft / "initramfs"
                initramfs.write_bytes(base.image.initramfs.read_bytes() + self._guest_code)
                format_scratch(draft / "scratch", base.resources.disk + _disk_slack(base.resources.disk))
                launch = self._launch(base, draft, share=True, initramfs=initramfs)
                instance = Instance(self._hypervisor.start(launch, base.accelerator))
                try:
                    _await_hello(instance)
                except BootError:
                    if attempt == _BOOT_TRIES:
                        raise
                    continue
                else:
                    initramfs.unlink()
                    _warm_up(instance)
                    self._freeze(instance, key, draft, {"kind": "boot", "image": base.image.name})
                    return
                finally:
                    instance.close()

    def _extend(self, parent: Template, base: Base, step: Step, key: str) -> None:
        self._say(step.title or step.kind)
        with self._room(base), self._store.draft() as draft:
            copy_sparse(parent.ram, draft / "ram")
            copy_sparse(parent.scratch, draft / "scratch")
            launch = self._launch(base, draft, share=True, state=parent.state)
            instance = Instance(self._hypervisor.start(launch, base.accelerator))
            instance.watch(replace(base.limits, timeout=None, cpu_seconds=None, lifetime=None))
            try:
                attachments = step.work(instance)
                for name, content in attachments.items():
                    (draft / name).write_bytes(content)
                meta = {"kind": step.kind, "image": base.image.name, "parent": parent.key}
                self._freeze(instance, key, draft, meta)
            finally:
                instance.close()

    def _freeze(self, instance: Instance, key: str, draft: Path, meta: dict[str, Any]) -> None:
        instance.checkpoint(draft / "state")
        instance.close()  # its RAM file is only whole once nobody writes to it any more
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
            ),
            state=state,
            name=name,
            throttle=base.limits.throttle,
            cpu_seconds=None if share else base.limits.cpu_seconds,
        )

    @contextlib.contextmanager
    def _alone(self, key: str, title: str) -> Iterator[None]:
        """Make this the only process, and thread, that makes ``key``."""
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
    """Wait until the agent answers; the boot's watchdog."""
    try:
        instance.link("agent").wait_hello(BOOT_TIMEOUT)
    except TimeoutError as error:
        raise instance.boot_error(f"no hello from the machine within {BOOT_TIMEOUT:.0f} s") from error
    except MachineCrashed as error:
        reason = instance.end_error("template").brief.partition(": ")[2]
        raise instance.boot_error(f"the machine ended while it booted: {reason}") from error


def _warm_up(instance: Instance) -> None:
    """Let the agent do once what every copy does first, so that its code and data are in memory."""
    instance.adopt("agent", IN_THE_MAKING)
    link = instance.link("agent")
    for _ in range(2):
        request = command_arguments(["true"], {}, None, None)
        with GuestProcess(link, ["true"], request, stdin=False, text=False, pty=None) as process:
            process.communicate(timeout=BOOT_TIMEOUT)


def _disk_slack(quota: int) -> int:
    """Return how much larger than its quota a disk is: an excess must show before the disk is full."""
    return quota // 4 + _LEAST_SLACK


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
