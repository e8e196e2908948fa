"""``pytest-microvm doctor``: check this computer's requirements, and name the next step for each problem."""

from __future__ import annotations

import argparse
import grp
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytest_microvm.errors import HostError, MicroVMError
from pytest_microvm.host.host import Host
from pytest_microvm.hypervisors import Accelerator
from pytest_microvm.hypervisors.probe import KVM_DEVICE, UDEV_RULE
from pytest_microvm.hypervisors.qemu.hypervisor import Qemu
from pytest_microvm.images.kits import host_architecture
from pytest_microvm.programs.needed import require, require_program
from pytest_microvm.settings.spec import format_size

OK, WARN, FAIL = "ok", "warn", "fail"
_OLDEST_QEMU = (7, 2)
_GIB = 1024**3
_DISK_NEEDED = _GIB // 2
_DISK_WANTED = 4 * _GIB  # an image, its build and a few templates
_MEMORY_WANTED = _GIB
_GROUP_MAY = 0o060  # read and write
_BUILD_IMAGE = "pytest-microvm image build python"
_UDEV_FILE = "/etc/udev/rules.d/65-kvm.rules"
_DESCRIPTION = """Check what pytest-microvm needs: hypervisor, accelerator, rights, programs, disk, memory.
Each line is ok, warn (it works, but worse than it could) or fail (machines cannot run), with the next step.
The exit status is 1 if a check fails. Nothing is installed or built."""
_EXAMPLES = """examples:
  pytest-microvm doctor
  pytest-microvm doctor --json | jq -r .accelerator
"""


@dataclass(frozen=True)
class Check:
    """One line of the report: ``status`` is ok, warn or fail; ``fix`` is the next step, if one is needed."""

    name: str
    status: str
    detail: str
    fix: str = ""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb ``doctor``."""
    parser = subparsers.add_parser(
        "doctor",
        help="check what this computer offers",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    report = examine(Host(say=_tell))
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 1 if any(check["status"] == FAIL for check in report["checks"]) else 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def examine(host: Host) -> dict[str, Any]:
    """Run all checks and return the report, as ``--json`` prints it."""
    accelerator, finding = _accelerator(host)
    checks = [_guarded("hypervisor", _hypervisor, host), finding]
    checks += [_guarded(name, check, host) for name, check in _CHECKS.items()]
    qemu = _qemu(host)
    return {
        "version": version("pytest-microvm"),
        "accelerator": accelerator.name if accelerator else None,
        "reason": accelerator.reason if accelerator else finding.detail,
        "machine_type": accelerator.machine if accelerator else None,
        "hypervisor": f"{qemu.name} {qemu.version}" if qemu else None,
        "cache": str(host.cache),
        "checks": [asdict(check) for check in checks],
    }


def _guarded(name: str, check: Callable[[Host], Check], host: Host) -> Check:
    """Run a check; an error becomes its result."""
    try:
        return check(host)
    except MicroVMError as error:
        return Check(name, FAIL, error.brief, error.resolution)
    except OSError as error:
        return Check(name, FAIL, str(error), "see the error")


def _qemu(host: Host) -> Qemu | None:
    try:
        return host.hypervisor(host_architecture())
    except MicroVMError:
        return None


def _hypervisor(host: Host) -> Check:
    qemu = host.hypervisor(host_architecture())
    detail = f"QEMU {qemu.version}, {qemu.program}"
    numbers = tuple(int(part) for part in qemu.version.split(".")[:2] if part.isdecimal())
    if numbers < _OLDEST_QEMU:
        return Check("hypervisor", FAIL, f"{detail} is too old", "install QEMU 7.2 or newer")
    return Check("hypervisor", OK, detail)


def _accelerator(host: Host) -> tuple[Accelerator | None, Check]:
    """Return the accelerator, found by booting an image's kernel; ``None`` if it is unknown."""
    try:
        architecture = host_architecture()
        stored = [entry.image for entry in host.images.list() if entry.image.architecture == architecture]
        stored = [image for image in stored if image.kernel.is_file() and image.initramfs.is_file()]
        if not stored:
            return None, Check("accelerator", WARN, "not tried yet: build an image", _BUILD_IMAGE)
        found = host.accelerator(stored[0])
    except MicroVMError as error:
        return None, Check("accelerator", FAIL, error.brief, error.resolution)
    except OSError as error:
        return None, Check("accelerator", FAIL, str(error), "see the error")
    detail = f"{found.name}: {found.reason}"
    if found.name == "tcg":
        advice = (
            "machines work, but slower; see the check kvm, or use a computer with hardware virtualisation"
        )
        return found, Check("accelerator", WARN, detail, advice)
    return found, Check("accelerator", OK, detail)


