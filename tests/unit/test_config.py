"""[tool.pytest-microvm] and the command line: precedence, unknown keys, every kind of bad value."""

import os
from pathlib import Path

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.configuration import load_settings

MIB = 1024**2


@pytest.fixture
def project(tmp_path):
    def write(text, **options):
        (tmp_path / "pyproject.toml").write_text(text)
        return load_settings(tmp_path, options)

    return write


def table(text):
    return "[tool.pytest-microvm]\n" + text


def test_defaults(tmp_path):
    settings = load_settings(tmp_path, {})
    assert (settings.spec.image, settings.spec.timeout) == ("python", None)
    assert (settings.isolation, settings.keep, settings.require_accel) == ("test", "never", None)
    assert settings.project == tmp_path
    assert 1 <= settings.pool_size <= 4


def test_everything_in_the_file(project, tmp_path):
    settings = project(
        table("""
image = "microvm/kits/db"
cpus = 2
memory = "1G"
disk = "512M"
pids = 64
timeout = 12.5
cpu_seconds = 30
output = "10M"
lifetime = 60
retries = 0
artifacts = "crashes"
isolation = "module"
pool = 0
prepare = ["pip install .", "make"]
prepare_inputs = ["pyproject.toml", "src"]
args = "-v -k 'a b'"
keep = "failed"
require_accel = "kvm"
""")
    )
    spec = settings.spec
    assert (spec.image, spec.cpus, spec.memory, spec.disk, spec.timeout) == (
        "microvm/kits/db", 2, 1024 * MIB, 512 * MIB, 12.5,
    )  # fmt: skip
    assert (spec.pids, spec.cpu_seconds, spec.output, spec.lifetime) == (64, 30, 10 * MIB, 60)
    assert (settings.retries, settings.artifacts) == (0, Path("crashes"))
    assert (settings.isolation, settings.pool, settings.pool_size, settings.keep) == (
        "module",
        0,
        0,
        "failed",
    )
    assert settings.prepare == ("pip install .", "make")
    assert settings.prepare_inputs == ("pyproject.toml", "src")
    assert settings.args == ("-v", "-k", "a b")
    assert settings.require_accel == "kvm"


def test_the_command_line_wins_key_by_key(project):
    settings = project(table('cpus = 2\nmemory = "1G"\npool = 2'), cpus="4", memory=None, pool="3")
    assert (settings.spec.cpus, settings.spec.memory, settings.pool) == (4, 1024 * MIB, 3)


@pytest.mark.parametrize("text", ["", "[tool.other]\nx = 1\n", "tool = 7\n", "[project]\nname = 'x'\n"])
def test_a_file_that_says_nothing_to_us(project, text):
    assert project(text).spec.image == "python"


def test_an_unknown_key_names_file_and_known_keys(project, tmp_path):
    with pytest.raises(UsageError, match="unknown key 'cpu'") as caught:
        project(table("cpu = 2"))
    assert str(tmp_path / "pyproject.toml") in str(caught.value)
    assert (
        "known keys: args, artifacts, bandwidth, ci, connections, cpu_seconds, cpus"
        in caught.value.resolution
    )


def test_an_unknown_option(tmp_path):
    with pytest.raises(UsageError, match="command line: unknown key 'speed'"):
        load_settings(tmp_path, {"speed": 1})


@pytest.mark.parametrize(
    "line",
    [
        "image = 7", 'image = ""', "cpus = 0", "cpus = 65", "cpus = 0.01", "cpus = true", 'cpus = "two"',
        'memory = "lots"', "memory = 0", "memory = -1", "memory = true", 'memory = "64M"', "memory = [1]",
        'disk = "1M"', 'disk = "1X"', "timeout = 0", "timeout = -1", "timeout = inf", "timeout = nan",
        'timeout = "soon"', "timeout = true", "pids = 0", "pids = 1.5",
        "cpu_seconds = 0", "lifetime = -1", 'output = "much"', "retries = -1", "retries = 101",
        "artifacts = 7", 'isolation = "none"', "isolation = 1", "isolation = []",
        "pool = -1", "pool = 65", "pool = 1.5", "pool = true", 'pool = "many"', 'prepare = "pip install ."',
        "prepare = [1]", 'prepare = [""]', "prepare_inputs = {}", 'args = "unclosed \'"', "args = 7",
        'keep = "always"', "keep = true", 'require_accel = "xen"', "require_accel = false",
    ],
)  # fmt: skip
def test_bad_values_name_the_key_and_what_is_allowed(project, line):
    with pytest.raises(UsageError) as caught:
        project(table(line))
    assert line.split(" ")[0] in str(caught.value)
    assert caught.value.resolution


def test_a_table_that_is_none(project):
    with pytest.raises(UsageError, match=r"invalid tool\.pytest-microvm: expected a table, got str"):
        project('[tool]\npytest-microvm = "fast"\n')


@pytest.mark.parametrize("data", [b"[tool", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_a_file_that_is_not_toml(tmp_path, data):
    (tmp_path / "pyproject.toml").write_bytes(data)
    with pytest.raises(UsageError, match="invalid TOML"):
        load_settings(tmp_path, {})


def test_the_pool_is_as_large_as_there_are_cores(tmp_path, monkeypatch):
    for cores, size in ((None, 2), (1, 1), (2, 2), (4, 4), (64, 4)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert load_settings(tmp_path, {}).pool_size == size
