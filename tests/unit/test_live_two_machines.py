"""Two machines at work in one folder: watched from outside, it is that folder and nothing else."""

import contextlib
import os
import shutil
import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support import guards
from support.live_guest import EXCHANGE, Guest
from support.outside_view import OutsideView


def populate(top):
    """Make a folder with everything that could lead out; return it and what is beside it."""
    inside, outside = top / "inside", top / "outside"
    (inside / "a" / "b").mkdir(parents=True)
    (outside / "d").mkdir(parents=True)
    (outside / "d" / "f").write_text("below")
    (outside / "f").write_text("as it was")
    (outside / "l").symlink_to("f")
    os.link(outside / "f", inside / "f")
    os.link(outside / "d" / "f", inside / "a" / "f")
    os.link(outside / "l", inside / "l", follow_symlinks=False)
    (inside / "out").symlink_to(outside)
    (inside / "a" / "out").symlink_to("../../outside")
    (inside / "b").symlink_to("a")
    (inside / "a" / "c").symlink_to("../d/e")
    (inside / "a" / "back").symlink_to("b/../../f")
    (inside / "a" / "b" / "up").symlink_to("..")
    for path in (outside / "f", outside / "d" / "f", outside / "d", outside):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    return inside, outside


NAMES = ["a", "b", "c", "d", "f", "out", "l", "back", "up"]
PATHS = st.one_of(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join),
    st.sampled_from(["out", "a/out", "a", "b", "f", "a/f", "a/b", "a/back", "c", "d"]),
)
TARGETS = st.lists(st.sampled_from(["..", ".", *NAMES]), min_size=1, max_size=4).map("/".join)
STEPS = st.tuples(
    st.integers(0, 2),
    st.one_of(
        st.tuples(st.just("mkdir"), PATHS),
        st.tuples(st.just("rmdir"), PATHS),
        st.tuples(st.just("unlink"), PATHS),
        st.tuples(st.just("symlink"), TARGETS, PATHS),
        st.tuples(st.just("rename"), PATHS, PATHS),
        st.tuples(st.just("exchange"), PATHS, PATHS),
        st.tuples(st.just("link"), PATHS, PATHS),
        st.tuples(st.just("open"), PATHS),
        st.tuples(st.just("write"), st.integers(0, 9)),
        st.tuples(st.just("cut_off"), PATHS, st.integers(0, 12)),
        st.tuples(st.just("cut_off_open"), PATHS, st.integers(0, 9)),
        st.tuples(st.just("chmod"), PATHS),
        st.tuples(st.just("utime"), PATHS),
    ),
)


class Machines:
    """Clients of one folder: two of all of it, and one of a folder in it."""

    def __init__(self, stack, inside):
        self._guests = [stack.enter_context(Guest(folder)) for folder in (inside, inside, inside / "a")]
        self._open = [[] for _guest in self._guests]

    def do(self, number, step):
        guest, files = self._guests[number], self._open[number]
        what, *arguments = step
        if what == "open":
            handle = guest.create(*arguments)
            files += [] if isinstance(handle, int) else handle
        elif what == "write":
            for handle in files[arguments[0] :]:
                guest.write(handle, b"changed")
        elif what == "cut_off":
            guest.truncate(*arguments)
        elif what == "cut_off_open":
            for handle in files[arguments[1] :]:
                guest.truncate(arguments[0], 1, handle)
        elif what == "exchange":
            guest.rename(*arguments, EXCHANGE)
        elif what in ("chmod", "utime"):
            getattr(guest, what)(*arguments, 0o600)
        else:
            getattr(guest, what)(*arguments)


@example(steps=[(0, ("open", "f")), (0, ("write", 0))])
@example(steps=[(0, ("open", "f")), (1, ("unlink", "f")), (0, ("write", 0))])
@example(steps=[(0, ("rename", "out", "c"))])
@example(steps=[(0, ("rename", "a", "d")), (1, ("symlink", "a", "d"))])
@example(steps=[(0, ("symlink", "d/out", "c")), (1, ("symlink", "a", "d"))])
@example(steps=[(0, ("unlink", "a/b/up")), (0, ("rmdir", "a/b")), (1, ("symlink", "..", "a/b"))])
@settings(max_examples=8 * settings.default.max_examples)
@given(steps=st.lists(STEPS, max_size=30))
def test_nothing_outside_changes_and_nothing_leads_there(tmp_path_factory, steps):
    inside, outside = populate(tmp_path_factory.mktemp("top"))
    view = OutsideView(inside, outside)
    with contextlib.ExitStack() as stack:
        machines = Machines(stack, inside)
        for number, step in steps:
            machines.do(number, step)
            view.check()


def rename_over(inside, _outside):
    shutil.rmtree(inside / "a" / "b")
    (inside / "out").rename(inside / "a" / "b")


def chain(inside, _outside):
    (inside / "c").symlink_to("d/out")
    (inside / "d").symlink_to("a")


def turn(inside, outside):
    shutil.rmtree(inside / "a" / "b")
    (inside / "a" / "b").symlink_to("..")


@pytest.mark.parametrize(
    "fault",
    [
        rename_over,
        chain,
        turn,
        lambda inside, _outside: (inside / "f").write_text("as it is!"),
        lambda inside, _outside: (inside / "f").chmod(0o600),
        lambda inside, _outside: os.utime(inside / "f", (1, 1)),
        lambda inside, _outside: os.utime(inside / "l", (1, 1), follow_symlinks=False),
        lambda inside, _outside: os.link(inside / "f", inside / "c"),
        lambda inside, _outside: (inside / "a").rename(inside / "d"),
        lambda inside, _outside: (inside / "c").symlink_to("out"),
        lambda inside, _outside: (inside / "c").symlink_to("../elsewhere"),
        lambda inside, _outside: (inside / "out" / "new").touch(),
        lambda inside, _outside: (inside.parent / "beside").touch(),
    ],
)
def test_view_from_outside_notices(tmp_path, fault):
    """The control: each of these is done on the disk, as a server without walls would."""
    inside, outside = populate(tmp_path)
    view = OutsideView(inside, outside)
    view.check()
    fault(inside, outside)
    with pytest.raises(AssertionError):
        view.check()


def test_link_made_while_its_folder_is_moved_does_not_lead_out(tmp_path):
    """One machine moves a folder up and down, the other makes a link that leads out of the upper place."""
    upper = tmp_path / "inside" / "b"
    (tmp_path / "inside" / "a" / "b").mkdir(parents=True)
    for number in range(1000):  # it takes time to look at them, before the folder is moved
        (tmp_path / "inside" / "a" / "b" / f"{number}").touch()
    ended, moved, made, attempts = threading.Event(), [], 0, 0
    latest = time.monotonic() + guards.PROCESS

    def move(guest):
        while not ended.is_set():
            moved.append(guest.rename("a/b", "b"))
            guest.rename("b", "a/b")

    with Guest(tmp_path / "inside") as one, Guest(tmp_path / "inside") as two:
        thread = threading.Thread(target=move, args=(one,))
        thread.start()
        try:
            while attempts < 600 or not made or b"" not in moved:  # each of them has had its turn
                assert time.monotonic() < latest, (made, len(moved))
                attempts += 1
                made += isinstance(two.symlink("../..", "a/b/up"), bytes)
                assert not (upper / "up").is_symlink()
                two.unlink("a/b/up")
        finally:
            ended.set()
            thread.join(guards.PROCESS)
