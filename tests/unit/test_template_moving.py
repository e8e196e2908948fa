"""A template goes from one store to another: data without holes, verified, whole or not at all."""

from __future__ import annotations

import os

import pytest

from pytest_microvm.errors import HostError
from pytest_microvm.templates import moving
from pytest_microvm.templates.moving import lent, piece, receive
from pytest_microvm.templates.store import TemplateStore

KEY = "k" * 64
CAP = 1024**3
SIZE = 64 * 1024**2


def make(store, key=KEY, kind="prepared", more=()):
    with store.draft() as draft:
        with (draft / "ram").open("wb") as ram:
            ram.truncate(SIZE)
            for place in (0, 5_000_000, SIZE - 100):
                ram.seek(place)
                ram.write(os.urandom(100))
        (draft / "scratch").write_bytes(os.urandom(3 * 1024**2))
        (draft / "state").write_bytes(b"device state")
        for name in more:
            (draft / name).write_bytes(b"x")
        store.publish(key, draft, {"kind": kind, "image": "base", "parent": "p" * 64})


@pytest.fixture
def origin(tmp_path):
    store = TemplateStore(tmp_path / "origin", CAP)
    make(store)
    return store


@pytest.fixture
def here(tmp_path):
    return TemplateStore(tmp_path / "here", CAP)


def test_received_template_is_identical_and_holes_are_not_sent(origin, here, monkeypatch):
    monkeypatch.setattr(moving, "PIECE", 1024**2)
    travelled = []

    def fetch(name, place):
        start, data = piece(there, name, place)
        travelled.append(len(data))
        return start, data

    with lent(origin, KEY) as there:
        receive(here, KEY, there.meta, fetch)
        with here.open(KEY) as came:
            for name in ("ram", "scratch", "state"):
                assert (came.folder / name).read_bytes() == (there.folder / name).read_bytes()
            assert came.meta["files"] == there.meta["files"]
            assert (came.meta["kind"], came.meta["image"]) == ("prepared", "base")
    assert max(travelled) <= 1024**2
    assert sum(travelled) < 5 * 1024**2


@pytest.mark.parametrize("change", ["content", "place", "short"])
def test_what_is_not_what_it_was_is_refused_and_leaves_nothing(origin, here, change):
    def fetch(name, place):
        start, data = piece(there, name, place)
        if name == "scratch" and data:
            if change == "content":
                data = bytes([data[0] ^ 1]) + data[1:]
            elif change == "place":
                start += SIZE
            else:
                data = b""
        return start, data

    with lent(origin, KEY) as there, pytest.raises(HostError, match="scratch arrived damaged"):
        receive(here, KEY, there.meta, fetch)
    assert here.list() == []
    assert [path.name for path in here.folder.iterdir() if not path.name.startswith(".locks")] == []


def test_only_prepared_templates_are_lent(origin):
    make(origin, "b" * 64, kind="boot")
    make(origin, "c" * 64, more=("collected",))
    assert lent(origin, "b" * 64) is None
    assert lent(origin, "c" * 64) is None
    assert lent(origin, "d" * 64) is None


def test_only_a_templates_own_files_are_given(origin):
    with lent(origin, KEY) as template, pytest.raises(HostError, match="no file"):
        piece(template, "../../secret", 0)


def test_what_is_lent_is_not_removed(origin):
    with lent(origin, KEY):
        assert origin.prune() == 0
    assert origin.prune() > 0
