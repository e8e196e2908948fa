"""What a guest's kernel says on its console: recognised, bounded, in whatever pieces it comes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.machine import console
from pytest_microvm.machine.console import ConsoleReader, find

OOM = (
    "[   10.983623] Out of memory: Killed process 123 (tail) total-vm:160464kB, anon-rss:157596kB, "
    "file-rss:720kB, shmem-rss:0kB, UID:0 pgtables:360kB oom_score_adj:0"
)

LINES = {
    OOM: ("memory", "killed process 123 (tail), which had 153 MiB"),
    "[  3.1] Out of memory (oom_kill_allocating_task): Killed process 9 (a b) total-vm:1kB, anon-rss:2048kB, "
    "file-rss:0kB, shmem-rss:3072kB, UID:0": ("memory", "process 9 (a b), which had 5 MiB"),
    "[   12.8] Kernel panic - not syncing: sysrq triggered crash": ("panic", "sysrq triggered crash"),
    "[    1.0] Kernel panic - not syncing: System is deadlocked on memory": ("panic", "deadlocked on memory"),
    "[   33.0] BUG: kernel NULL pointer dereference, address: 0000000000000000": ("oops", "NULL pointer"),
    "[   33.0] Oops: 0002 [#1] PREEMPT SMP PTI": ("oops", "Oops: 0002"),
    "[   33.0] general protection fault, probably for non-canonical address": ("oops", "general protection"),
    "[   40.0] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [python3:99]": ("oops", "soft lockup"),
    "[  242.0] INFO: task dd:77 blocked for more than 120 seconds.": ("hang", "task dd:77"),
    "[    9.0] EXT4-fs error (device vdc): ext4_lookup:1: inode #2": ("file system", "device vdc"),
    "microvm: too many processes\r": ("pids", "refused to start another process"),
}


@pytest.mark.parametrize("line", LINES)
def test_what_is_recognised(line):
    kind, words = LINES[line]
    found = find(line)
    assert found.kind == kind
    assert words in found.text


@pytest.mark.parametrize(
    "line",
    [
        "",
        "a word on the console",
        "Memory cgroup out of memory: Killed process 5 (x) total-vm:1kB, anon-rss:1kB, shmem-rss:0kB",
        "Out of memory",
        "Out of memory: Killed process",
        "[ 1.0] panic=-1 on the command line",
        "DEBUG: fine",
    ],
)
def test_what_is_not(line):
    assert find(line) is None


@given(st.lists(st.integers(1, 40), max_size=12))
def test_it_does_not_matter_in_which_pieces_it_comes(cuts):
    data = b"before\n" + OOM.encode() + b"\nafter\n"
    reader, kinds = ConsoleReader(), []
    for cut in cuts:
        kinds += [finding.kind for finding in reader.feed(data[:cut])]
        data = data[cut:]
    kinds += [finding.kind for finding in reader.feed(data)]
    assert kinds == ["memory"]
    assert reader.findings[0].size == 157596 * 1024


@given(st.lists(st.binary(max_size=3000), max_size=20))
def test_any_bytes_are_taken_and_little_is_kept(pieces):
    reader = ConsoleReader()
    for piece in pieces:
        assert all(finding.text.isprintable() for finding in reader.feed(piece))
        assert len(reader._line) <= 1024
    assert len(reader.findings) <= 20


def test_no_more_than_twenty_are_kept():
    reader = ConsoleReader()
    told = list(reader.feed(b"microvm: too many processes\n" * 1000))
    assert len(told) == len(reader.findings) == 20


def test_a_long_line_is_cut_not_collected():
    reader = ConsoleReader()
    for _ in range(100):
        assert not list(reader.feed(b"x" * 100_000))
    assert [finding.kind for finding in reader.feed(b"\nmicrovm: too many processes\n")] == ["pids"]


def test_control_characters_are_made_visible():
    (found,) = ConsoleReader().feed(b"Kernel panic - not syncing: \x1b[2Jhello\n")
    assert found.text == "Kernel panic - not syncing: \\x1b[2Jhello"


@pytest.mark.parametrize(
    ("line", "most"), [(b"\n", 0), (b"an ordinary line\n", 0), (b"BUG: \n", console._MAX_MARKED)], ids=ascii
)
def test_a_flood_is_not_looked_at_line_by_line(monkeypatch, line, most):
    """All machines' bytes pass through one thread: a second for 256 KiB of one of them starved the others."""
    looked_at = []
    monkeypatch.setattr(console, "find", looked_at.append)
    reader = console.ConsoleReader()
    for _ in range(10):
        assert list(reader.feed(line * 20_000)) == []
    assert len(looked_at) == most


@given(
    lines=st.lists(
        st.sampled_from([b"BUG: bad\n", b"\n", b"x" * 2000, b"BUG: ", b"Oops: 1\n", b"\r\n"]), max_size=12
    ),
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=8),
)
def test_findings_do_not_depend_on_how_the_bytes_come(lines, sizes):
    data = b"".join(lines)
    whole, pieces = console.ConsoleReader(), console.ConsoleReader()
    list(whole.feed(data))
    sizes = itertools.cycle(sizes)
    while data:
        size = next(sizes)
        list(pieces.feed(data[:size]))
        data = data[size:]
    assert pieces.findings == whole.findings
