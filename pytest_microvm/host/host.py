"""The composition root: combines images, hypervisor and templates, and alone chooses implementations."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from pytest_microvm.agent.users import GuestUser, give
from pytest_microvm.errors import ImageError
from pytest_microvm.git.repository import find_checkout
from pytest_microvm.host.held_templates import HeldTemplates
from pytest_microvm.host.kept import KeptMachine, kept_machines, open_kept
from pytest_microvm.host.services import with_services
from pytest_microvm.host.set_up import run_set_up, set_up_base, set_up_grants
from pytest_microvm.host.starting import MachineStarter, StartedCopy
from pytest_microvm.hypervisors import Accelerator, Launch
from pytest_microvm.hypervisors.nesting import check_nesting
from pytest_microvm.hypervisors.qemu.hypervisor import Qemu
from pytest_microvm.images.locked import LockedImages, LockUse
from pytest_microvm.images.mirror.environment import running_environment
from pytest_microvm.images.store import ImageStore, cache_root
from pytest_microvm.machine.grants import Grants, resolve
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.network.policy.rules import Policy, parse_rules
from pytest_microvm.programs.needed import require
from pytest_microvm.settings.options import QUOTAS
from pytest_microvm.settings.secret_values import FOLDER as SECRETS
from pytest_microvm.settings.spec import Limits, MachineSpec, Resources, parse_size
from pytest_microvm.templates.budget import HostBudget, default_limits
from pytest_microvm.templates.chain import Base, Chain, TemplateStep, guest_code_archive
from pytest_microvm.templates.pool import Pool
from pytest_microvm.templates.runtime_folder import runtime_folder
from pytest_microvm.templates.store import Template, TemplateStore
from pytest_microvm.untrusted.nofollow import refuse_links

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_microvm.images import Image
    from pytest_microvm.images.mirror.environment import PythonEnvironment
    from pytest_microvm.images.set_up import SetUp
    from pytest_microvm.templates.unpublished import UnpublishedTemplate

CACHE_SIZE_VARIABLE = "PYTEST_MICROVM_CACHE_SIZE"
_DEFAULT_CACHE_SIZE = 10 * 1024**3
_RETRIES = 2
_PACKAGE = Path(__file__).parents[1]
_log = logging.getLogger("pytest_microvm")  # of machines that are started without pytest


def _silent(_line: str) -> None:
    """Discard a line."""


class Host:
    """This computer: images, hypervisor, templates and budget.

    Args:
        cache: The cache folder; see :func:`pytest_microvm.images.store.cache_root`.
        project: The user's project, which may have kits of its own.
        checkout: The folder of which commands that supply secrets may use nothing; ``None``: the project.
        require_accel: The only accelerator to accept.
        timeout: Seconds that a test or command may take if neither spec nor kit sets a timeout.
        retries: How often to replace a machine that does not wake up.
        say: Called with a line about work that takes long.
        environment: Returns the environment that machines with ``python = "host"`` mirror; default: the one
            that runs this process.
        lock: What the project's ``microvm.lock`` is for.
        elsewhere: Fetches a missing template into the store if possible; returns whether it did.
        mode: mmdebstrap's mode when images are built; ``None``: the one available to this user.
    """

    def __init__(
        self,
        *,
        cache: Path | None = None,
        project: Path | None = None,
        checkout: Path | None = None,
        require_accel: str | None = None,
        timeout: float | None = None,
        retries: int = _RETRIES,
        say: Callable[[str], None] = _silent,
        environment: Callable[[], PythonEnvironment] = running_environment,
        lock: LockUse = "follow",
        elsewhere: Callable[[str, TemplateStore], bool] = lambda _key, _store: False,
        mode: str | None = None,
    ) -> None:
        self.cache = cache or cache_root()
        self.say = say
        self._environment = environment
        self._lock_use: LockUse = lock
        self._elsewhere = elsewhere
        self._project = project
        self._checkout = checkout or project
        self._require_accel = require_accel
        self._timeout = timeout
        self._mode = mode
        self._told: set[str] = set()
        self._hypervisors: dict[str, Qemu] = {}
        self._bases: dict[MachineSpec, Base] = {}
        self._held = HeldTemplates(lambda: self.templates, self._chain, self._get)
        self._starter = MachineStarter(
            lambda: self.budget,
            lambda: self.templates,
            self._chain,
            self._sound,
            say=say,
            warn=self._tell_once,
            retries=retries,
        )
        self._lock = threading.RLock()
        self._pid = os.getpid()

    @cached_property
    def images(self) -> ImageStore:
        """The image store."""
        return ImageStore(self.cache, mode=self._mode, set_up=self._set_up)

    @cached_property
    def locked(self) -> LockedImages:
        """The images, as the project's lock pins them."""
        return LockedImages(self.images, self._project, self._lock_use)

    @cached_property
    def templates(self) -> TemplateStore:
        """The template store."""
        size = os.environ.get(CACHE_SIZE_VARIABLE)
        return TemplateStore(
            self.cache, parse_size(size, CACHE_SIZE_VARIABLE) if size else _DEFAULT_CACHE_SIZE, self.say
        )

    @cached_property
    def budget(self) -> HostBudget:
        """The limit on the machines that run at the same time on this host."""
        return HostBudget(runtime_folder(), *default_limits())

    def hypervisor(self, architecture: str) -> Qemu:
        """Return the hypervisor for guests of ``architecture``; created once, as it caches its version."""
        with self._lock:
            if architecture not in self._hypervisors:
                self._hypervisors[architecture] = Qemu(architecture, self.cache)
            return self._hypervisors[architecture]

    def accelerator(self, image: Image) -> Accelerator:
        """Return the accelerator for ``image`` on this host, probed at first use.

        Raises:
            HostError: There is no hypervisor, or the required accelerator does not work.
        """
        launch = Launch(
            image.architecture, image.kernel, image.initramfs, 1, 0, self.cache, share=False, disks=()
        )
        return self.hypervisor(image.architecture).accelerator(launch, self._require_accel, self.say)

    def base(self, spec: MachineSpec) -> Base:
        """Return the base of ``spec``: its image (built if missing), its resources, the accelerator.

        Raises:
            UsageError: A mount is reached through a link of the project.
            KitError: There is no such image.
            HostError: This computer lacks something.
        """
        with self._lock:
            if spec not in self._bases:
                if self._project is not None:
                    for mount in spec.mounts:
                        refuse_links(self._project, mount.source)
                require("machines")  # before an image is built, which takes minutes
                image = self.image(spec)
                limits = _limits(spec, image, self._timeout)
                resources = Resources(
                    limits.vcpus, limits.memory, limits.disk, image.environment, nested=spec.nested
                )
                grants = self.grants(spec, image)
                accelerator = self.accelerator(image)
                if spec.nested and (warning := check_nesting(image.architecture, accelerator)):
                    self._tell(warning)
                self._bases[spec] = Base(image, resources, accelerator, limits, grants)
            return self._bases[spec]

    def image(self, spec: MachineSpec) -> Image:
        """Return the image of ``spec``, built if missing, with this computer's environment if it says so.

        Raises:
            KitError: There is no such image.
            LockError: It is not the one that the project's lock pins.
            UsageError: The environment cannot be mirrored, or the lock is invalid.
            HostError: This computer lacks something.
        """
        image = self.locked.get(spec.image, progress=self.say)
        if spec.python != "host":
            return image
        environment = self._environment()
        checkout = None if self._project is None else find_checkout(self._project)
        without = self._project if checkout is None else checkout.top
        return self.images.mirrored(image, environment, without=without, progress=self.say)

    def grants(self, spec: MachineSpec, image: Image) -> Grants:
        """Return the grants of machines of ``spec``, with secrets and credentials read now.

        Raises:
            UsageError: A rule, a secret or a credential cannot be used.
        """
        kits = spec.network is None
        rules = image.network if spec.network is None else spec.network
        if "all" in rules:
            self._tell_once(["WARNING: network = all: these machines may reach every public address"])
        where = f"kit {image.name}: network" if kits else "network"
        project = self._project or Path.cwd()
        return resolve(
            spec,
            rules,
            where,
            project=project,
            own=self._checkout,
            file_systems=image.file_systems,
            say=self._tell,
        )

    def policy(self, rules: Sequence[str], image: Image) -> Policy:
        """Return the network policy of ``rules`` on this computer.

        Raises:
            UsageError: One of them is not a valid rule.
        """
        from pytest_microvm.network.policy.presets import preset_rules  # noqa: PLC0415 - asks the tools: seconds

        return parse_rules(rules, "network", preset_rules(self._project or Path.cwd(), image.file_systems))

    def template(self, base: Base, steps: Sequence[TemplateStep] = ()) -> Template:
        """Return the template that ``steps`` lead to, made if missing; held open until the host is closed."""
        return self._held.make(base, with_services(base, steps))

    def cached(self, base: Base, steps: Sequence[TemplateStep] = ()) -> Template | None:
        """Return the template that ``steps`` lead to, if available; held open until the host is closed."""
        return self._held.find(base, with_services(base, steps))

    def try_machine(self, template: Template, base: Base) -> MicroVM | None:
        """Start a copy of ``template`` with its limits, or return ``None`` if there is no room for it now."""
        machine = self._starter.try_machine(template, base)
        if machine is not None:
            machine.instance.watch(base.limits)
        return machine

    def copy(self, template: Template, base: Base, port: str, *, keepable: bool = False) -> StartedCopy:
        """Start a copy of ``template`` with an identity of its own, once the host budget has room for it.

        Args:
            template: What to copy.
            base: What it was made from.
            port: The port that gives it its identity: ``agent`` or ``runner``.
            keepable: Whether to allow :meth:`keep`, which makes the start slower.

        Raises:
            BootError: Neither it nor its replacements woke up.
            BudgetExhausted: There can never be room for it.
        """
        return self._starter.copy(template, base, port, keepable=keepable)

    def try_copy(
        self, template: Template, base: Base, port: str, *, keepable: bool = False
    ) -> StartedCopy | None:
        """Start a copy like :meth:`copy`, or return ``None`` if the host budget has no room for it now."""
        return self._starter.try_copy(template, base, port, keepable=keepable)

    def release(self, copied: StartedCopy) -> None:
        """Return a copy's place to the host budget, and remove its own folder."""
        self._starter.release(copied)

    def keep(self, copied: StartedCopy, about: str) -> KeptMachine:
        """Freeze a keepable copy on disk, to be entered later; the machine ends.

        Args:
            copied: The machine.
            about: What it was used for.

        Raises:
            MachineError: It could not be saved.
        """
        return self._starter.keep(copied, about)

    def checkpoint(self, copied: StartedCopy) -> UnpublishedTemplate:
        """Copy the present state of a keepable copy, which runs on, as a template for this process only.

        Raises:
            MachineError: The state cannot be saved.
            HostError: The disk is full.
        """
        return self._starter.checkpoint(copied)

    def spare(self, copied: StartedCopy, end: Callable[[], None]) -> None:
        """Allow a machine to be ended when the host budget has no room for another one of this process.

        Args:
            copied: The machine.
            end: Ends and releases it.
        """
        self._starter.spare(copied, end)

    def kept(self) -> list[KeptMachine]:
        """Return the kept machines, the newest first."""
        return kept_machines(self.templates)

    def enter(self, kept: str) -> MicroVM:
        """Start a copy of a kept machine, in its frozen state.

        Raises:
            UsageError: There is no kept machine with that id.
        """
        template = self._held.hold(open_kept(self.templates, kept))
        meta = template.meta
        image = self.images.inspect(meta["image_digest"]).image
        nested = meta.get("nested", True)  # without this fact it was kept by a version whose CPUs all were
        resources = Resources(meta["cpus"], meta["memory"], meta["disk"], image.environment, nested=nested)
        limits = Limits(resources.cpus, resources.memory, resources.disk)
        base = Base(image, resources, self.accelerator(image), limits)
        machine = self._starter.machine(template, base)
        machine.instance.watch(limits)
        return machine

    def start(
        self,
        spec: MachineSpec | None = None,
        *,
        pool: int = 0,
        keepable: bool = False,
        checkpoints: bool = False,
        steps: Callable[[Base], Sequence[TemplateStep]] = lambda _base: (),
        owner: Callable[[MicroVM], GuestUser | None] = lambda _machine: None,
        **changes: Any,
    ) -> MicroVM:
        """Start a machine; see :meth:`pytest_microvm.machine.microvm.MicroVM.start`.

        Args:
            spec: Its specification.
            pool: How many more of the same kind to keep ready from now on.
            keepable: Whether to allow :meth:`MicroVM.keep`, which makes the start slower.
            checkpoints: Whether to allow :meth:`MicroVM.checkpoint`, likewise.
            steps: Returns the steps that run once, in the template that the machine is a copy of.
            owner: Called with the machine before it gets its mounts; returns the user to whom they and the
                files of secrets belong, ``None``: root.
            **changes: Fields of the spec, in the form that users write.
        """
        spec = (spec or MachineSpec()).with_changes(changes, "MicroVM.start()")
        base = self.base(spec)
        template = self.template(base, steps(base))
        own = keepable or (checkpoints and not base.grants.secrets and not spec.mounts)
        machine = self._starter.pooled(template, base, pool) if pool and not own else None
        if machine is None:
            machine = self._starter.machine(template, base, keepable=own)
        machine.instance.watch(base.limits)
        try:
            whose = owner(machine)
            if whose is not None and machine.instance.given.files:
                give(machine.client, PurePosixPath(SECRETS), whose)
            for mount in spec.mounts:
                machine.hand_over(mount if whose is None else replace(mount, owner=whose.numbers))
        except BaseException:
            machine.mounts.clear()  # nothing is to be copied back
            machine.close()
            raise
        return machine

    def pool(self, key: tuple[str, str], make: Callable[[], Pool[Any]]) -> Pool[Any]:
        """Return the pool called ``key``, created at first use and closed with the host."""
        return self._starter.pool(key, make)

    def close_pool(self, key: tuple[str, str]) -> None:
        """Close the pool called ``key``, if there is one."""
        self._starter.close_pool(key)

    def wait_ready(self) -> None:
        """Wait until every pool is full, or has found no room."""
        self._starter.wait_ready()

    def close(self) -> None:
        """End every machine and release the templates for removal.

        That includes machines that were not ended because of an interrupt (a Ctrl-C can come anywhere).
        """
        if os.getpid() != self._pid:
            return  # a fork of the process that owns the machines
        self._starter.close()
        self._held.close()

    def _sound(self, template: Template, base: Base) -> Template:
        """Return ``template``, or its replacement if the template or its image was changed or removed.

        Raises:
            ImageError: The image had to be built again and is another one now.
            HostError: It cannot be made again.
        """
        if not self.images.intact(base.image):
            with self._lock:
                if not self.images.intact(base.image):
                    self._build_again(base)
        return self._held.intact(template, base)

    def _build_again(self, base: Base) -> None:
        """Rebuild the image of ``base``, whose files are damaged or missing."""
        name = next((spec.image for spec, known in self._bases.items() if known == base), base.image.name)
        image = self.locked.get(name, progress=self.say)
        if image.digest != base.image.digest:
            raise ImageError(
                f"image {image.name} was damaged or removed, and is another one since it was built again",
                resolution="run again",
            )

    def _tell(self, line: str) -> None:
        self._tell_once([line])

    def _tell_once(self, lines: Sequence[str]) -> None:
        """Report each line once."""
        with self._lock:
            new = [line for line in lines if line not in self._told]
            self._told.update(new)
        for line in new:
            (_log.warning if self.say == _log.info else self.say)(line)

    def _set_up(self, set_up: SetUp, archive: IO[bytes], tell: Callable[[str], None]) -> None:
        """Run the set-up of a kit in a machine; see :data:`pytest_microvm.images.set_up.RunSetUp`."""
        require("machines")
        grants = set_up_grants(set_up, self._project or Path.cwd(), self._tell)
        base = set_up_base(set_up, self.accelerator(set_up.image), grants)
        with self._starter.machine(self.template(base), base) as machine:
            machine.instance.watch(base.limits)
            run_set_up(machine, set_up, archive, tell)

    def _chain(self, base: Base) -> Chain:
        hypervisor = self.hypervisor(base.image.architecture)
        room = self._starter.room
        return Chain(hypervisor, self.templates, guest_code(), self.say, room, elsewhere=self._get)

    def _get(self, key: str) -> bool:
        return self._elsewhere(key, self.templates)


def _limits(spec: MachineSpec, image: Image, timeout: float | None) -> Limits:
    """Return the limits of a machine: from the spec, else from the image's kit, else the defaults."""
    given = {o.name: getattr(spec, o.name) for o in QUOTAS if getattr(spec, o.name) is not None}
    return Limits(**{"timeout": timeout, **image.resources, **given})


@cache
def guest_code() -> bytes:
    """Return this package's own files for the guest as an initramfs segment."""
    files = [("pytest_microvm/__init__.py", b"")]
    for part in ("wire", "guest"):
        modules = (_PACKAGE / part).glob("*.py")
        files += [(f"pytest_microvm/{part}/{path.name}", path.read_bytes()) for path in modules]
    return guest_code_archive(files)


_default: Host | None = None


def default_host() -> Host:
    """Return the host that :meth:`MicroVM.start` uses, made at first use and closed when Python ends."""
    global _default  # noqa: PLW0603 - one per process
    if _default is None:
        _default = Host(say=_log.info)
        atexit.register(_default.close)
    return _default


MicroVM.started_by(lambda: default_host().start)