def _kvm(_host: Host) -> Check:
    if sys.platform != "linux":
        return Check("kvm", OK, "not used on this system")
    if not KVM_DEVICE.exists():
        return Check(
            "kvm", WARN, f"there is no {KVM_DEVICE}",
            "switch virtualisation on in the firmware or the cloud's setup; then load kvm_intel (kvm_amd)",
        )  # fmt: skip
    found = KVM_DEVICE.stat()
    rights = f"{KVM_DEVICE}, group {_group(found.st_gid)}, mode {found.st_mode & 0o777:04o}"
    if os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return Check("kvm", OK, f"{rights}: this user may use it")
    return Check("kvm", WARN, f"{rights}: this user may not use it", kvm_fix(found.st_gid, found.st_mode))


def kvm_fix(group: int, mode: int) -> str:
    """Return the commands that grant this user access to the KVM device, given its group and mode."""
    name = _group(group)
    join = "sudo usermod -aG {} $USER, then log in again"
    if group != 0 and mode & _GROUP_MAY == _GROUP_MAY:
        return join.format(name)
    rule = f"echo '{UDEV_RULE}' | sudo tee {_UDEV_FILE}"
    return (
        f"{rule} && sudo udevadm control --reload && sudo udevadm trigger --name-match=kvm; "
        + join.format("kvm")
    )


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _setpriv(_host: Host) -> Check:
    return Check("setpriv", OK, require_program("setpriv"))


def _containment(host: Host) -> Check:
    """Check the barriers that confine a guest which breaks out of QEMU."""
    accelerator, _finding = _accelerator(host)
    walls = host.hypervisor(host_architecture()).walls(accelerator)
    detail = "; ".join(f"{wall.name}: {wall.detail}" for wall in walls)
    fixes = [wall.fix for wall in walls if not wall.stands]
    return Check("containment", WARN if fixes else OK, detail, "; ".join(fixes))


def _mke2fs(_host: Host) -> Check:
    return Check("mke2fs", OK, require_program("mke2fs"))


def _image_tools(host: Host) -> Check:
    try:
        require("images")
    except HostError as error:
        have = bool(host.images.list())
        return Check("image tools", WARN if have else FAIL, error.brief, error.resolution)
    return Check("image tools", OK, "mmdebstrap and mksquashfs are there")


def _disk(host: Host) -> Check:
    folder = next(folder for folder in (host.cache, *host.cache.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    detail = f"{_size(free)} free where the cache is"
    advice = "free some, run `pytest-microvm template prune`, or set PYTEST_MICROVM_CACHE to another disk"
    if free < _DISK_NEEDED:
        return Check("disk", FAIL, detail, advice)
    return Check("disk", WARN if free < _DISK_WANTED else OK, detail, advice if free < _DISK_WANTED else "")


def _memory(host: Host) -> Check:
    available = _available_memory()
    used = host.budget.records()
    detail = (
        f"host budget {host.budget}; {len(used)} machine(s) have {sum(record.cpus for record in used)} vCPUs"
    )
    detail += f" and {_size(sum(record.memory for record in used))}"
    if available is not None:
        detail = f"{_size(available)} available; {detail}"
        if available < _MEMORY_WANTED:
            return Check(
                "memory", WARN, detail, 'end other programs, or give machines less (memory = "256M")'
            )
    return Check("memory", OK, detail)


def _available_memory() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _cache(host: Host) -> Check:
    host.cache.mkdir(parents=True, exist_ok=True)
    if not os.access(host.cache, os.W_OK):
        return Check(
            "cache", FAIL, f"{host.cache} cannot be written", "set PYTEST_MICROVM_CACHE to a folder of yours"
        )
    images = host.images.list()
    names = ", ".join(sorted({entry.image.name for entry in images})) or "none"
    detail = f"{host.cache}; images: {names}"
    return Check("cache", OK if images else WARN, detail, "" if images else _BUILD_IMAGE)


def _templates(host: Host) -> Check:
    templates = host.templates.list()
    size = sum(entry.size for entry in templates)
    return Check(
        "templates", OK, f"{len(templates)} take {_size(size)} of at most {format_size(host.templates.cap)}"
    )


_CHECKS: dict[str, Callable[[Host], Check]] = {
    "kvm": _kvm,
    "setpriv": _setpriv,
    "containment": _containment,
    "mke2fs": _mke2fs,
    "image tools": _image_tools,
    "disk": _disk,
    "memory": _memory,
    "cache": _cache,
    "templates": _templates,
}


def _print(report: dict[str, Any]) -> None:
    print(f"pytest-microvm {report['version']} on {platform.system()} {platform.machine()}")
    width = max(len(check["name"]) for check in report["checks"])
    for check in report["checks"]:
        print(f"{check['status']:<4}  {check['name']:<{width}}  {check['detail']}")
        if check["fix"]:
            print(f"{'':4}  {'':<{width}}  next step: {check['fix']}")
    print("\n".join(_verdict(report)))


def _verdict(report: dict[str, Any]) -> Iterator[str]:
    failed = [check["name"] for check in report["checks"] if check["status"] == FAIL]
    if failed:
        yield f"machines cannot run here yet: {', '.join(failed)}"
    elif report["accelerator"] is None:
        yield "nothing is missing; which accelerator works shows once there is an image"
    else:
        yield f"machines run here, with {report['accelerator']}"


def _size(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / 1024**2:.0f} MiB"
