"""QEMU on this computer: its program, its build, its accelerator."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.errors import BootError
from pytest_microvm.hypervisors import Accelerator, Launch
from pytest_microvm.hypervisors.cgroups import find_cgroups
from pytest_microvm.hypervisors.containment import Wall, find_walls
from pytest_microvm.hypervisors.probe import Verdict, check_required, probe
from pytest_microvm.hypervisors.qemu.command import PROGRAMS, SANDBOX
from pytest_microvm.hypervisors.qemu.process import QemuProcess
from pytest_microvm.hypervisors.qemu.starting import accelerator_devices, start_qemu
from pytest_microvm.hypervisors.trial import BootLimits, Trial, watch
from pytest_microvm.hypervisors.tsc import measure_tsc_khz
from pytest_microvm.programs.needed import require_program

if TYPE_CHECKING:
    from collections.abc import Callable

_READONLY_RAM = (8, 2)
_PROBE_MEMORY = 128 * 1024**2
_USUAL_BOOT = 3.0  # seconds that the probe's guest takes under emulation, for which all timeouts are made


class Qemu:
    """QEMU for guests of one architecture (a :class:`pytest_microvm.hypervisors.Hypervisor`).

    Args:
        architecture: ``x86_64`` or ``aarch64``.
        memory: The folder that caches the probe's verdict.

    Raises:
        HypervisorMissing: QEMU is not installed.
    """

    name = "qemu"

    def __init__(self, architecture: str, memory: Path) -> None:
        self._architecture = architecture
        self._memory = memory / "accelerator.json"
        self.program = str(Path(require_program(PROGRAMS[architecture])).resolve())

    @cached_property
    def version(self) -> str:
        """The version that the program reports, such as ``7.2.22``."""
        done = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=True)
        return done.stdout.split("version ", 1)[-1].split()[0]

    @cached_property
    def build(self) -> str:
        """An identifier of the build: the program's path, size and modification time."""
        found = Path(self.program).stat()
        return f"{self.program} {found.st_size} {found.st_mtime_ns}"

    def accelerator(
        self, launch: Launch, required: str | None = None, say: Callable[[str], None] = lambda _line: None
    ) -> Accelerator:
        """Return the accelerator that runs ``launch``'s kernel here.

        Args:
            launch: The VM to run; the probe boots its kernel and initramfs.
            required: The only accelerator to accept.
            say: Called with a line when probing starts.

        Raises:
            HostError: ``required`` does not work here.
        """

        def boot(candidate: str) -> Trial:
            say(f"trying whether {candidate} works here (a few seconds, once)")
            return self.boot_tiny(launch, self._accelerator(Verdict(candidate, "")), say)

        verdict = probe(boot, self.build, self._memory, self._architecture)
        check_required(required, verdict)
        return self._accelerator(verdict)

    def fingerprint(self, accelerator: Accelerator) -> tuple[str, ...]:
        """Return the host facts in a template's key: only the same build on the same CPU can continue it."""
        return (
            self.name, self.build, self.version, accelerator.name, accelerator.machine,
            str(accelerator.tsc_khz is not None), platform.machine(), _cpu_digest(),
        )  # fmt: skip

    def start(self, launch: Launch, accelerator: Accelerator) -> QemuProcess:
        """Start a VM.

        Raises:
            BootError: QEMU did not start.
        """
        return start_qemu(self.program, launch, accelerator, readonly_ram=self._copies_readonly_ram)

    def boot_tiny(
        self,
        launch: Launch,
        accelerator: Accelerator,
        say: Callable[[str], None],
        limits: BootLimits = BootLimits(),  # noqa: B008 - immutable
    ) -> Trial:
        """Boot ``launch``'s kernel and initramfs in a tiny guest without disks, and end it.

        Args:
            launch: The VM whose kernel and initramfs to boot.
            accelerator: What to boot it with.
            say: Called with progress if the boot takes long.
            limits: How long to wait.
        """
        with tempfile.TemporaryDirectory(prefix="microvm-probe-") as folder:
            tiny = Launch(
                architecture=launch.architecture,
                kernel=launch.kernel,
                initramfs=launch.initramfs,
                cpus=1,
                memory=_PROBE_MEMORY,
                ram=Path(folder) / "ram",
                share=False,
                disks=(),
                words=("microvm.probe=1",),
                loud=True,
                name="microvm-probe",
            )
            try:
                process = start_qemu(self.program, tiny, accelerator)
            except BootError as error:
                return Trial("died", 0.0, error.brief)
            try:
                return watch(process.sockets["console"], limits, say)
            finally:
                process.kill()
                for sock in process.sockets.values():
                    sock.close()

    def walls(self, accelerator: Accelerator | None) -> tuple[Wall, ...]:
        """Return the status of each containment layer on this host.

        Args:
            accelerator: The accelerator in use here; ``None`` if it is not known yet.

        Raises:
            HostError: A program that a layer needs is missing.
        """
        devices = accelerator_devices(accelerator) if accelerator is not None else []
        return (
            *find_walls(self.program).told(devices),
            Wall("seccomp", True, SANDBOX.partition(",")[0]),
            find_cgroups().told(),
        )

    def _accelerator(self, verdict: Verdict) -> Accelerator:
        patience = max(1.0, verdict.boot_seconds / _USUAL_BOOT)
        if self._architecture == "aarch64":
            return Accelerator(verdict.name, verdict.reason, "virt", patience=patience)
        if verdict.name == "kvm":
            return Accelerator(verdict.name, verdict.reason, "microvm", patience=patience)
        khz = self._tsc_khz
        # Under TCG the microvm machine type needs the counter's rate as a parameter; q35 calibrates it well.
        return Accelerator(verdict.name, verdict.reason, "microvm" if khz else "q35", khz)

    @cached_property
    def _copies_readonly_ram(self) -> bool:
        """True if QEMU can map RAM privately from a file that it may only read (new in 8.2)."""
        numbers = tuple(int(part) for part in self.version.split(".")[:2] if part.isdecimal())
        return numbers >= _READONLY_RAM

    @cached_property
    def _tsc_khz(self) -> int | None:
        return measure_tsc_khz()


def _cpu_digest() -> str:
    """Return an identifier of the host's CPU model and features."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")
    first = cpuinfo.read_text().split("\n\n", 1)[0].splitlines()
    lines = [line for line in first if line.split("\t")[0].strip() in wanted]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
