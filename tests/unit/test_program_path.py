"""Programs are not searched in the folder that a command starts in."""

import os

import pytest

from pytest_microvm.untrusted.program_path import absolute_path


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("/bin:/usr/bin", "/bin:/usr/bin"),
        (":/bin::/usr/bin:", "/bin:/usr/bin"),
        (".:/bin:tools/bin:..", "/bin"),
        ("", os.defpath),
        (".", os.defpath),
    ],
)
def test_relative_entries_are_left_out(monkeypatch, path, kept):
    monkeypatch.setenv("PATH", path)
    assert absolute_path() == kept


def test_no_path_is_the_systems(monkeypatch):
    monkeypatch.delenv("PATH")
    assert absolute_path() == os.defpath
