"""Faults of the cache under real machines: damaged, full, read-only, removed, made by two at once."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pytest_microvm.agent.client import UnlimitedClient
from pytest_microvm.cli import main
from pytest_microvm.errors import HostError, ImageError, MachineCrashed
from pytest_microvm.host.host import Host
from pytest_microvm.images.artifacts import Artifacts
from pytest_microvm.images.store import ImageStore
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.templates import store as template_store
from pytest_microvm.templates.chain import TemplateStep
from support import guards

SPEC = MachineSpec(image="base", timeout=120)
MIB = 1024**2


def copy(source, target):
    """Copy a cache as an archive would restore it: the same bytes and holes in new files."""
    subprocess.run(["cp", "-a", "--sparse=always", f"{source}/.", target], check=True)


@pytest.fixture(scope="module")
def images(host, tmp_path_factory):
    """A cache with the image `base` alone, in files of its own."""
    image = host.base(SPEC).image
    cache = tmp_path_factory.mktemp("images")
    for folder in ("artifacts", "manifests", "names"):
        shutil.copytree(host.cache / "images" / folder, cache / "images" / folder)
    blobs = cache / "images" / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for path in image.files().values():
        shutil.copy2(path, blobs)
    if (host.cache / "accelerator.json").exists():
        shutil.copy2(host.cache / "accelerator.json", cache)
    return cache


@pytest.fixture(scope="module")
def filled(images, tmp_path_factory):
    """A cache with the image and a machine's template."""
    cache = tmp_path_factory.mktemp("filled")
    copy(images, cache)
    start(Host(cache=cache), "up")
    return cache


