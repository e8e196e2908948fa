"""Every input of the fuzzers' corpus once, so that what fuzzing has found stays found without it."""

import pytest

from fuzz.targets import CORPUS, TARGETS

INPUTS = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_input(path):
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\xff" * 100, bytes(range(256)) * 4, b"{" * 5000], ids=range(5)
)
def test_anything(name, data):
    TARGETS[name](data)


def test_every_target_has_seeds():
    assert {path.parent.name for path in INPUTS} == set(TARGETS)
