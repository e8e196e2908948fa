"""What the store promises: built once, verified before use, never half there, nothing left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest

from pytest_microvm.errors import BuildError, ImageError
from pytest_microvm.images.artifacts import Artifacts, Built
from pytest_microvm.images.blobs import Blobs, sha256_file, write_atomically
from pytest_microvm.images.store import ImageStore, cache_root


def _silent(_line):
    pass


@pytest.fixture
def artifacts(tmp_path):
    return Artifacts(tmp_path / "images")


@pytest.fixture
def build():
    """A build function that counts its runs and makes two files."""

    def run(folder):
        run.count += 1
        (folder / "one").write_bytes(b"one" * 1000)
        (folder / "two").write_bytes(b"two" * 1000)
        (folder / "temporary").write_bytes(b"x")
        return Built({"one": folder / "one", "two": folder / "two"}, {"fact": "f"})

    run.count = 0
    return run


def _everything_below(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(tmp_path / "here"))
    assert cache_root() == tmp_path / "here"
    monkeypatch.delenv("PYTEST_MICROVM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root().name == "pytest-microvm"


def test_built_once(artifacts, build):
    first = artifacts.get("thing", "k" * 64, build, _silent)
    assert artifacts.get("thing", "k" * 64, build, _silent) == first
    assert build.count == 1
    assert first.facts == {"fact": "f"}
    for role in ("one", "two"):
        path = artifacts.blobs.path(first.files[role])
        assert path.read_bytes() == role.encode() * 1000
        assert sha256_file(path) == first.files[role]


def test_another_key_is_another_artifact(artifacts, build):
    artifacts.get("thing", "k" * 64, build, _silent)
    artifacts.get("thing", "l" * 64, build, _silent)
    assert build.count == 2


def test_force_builds_again(artifacts, build):
    artifacts.get("thing", "k" * 64, build, _silent)
    artifacts.get("thing", "k" * 64, build, _silent, force=True)
    assert build.count == 2


def _truncate(path):
    path.chmod(0o644)
    os.truncate(path, 100)


def _flip_a_bit(path):
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(1500)
        byte = file.read(1)[0]
        file.seek(1500)
        file.write(bytes([byte ^ 1]))


def _flip_a_bit_and_hide_it(path):
    before = path.stat()
    _flip_a_bit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(path):
    path.unlink()
    path.write_bytes(b"three" * 600)


def _delete(path):
    path.unlink()


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, _flip_a_bit_and_hide_it, _replace, _delete])
@pytest.mark.parametrize("role", ["one", "two"])
def test_damage_is_noticed_and_built_again(artifacts, build, damage, role):
    artifact = artifacts.get("thing", "k" * 64, build, _silent)
    damage(artifacts.blobs.path(artifact.files[role]))
    said = []
    assert artifacts.get("thing", "k" * 64, build, said.append) == artifact
    assert build.count == 2
    assert said == [f"the cache's {role} is damaged or gone: building it again"]
    assert sha256_file(artifacts.blobs.path(artifact.files[role])) == artifact.files[role]


@pytest.mark.parametrize("text", ["", "{", "[]", "\0" * 40])
def test_a_damaged_record_is_built_again(artifacts, build, tmp_path, text):
    artifacts.get("thing", "k" * 64, build, _silent)
    (record,) = (tmp_path / "images" / "artifacts").iterdir()
    record.write_text(text)
    said = []
    artifacts.get("thing", "k" * 64, build, said.append)
    assert build.count == 2
    assert "is damaged: building it again" in said[0]


@pytest.mark.parametrize("place", [3, 40, 120, 200])
def test_a_record_with_a_flipped_bit_is_built_again(artifacts, build, tmp_path, place):
    artifact = artifacts.get("thing", "k" * 64, build, _silent)
    (record,) = (tmp_path / "images" / "artifacts").iterdir()
    data = bytearray(record.read_bytes())
    data[place] ^= 1
    record.write_bytes(data)
    assert artifacts.get("thing", "k" * 64, build, _silent) == artifact
    assert build.count == 2


def test_a_record_of_an_older_version_has_no_seal(artifacts, build, tmp_path):
    artifact = artifacts.get("thing", "k" * 64, build, _silent)
    (record,) = (tmp_path / "images" / "artifacts").iterdir()
    entry = json.loads(record.read_text())
    del entry["seal"]
    record.write_text(json.dumps(entry))
    assert artifacts.get("thing", "k" * 64, build, _silent) == artifact
    assert build.count == 1


def test_a_touched_file_is_hashed_again_and_kept(artifacts, build):
    artifact = artifacts.get("thing", "k" * 64, build, _silent)
    os.utime(artifacts.blobs.path(artifact.files["one"]))
    assert artifacts.get("thing", "k" * 64, build, _silent) == artifact
    assert build.count == 1


def test_a_file_is_hashed_again_after_a_reboot(tmp_path):
    blobs = Blobs(tmp_path / "blobs")
    (tmp_path / "file").write_bytes(b"content")
    digest = blobs.add(tmp_path / "file")
    seen = tmp_path / "blobs" / "verified" / digest
    record = json.loads(seen.read_text())
    assert blobs.intact(digest)
    assert json.loads(seen.read_text()) == record
    seen.write_text(json.dumps(["the boot before", *record[1:]]))
    assert blobs.intact(digest)
    assert json.loads(seen.read_text()) == record  # looked at again, and noted


def test_a_failed_build_leaves_nothing(artifacts, tmp_path):
    def fail(folder):
        (folder / "half").write_bytes(b"x" * 1000)
        raise BuildError("no")

    with pytest.raises(BuildError):
        artifacts.get("thing", "k" * 64, fail, _silent)
    assert {name for name in _everything_below(tmp_path) if "locks/" not in name} == set()
    assert list((tmp_path / "images" / "building").iterdir()) == []


def test_an_interrupted_build_leaves_nothing(artifacts, tmp_path, build):
    def interrupt(folder):
        (folder / "half").write_bytes(b"x" * 1000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifacts.get("thing", "k" * 64, interrupt, _silent)
    assert list((tmp_path / "images" / "building").iterdir()) == []
    artifacts.get("thing", "k" * 64, build, _silent)  # and the lock is free
    assert build.count == 1


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", _raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert _everything_below(tmp_path) == {"file"}
    assert (tmp_path / "file").read_bytes() == b"old"


def _raise_interrupt(_descriptor):
    raise KeyboardInterrupt


def test_dropping_keeps_what_is_needed(artifacts, build):
    def other(folder):
        (folder / "three").write_bytes(b"three" * 1000)
        return Built({"three": folder / "three"}, {})

    kept = artifacts.get("kept", "k" * 64, build, _silent)
    dropped = artifacts.get("dropped", "k" * 64, other, _silent)
    with artifacts.publishing():
        freed = artifacts.drop_all_but(set(kept.files.values()))
    assert freed == 5000
    assert set(artifacts.blobs.digests()) == set(kept.files.values())
    assert not artifacts.blobs.path(dropped.files["three"]).exists()
    assert artifacts.get("kept", "k" * 64, build, _silent) == kept
    assert build.count == 1


# -- several processes --------------------------------------------------------------------------------

_context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")


def _build_slowly(root, started, may_finish, results):
    def build(folder):
        started.set()
        assert may_finish.wait(60)
        (folder / "file").write_bytes(str(os.getpid()).encode())
        return Built({"file": folder / "file"}, {})

    said = []
    artifact = Artifacts(root).get("thing", "k" * 64, build, said.append)
    results.put((os.getpid(), artifact.files["file"], said))


@pytest.fixture
def several(tmp_path):
    """Return a function that starts builders of one artifact in processes of their own."""
    running = []

    def start():
        started, may_finish, results = _context.Event(), _context.Event(), _context.Queue()
        process = _context.Process(
            target=_build_slowly, args=(tmp_path / "images", started, may_finish, results), daemon=True
        )
        process.start()
        running.append(process)
        return process, started, may_finish, results

    yield start
    for process in running:
        process.kill()
        process.join()


def test_one_builder_at_a_time_the_others_wait_and_say_so(several, tmp_path):
    first, started, may_finish, results = several()
    assert started.wait(60)
    second, second_started, second_may_finish, second_results = several()
    second_may_finish.set()
    # The second one has opened the lock file that the first holds when it tells that it waits; what it
    # tells comes back at its end, so here only the order of events is certain.
    assert not second_started.is_set()
    may_finish.set()
    pid, digest, said = results.get(timeout=60)
    _second_pid, second_digest, second_said = second_results.get(timeout=60)
    first.join(60)
    second.join(60)
    assert not second_started.is_set()
    assert digest == second_digest
    assert (tmp_path / "images/blobs/sha256" / digest).read_bytes() == str(pid).encode()
    assert said == []
    assert second_said in ([], ["waiting for another process that is building it"])


def test_a_waiting_builder_says_that_it_waits(artifacts, several):
    _process, started, may_finish, _results = several()
    assert started.wait(60)
    said = []

    def tell(line):
        said.append(line)
        may_finish.set()  # the other one ends only after this one has told that it waits

    artifacts.get("thing", "k" * 64, _must_not_run, tell)
    assert said == ["waiting for another process that is building it"]


def _must_not_run(_folder):
    raise AssertionError("built twice")


def test_folder_of_a_killed_builder_is_dropped_and_built_again(artifacts, several, build, tmp_path):
    process, started, _may_finish, _results = several()
    assert started.wait(60)
    building = tmp_path / "images" / "building"
    assert artifacts.drop_broken_off_builds() == 0
    assert len(list(building.iterdir())) == 1  # a build under way is left alone
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    (next(building.iterdir()) / "half").write_bytes(b"x" * 10)
    assert artifacts.drop_broken_off_builds() == 10
    assert list(building.iterdir()) == []
    artifacts.get("thing", "k" * 64, build, _silent)
    assert build.count == 1


def test_readers_never_see_half_an_artifact(tmp_path, build):
    """One process publishes and drops in turns; whatever a reader gets is whole."""
    root = tmp_path / "images"
    stop = _context.Event()
    process = _context.Process(target=_publish_and_drop, args=(root, stop), daemon=True)
    process.start()
    try:
        reader = Artifacts(root)
        deadline = time.monotonic() + 60
        found = 0
        while found < 200 and time.monotonic() < deadline:
            artifact = reader._intact(root / "artifacts" / f"thing-{'k' * 32}.json")
            if artifact is not None:
                assert set(artifact.files) == {"file"}
                assert artifact.facts == {"fact": "f" * 1000}
                found += 1
        assert found == 200
    finally:
        stop.set()
        process.join(60)


def _publish_and_drop(root, stop):
    def build(folder):
        (folder / "file").write_bytes(b"x" * 100_000)
        return Built({"file": folder / "file"}, {"fact": "f" * 1000})

    artifacts = Artifacts(root)
    while not stop.is_set():
        artifacts.get("thing", "k" * 64, build, _silent)
        with artifacts.publishing():
            artifacts.drop_all_but(set())


# -- the image store without images (with images: tests/integration/test_image_build.py) ---------------


def test_an_empty_store(tmp_path):
    store = ImageStore(tmp_path)
    assert store.list() == []
    assert store.prune() == 0
    with pytest.raises(ImageError, match="no image 'python'") as caught:
        store.inspect("python")
    assert "image build" in caught.value.resolution
    with pytest.raises(ImageError):
        store.remove("python")