@pytest.fixture
def cache(filled, tmp_path):
    """A copy of it that a test may spoil."""
    copy(filled, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def run(cache, said):
    """A run over that cache."""
    with contextlib.closing(Host(cache=cache, say=said.append)) as running:
        yield running


@pytest.fixture
def disk(tmp_path):
    """``disk(bytes)``: a file system of that size; gone with the test."""
    mounted = []

    def mount(size, source=None):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"] if source is None else ["--bind", source]
        done = subprocess.run(["mount", *options, folder], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        if source is not None:
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(autouse=True)
def nothing_left(filled):
    before = set(children()), descriptors()
    yield
    assert (set(children()), descriptors()) == before


def children():
    return [
        int(child)
        for tasks in Path("/proc/self/task").glob("*/children")
        for child in tasks.read_text().split()
    ]


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def start(host, word, close=True):
    with contextlib.closing(host) if close else contextlib.nullcontext(), host.start(SPEC) as machine:
        assert machine.run(["echo", word]).stdout == word + "\n"


def template(cache):
    (found,) = templates(cache)
    return found


def templates(cache):
    return [path for path in (cache / "templates").iterdir() if not path.name.startswith(".")]


def drafts(cache):
    folder = cache / "templates"
    return [path for path in folder.glob(".*") if path.name != ".locks"] if folder.exists() else []


def free(folder):
    return os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize


def assert_given_back(folder, before):
    """Assert that a disk has as much room as ``before``.

    The kernel gives it back when nothing refers to a file; rules of Landlock do until some time after the
    end of their VMM.
    """
    end = time.monotonic() + guards.PROCESS
    while before - free(folder) >= MIB:
        assert time.monotonic() < end, f"{before - free(folder)} bytes are still in use"
        time.sleep(0.05)


def fill(folder, leave):
    """Fill a disk but for ``leave`` bytes."""
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free(folder) - leave)


def flip_a_bit(path, place):
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def no_builders(monkeypatch, tmp_path):
    """Leave no program that builds images; what machines need stays."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for folder in os.environ["PATH"].split(":"):
        for path in Path(folder).glob("*"):
            if not path.name.startswith(("mmdebstrap", "mksquashfs")) and not (programs / path.name).exists():
                (programs / path.name).symlink_to(path)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr("pytest_microvm.images.process._SYSTEM_PATH", str(programs))


# Damaged


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda folder: flip_a_bit(folder / "ram", 200 * MIB), "ram has other content"),
        (lambda folder: os.truncate(folder / "scratch", MIB), "scratch has another size"),
    ],
    ids=["ram", "scratch"],
)
def test_damaged_template_is_reported_and_rebuilt(run, said, cache, damage, word):
    """Also while a run holds it: its next machine is not a copy of the damaged one."""
    start(run, "before", close=False)
    key = template(cache).name
    damage(template(cache))
    start(run, "after", close=False)
    again = f"a template in the cache is damaged ({key[:12]}: {word}): making it again"
    assert said == [again, "booting base"]
    start(run, "and after that", close=False)
    assert len(said) == 2
    assert template(cache).name == key
    assert drafts(cache) == []


def test_restored_from_an_archive(run, said):
    """Every file is another one than the stamps say, and the same."""
    start(run, "up", close=False)
    start(run, "up", close=False)
    assert said == []


def test_truncated_memory_file_ends_only_its_own_machine(run, said, cache):
    with run.start(SPEC) as machine:
        assert machine.run(["echo", "up"]).stdout == "up\n"
        os.truncate(template(cache) / "ram", 0)
        with pytest.raises(MachineCrashed, match="killed by signal 7") as caught:
            machine.run("find / -xdev | md5sum; ls -laR /usr | wc -l", timeout=60)
    assert "its memory file was cut off" in str(caught.value)
    start(run, "after", close=False)
    assert [line.partition(" (")[0] for line in said] == [
        "a template in the cache is damaged",
        "booting base",
    ]


def test_a_damaged_image_is_noticed_before_it_is_used(run, said, images, no_builders):
    start(run, "before", close=False)
    blob = run.base(SPEC).image.rootfs
    blob.chmod(0o644)
    flip_a_bit(blob, 1_000_000)
    with pytest.raises(HostError, match="images cannot be built: mmdebstrap") as caught:
        run.start(SPEC)
    assert caught.value.resolution == "pytest-microvm setup"
    assert any("rootfs is damaged or gone: building it again" in line for line in said)
    shutil.copy2(images / "images" / "blobs" / "sha256" / blob.name, blob)
    start(run, "after", close=False)


@pytest.mark.thorough
def test_a_damaged_image_is_built_again_while_a_run_goes_on(run, said, cache):
    start(run, "before", close=False)
    blob = run.base(SPEC).image.rootfs
    blob.chmod(0o644)
    os.truncate(blob, MIB)
    with contextlib.suppress(ImageError):  # the mirror has other packages than when the image was built
        start(run, "after", close=False)
    start(Host(cache=cache), "a run after")
    assert any("rootfs is damaged or gone: building it again" in line for line in said)


def test_lists_and_prunes_go_on_over_what_is_damaged(cache, monkeypatch, capsys):
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(cache))
    good = template(cache).name
    folder = cache / "templates"
    for name, text in (("a" * 64, b""), ("b" * 64, b"\xff\x00"), ("c" * 64, b'{"files": {"ram": 7}}')):
        (folder / name).mkdir()
        (folder / name / "meta.json").write_bytes(text)
    (folder / ("d" * 64)).mkdir()
    (folder / "a-file").write_text("x")
    for record in [*(cache / "images" / "names").iterdir()][:1]:
        record.write_bytes(b"\xff\xfe")
    assert main(["template", "list", "--json"]) == 0
    listed = {entry["key"]: entry["kind"] for entry in json.loads(capsys.readouterr().out)}
    assert listed == {good: "boot", **{letter * 64: "unusable" for letter in "abcd"}}
    assert main(["template", "list"]) == 0
    assert main(["image", "list"]) == 0
    assert main(["template", "prune"]) == 0
    assert [path.name for path in templates(cache) if path.is_dir()] == []
    assert main(["image", "prune"]) == 0


# Full


def test_a_build_that_fills_the_disk_leaves_nothing(disk):
    small = disk(4 * MIB)
    before = free(small)

    def build(folder):
        (folder / "one").write_bytes(b"1" * MIB)
        (folder / "two").write_bytes(b"2" * 8 * MIB)
        raise AssertionError("the disk is not full")

    with pytest.raises(HostError, match="the disk with the cache is full") as caught:
        Artifacts(small / "images").get("thing", "k" * 64, build, print)
    assert "image prune" in caught.value.resolution
    assert list((small / "images" / "building").iterdir()) == []
    assert before - free(small) < MIB // 4


def test_an_image_is_not_begun_on_a_disk_that_is_too_small(disk):
    small = disk(64 * MIB)
    before = free(small)
    with pytest.raises(HostError, match=r"only 6\d MiB are free") as caught:
        ImageStore(small).get("base")
    assert "PYTEST_MICROVM_CACHE" in caught.value.resolution
    assert before - free(small) < MIB


def test_a_template_is_not_begun_on_a_disk_that_is_nearly_full(disk, images, said):
    small = disk(300 * MIB)
    copy(images, small)
    with contextlib.closing(Host(cache=small, say=said.append)) as run:
        with pytest.raises(HostError, match="MiB are free"):
            run.start(SPEC)
        assert drafts(small) == []


def grow_memory(_small):
    def work(instance):
        run_in(
            instance.link("agent"),
            "head -c 100M /dev/zero > /dev/shm/hog",
        )
        return {}

    return work


def grow_disk(_small):
    def work(instance):
        run_in(instance.link("agent"), "head -c 300M /dev/zero > /root/hog; sync")
        return {}

    return work


def fill_at_the_end(small):
    def work(_instance):
        fill(small, 0)
        return {"attachment": b"x" * MIB}

    return work


def run_in(link, command):
    from pytest_microvm.agent.process import GuestProcess, command_arguments  # noqa: PLC0415

    request = command_arguments(command, {}, None, None)
    with GuestProcess(UnlimitedClient(link), command, request, stdin=False, text=True, pty=None) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, output + errors


@pytest.mark.parametrize("hog", [grow_memory, grow_disk, fill_at_the_end])
def test_a_disk_that_becomes_full_while_a_template_is_made(disk, filled, said, monkeypatch, hog):
    """The machine's memory is a file: its VMM dies of SIGBUS, which must not look like a crash."""
    monkeypatch.setattr(template_store, "_SPACE_LEFT", 0)
    small = disk(520 * MIB)
    copy(filled, small)
    before = free(small)
    fill(small, 160 * MIB)  # the copy of the memory fits
    with contextlib.closing(Host(cache=small, say=said.append)) as run:
        base = run.base(SPEC)
        with pytest.raises(HostError, match="the disk with the cache is full") as caught:
            run.template(base, [TemplateStep("hog", (hog.__name__,), hog(small))])
        assert "template prune" in caught.value.resolution
        assert len(templates(small)) == 1
        assert drafts(small) == []
        (small / "filler").unlink()
        assert_given_back(small, before)
        start(run, "the next", close=False)


def test_a_disk_that_becomes_full_while_a_machine_boots(disk, images, said, monkeypatch):
    monkeypatch.setattr(template_store, "_SPACE_LEFT", 0)
    small = disk(200 * MIB)
    copy(images, small)
    before = free(small)
    fill(small, 60 * MIB)
    with contextlib.closing(Host(cache=small, say=said.append)) as run:
        with pytest.raises(HostError, match="the disk with the cache is full"):
            run.start(SPEC)
        (small / "filler").unlink()
        assert drafts(small) == templates(small) == []
        assert_given_back(small, before)


# Read-only


def test_read_only_cache_starts_only_cached_templates(disk, filled, said):
    frozen = disk(0, source=filled)
    with contextlib.closing(Host(cache=frozen, project=frozen, say=said.append)) as run:
        start(run, "up", close=False)
        with pytest.raises(HostError, match="the cache cannot be written") as caught:
            run.start(SPEC, memory="300M")
        assert "PYTEST_MICROVM_CACHE" in caught.value.resolution
        start(run, "again", close=False)
    assert said == []


def test_a_restored_read_only_cache(disk, cache, said):
    """Nothing can be noted: the content is read by each run."""
    frozen = disk(0, source=cache)
    for _ in range(2):
        start(Host(cache=frozen, say=said.append), "up")
    assert said == []


# Removed


def test_templates_removed_while_a_run_goes_on(run, said, cache):
    with run.start(SPEC) as machine:
        shutil.rmtree(cache / "templates")
        assert machine.run("ls -R /usr | wc -l").returncode == 0
        start(run, "the next", close=False)
        assert machine.run(["echo", "still here"]).stdout == "still here\n"
    assert said == ["booting base"]
    assert drafts(cache) == []


def test_the_cache_removed_while_a_run_goes_on(run, said, cache, images, no_builders):
    with run.start(SPEC) as machine:
        shutil.rmtree(cache)
        assert machine.run("ls -R /usr | wc -l").returncode == 0
        with pytest.raises(HostError, match="images cannot be built"):
            run.start(SPEC)
        assert machine.run(["echo", "still here"]).stdout == "still here\n"
    shutil.rmtree(cache)
    copy(images, cache)
    start(run, "the next", close=False)
    assert said[-1] == "booting base"


def test_the_cache_removed_while_a_template_is_made(run, cache):
    def work(_instance):
        shutil.rmtree(cache / "templates")
        return {}

    base = run.base(SPEC)
    with pytest.raises(HostError, match="the cache was removed while it was in use") as caught:
        run.template(base, [TemplateStep("removed", (), work)])
    assert "run again" in caught.value.resolution
    assert drafts(cache) == []


# Two at once

SCRIPT = textwrap.dedent("""
    import sys
    from pytest_microvm.host.host import Host
    host = Host(say=lambda line: print(line, flush=True))
    with host.start(image="base", timeout=120) as machine:
        print(machine.run(["echo", "up"]).stdout, end="", flush=True)
    host.close()
""")


def test_waiting_run_takes_over_from_killed_template_maker(images, tmp_path):
    cache = tmp_path / "cache"
    copy(images, cache)
    environment = {**os.environ, "PYTEST_MICROVM_CACHE": str(cache)}
    options = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], **options) as maker:
        assert next(maker.stdout) == "booting base\n"
        with subprocess.Popen([sys.executable, "-c", SCRIPT], **options) as waiting:
            assert next(waiting.stdout) == "waiting for another run: booting base\n"
            assert len(drafts(cache)) == 1
            maker.send_signal(signal.SIGKILL)
            assert waiting.stdout.read() == "booting base\nup\n"
        assert waiting.returncode == 0
    assert len(templates(cache)) == 1
    assert drafts(cache) == []
