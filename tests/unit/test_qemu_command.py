"""QEMU's command line, by value."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_microvm.hypervisors import Accelerator, Disk, Launch
from pytest_microvm.hypervisors.qemu.command import memory_ceiling, qemu_command

FDS = {
    "qmp": 10, "console": 11, "agent": 12, "runner": 13, "network": 14,
    "kernel": 20, "initramfs": 21, "ram": 22, "disk0": 23, "disk1": 24, "disk2": 25,
}  # fmt: skip
COPY_FDS = {**FDS, "overlay2": 26}
TCG = Accelerator("tcg", "no kvm", "microvm", 2_100_000)
BOOT = Launch(
    architecture="x86_64",
    kernel=Path("/i/kernel"),
    initramfs=Path("/i/initramfs"),
    cpus=2,
    memory=512 * 1024**2,
    ram=Path("/t/ram"),
    share=True,
    disks=(
        Disk(Path("/i/root"), readonly=True),
        Disk(Path("/i/runtime"), readonly=True),
        Disk(Path("/t/scratch")),
    ),
)
COPY = replace(
    BOOT,
    share=False,
    disks=(*BOOT.disks[:2], Disk(Path("/t/scratch"), ephemeral=True)),
    state=Path("/t/state"),
    name="vm-1",
)


def value_of(command, option):
    """The values that follow ``option``, in order."""
    return [value for name, value in itertools.pairwise(command) if name == option]


def test_a_boot_under_emulation():
    assert qemu_command("/usr/bin/qemu-system-x86_64", BOOT, TCG, FDS) == [
        "/usr/bin/qemu-system-x86_64",
        "-name", "microvm,process=microvm",
        "-machine", "microvm,rtc=on,memory-backend=mem",
        "-accel", "tcg,tb-size=256",
        "-cpu", "max,erms=off,fsrm=off",
        "-smp", "2",
        "-m", "536870912B",
        "-object", "memory-backend-file,id=mem,size=536870912,mem-path=/proc/self/fd/22,share=on",
        "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-chardev", "socket,id=qmp,fd=10",
        "-mon", "chardev=qmp,mode=control",
        "-chardev", "socket,id=console,fd=11",
        "-serial", "chardev:console",
        "-device", "virtio-serial-device",
        "-chardev", "socket,id=agent,fd=12",
        "-device", "virtserialport,chardev=agent,name=agent",
        "-chardev", "socket,id=runner,fd=13",
        "-device", "virtserialport,chardev=runner,name=runner",
        "-chardev", "socket,id=network,fd=14",
        "-device", "virtserialport,chardev=network,name=network",
        "-add-fd", "fd=23,set=23",
        "-drive", "if=none,id=disk0,format=raw,file=/dev/fdset/23,readonly=on",
        "-device", "virtio-blk-device,drive=disk0",
        "-add-fd", "fd=24,set=24",
        "-drive", "if=none,id=disk1,format=raw,file=/dev/fdset/24,readonly=on",
        "-device", "virtio-blk-device,drive=disk1",
        "-add-fd", "fd=25,set=25",
        "-drive",
        "if=none,id=disk2,format=raw,file=/dev/fdset/25,cache=unsafe,auto-read-only=off,werror=report",
        "-device", "virtio-blk-device,drive=disk2",
        "-kernel", "/proc/self/fd/20",
        "-initrd", "/proc/self/fd/21",
        "-append",
        "console=ttyS0 quiet panic=-1 random.trust_cpu=on mitigations=off reboot=t tsc_early_khz=2100000",
    ]  # fmt: skip


def test_a_copy_differs_from_its_boot_in_this_alone():
    boot, copy = qemu_command("qemu", BOOT, TCG, FDS), qemu_command("qemu", COPY, TCG, COPY_FDS)
    overlay = copy.index("fd=26,set=26")
    assert copy[overlay - 1] == "-add-fd"
    assert copy[-2:] == ["-incoming", "defer"]
    del copy[overlay - 1 : overlay + 1]
    assert [(old, new) for old, new in zip(boot, copy, strict=False) if old != new] == [
        ("microvm,process=microvm", "vm-1,process=vm-1"),
        (
            "memory-backend-file,id=mem,size=536870912,mem-path=/proc/self/fd/22,share=on",
            "memory-backend-file,id=mem,size=536870912,mem-path=/proc/self/fd/22,share=off",
        ),
        (
            "if=none,id=disk2,format=raw,file=/dev/fdset/25,cache=unsafe,auto-read-only=off,werror=report",
            (
                "if=none,id=disk2,format=qcow2,file=/dev/fdset/26,cache=unsafe,auto-read-only=off,werror=report,"
                "backing.driver=raw,backing.file.driver=file,backing.file.filename=/dev/fdset/25"
            ),
        ),
    ]


def test_a_copy_by_a_newer_qemu_only_reads_its_template():
    options = value_of(qemu_command("qemu", COPY, TCG, COPY_FDS, readonly_ram=True), "-object")[0]
    assert options.endswith(",share=off,readonly=on,rom=off")
    options = value_of(qemu_command("qemu", BOOT, TCG, FDS, readonly_ram=True), "-object")[0]
    assert options.endswith(",share=on")


def test_memory_ceiling_covers_guest_ram_and_translations():
    for accelerator, translations in ((TCG, 256), (Accelerator("kvm", "", "microvm"), 0)):
        more = memory_ceiling(replace(BOOT, memory=1024 * 1024**2), accelerator)
        assert more - memory_ceiling(BOOT, accelerator) == 512 * 1024**2
        assert memory_ceiling(BOOT, accelerator) > (512 + translations) * 1024**2


@pytest.mark.parametrize(
    ("name", "architecture", "cpu"),
    [("kvm", "x86_64", "host"), ("tcg", "x86_64", "max,erms=off,fsrm=off"), ("tcg", "aarch64", "max")],
)
def test_virtualisation_is_there_when_asked_for(name, architecture, cpu):
    launch = replace(BOOT, architecture=architecture, nested=True)
    machine = "virt" if architecture == "aarch64" else "microvm"
    assert value_of(qemu_command("qemu", launch, Accelerator(name, "", machine), FDS), "-cpu") == [cpu]


@pytest.mark.parametrize(
    ("architecture", "early"),
    [("x86_64", "earlyprintk=serial,ttyS0,115200"), ("aarch64", "earlycon")],
)
def test_a_loud_guest_writes_from_the_first_moment_on(architecture, early):
    quiet, loud = (
        value_of(
            qemu_command("qemu", replace(BOOT, architecture=architecture, loud=loud), TCG, FDS), "-append"
        )[0]
        for loud in (False, True)
    )
    assert early not in quiet
    assert quiet.split()[1] == "quiet"
    assert loud.split()[1:3] == [early, "loglevel=6"]
    assert "quiet" not in loud.split()


@pytest.mark.parametrize(
    ("accelerator", "machine", "cpu"),
    [
        ("kvm", "microvm,rtc=on", "host,vmx=off,svm=off"),
        ("hvf", "q35", "host,vmx=off,svm=off"),
        ("whpx", "q35", "host,vmx=off,svm=off"),
        ("tcg", "q35", "max,erms=off,fsrm=off"),
    ],
)
def test_accelerators(accelerator, machine, cpu):
    kind = machine.partition(",")[0]
    command = qemu_command("qemu", BOOT, Accelerator(accelerator, "", kind), FDS)
    assert value_of(command, "-accel") == [accelerator + (",tb-size=256" if accelerator == "tcg" else "")]
    assert value_of(command, "-cpu") == [cpu]
    assert value_of(command, "-machine") == [f"{machine},memory-backend=mem"]
    assert "tsc_early_khz" not in value_of(command, "-append")[0]


def test_q35_has_its_devices_on_pci():
    devices = value_of(qemu_command("qemu", BOOT, Accelerator("tcg", "", "q35"), FDS), "-device")
    assert devices[0] == "virtio-serial-pci"
    assert [device for device in devices if "blk" in device] == [
        "virtio-blk-pci,drive=disk0", "virtio-blk-pci,drive=disk1", "virtio-blk-pci,drive=disk2",
    ]  # fmt: skip


@pytest.mark.parametrize("accelerator", ["kvm", "hvf", "tcg"])
def test_aarch64(accelerator):
    command = qemu_command(
        "qemu", replace(BOOT, architecture="aarch64"), Accelerator(accelerator, "", "virt"), FDS
    )
    assert value_of(command, "-machine") == ["virt,memory-backend=mem"]
    assert value_of(command, "-cpu") == ["max" if accelerator == "tcg" else "host"]
    # The guest's kernel finds mmio slots backwards, and the root disk must be its first.
    assert [value.split(",")[1] for value in value_of(command, "-drive")] == [
        "id=disk2",
        "id=disk1",
        "id=disk0",
    ]
    words = value_of(command, "-append")[0].split()
    assert words[0] == "console=ttyAMA0"
    assert "reboot=t" not in words


@pytest.mark.parametrize("launch", [BOOT, COPY], ids=["boot", "copy"])
def test_no_path_is_named_but_the_program(launch):
    command = qemu_command("qemu", launch, TCG, COPY_FDS)
    assert not [word for word in command if "/i/" in word or "/t/" in word]


@pytest.mark.parametrize("launch", [BOOT, COPY], ids=["boot", "copy"])
@pytest.mark.parametrize("machine", ["microvm", "q35", "virt"])
def test_nothing_reaches_out(launch, machine):
    command = qemu_command("qemu", launch, Accelerator("tcg", "", machine), COPY_FDS)
    # -nodefaults leaves out the network card that every machine type would otherwise get (qemu(1)); the
    # integration tests look for one in the guest.
    assert {"-nodefaults", "-no-user-config"} <= set(command)
    assert not {"-nic", "-net", "-netdev", "-monitor", "-vnc", "-fsdev", "-virtfs"} & set(command)
    cards = re.compile("virtio-net|e1000|rtl|ne2k|vmxnet")
    assert not [device for device in value_of(command, "-device") if cards.match(device)]
    assert value_of(command, "-sandbox") == [
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    ]
    assert all(",fd=" in chardev for chardev in value_of(command, "-chardev"))


def test_more_words_come_last():
    command = qemu_command("qemu", replace(BOOT, words=("microvm.probe=1",)), TCG, FDS)
    assert value_of(command, "-append")[0].endswith(" tsc_early_khz=2100000 microvm.probe=1")


# Layers


def with_layers(count):
    layers = tuple(Disk(Path(f"/i/layer{number}"), readonly=True) for number in range(count))
    fds = {**FDS, **{f"disk{number}": 30 + number for number in range(3, 3 + count)}}
    return replace(BOOT, disks=(*BOOT.disks, *layers)), fds


def devices_of(command):
    """The devices of the disks, in the order of their plugs."""
    return [value.split(",")[0] for value in value_of(command, "-device") if "drive=" in value]


@pytest.mark.parametrize("count", [1, 19])
def test_layers_have_a_device_each_as_long_as_they_fit(count):
    launch, fds = with_layers(count)
    command = qemu_command("qemu", launch, TCG, fds)
    assert devices_of(command) == ["virtio-blk-device"] * (3 + count)
    assert not any("scsi" in word for word in command)


@pytest.mark.parametrize("machine", ["microvm", "q35", "virt"])
def test_more_layers_are_units_of_a_controller(machine):
    launch, fds = with_layers(40)
    command = qemu_command("qemu", launch, Accelerator("tcg", "", machine), fds)
    bus = "pci" if machine == "q35" else "device"
    assert value_of(command, "-device").count(f"virtio-scsi-{bus},id=scsi") == 1
    plugs = [value for value in value_of(command, "-device") if "drive=" in value]
    assert sum(value.startswith(f"virtio-blk-{bus},") for value in plugs) == 21
    for unit in range(22):
        assert f"scsi-hd,bus=scsi.0,channel=0,scsi-id=0,lun={unit},drive=disk{21 + unit}" in plugs
    assert "microvm.scsi=22" in value_of(command, "-append")[0].split()
