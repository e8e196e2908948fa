"""What machines say they have executed: checked, bounded, and about files of this computer alone."""

import contextlib
import json
import os
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import coverage
import pytest
from hypothesis import HealthCheck, given, settings

from pytest_microvm.errors import ProtocolViolation
from pytest_microvm.suite import machine_coverage
from pytest_microvm.suite.executed import MeasuredFiles, parse_executed
from pytest_microvm.suite.machine_coverage import MachineCoverage
from pytest_microvm.suite.measuring import machine_settings, measures_workers
from pytest_microvm.untrusted.text import sanitize_line
from support.replayed_reports import mutated

GOOD = {
    "k": "coverage",
    "told": ["loaded in machines before they measure: a"],
    "found": [["", "lines", __file__, "1 2 30"], ["context", "lines", __file__, "4"]],
    "tracers": {},
    "touched": {__file__: ""},
    "unseen": ["never"],
    "children": [{"found": [["", "arcs", __file__, "-1 1 1 2"]], "tracers": {}, "touched": {}}],
}


@pytest.fixture
def measuring(tmp_path):
    return coverage.Coverage(data_file=str(tmp_path / "data"), config_file=False)


@pytest.fixture
def made(measuring, tmp_path):
    """The plug-in of a run in the folder of the tests."""
    config = SimpleNamespace(invocation_params=SimpleNamespace(dir=tmp_path))
    plugin = MachineCoverage(config, measuring, Path(__file__).parent)
    yield plugin
    plugin.pytest_unconfigure()


def finish(plugin, status=0):
    session = SimpleNamespace(exitstatus=status)
    plugin.pytest_sessionfinish(session)
    return session.exitstatus


def test_what_machines_execute_is_added(made, measuring, tmp_path):
    made.add(GOOD)
    made.add({**GOOD, "found": [["", "lines", __file__, "7"]], "unseen": ["never", "other"], "children": []})
    assert finish(made) == 0
    data = measuring.get_data()
    assert sorted(data.lines(__file__)) == [1, 2, 4, 7, 30]
    assert data.contexts_by_lineno(__file__)[4] == ["context"]
    assert [*made._lines()] == [*GOOD["told"], "module never was never imported"]
    (child,) = tmp_path.glob("data.*")
    read = coverage.CoverageData(str(child))
    read.read()
    assert read.has_arcs()
    assert sorted(read.arcs(__file__)) == [(-1, 1), (1, 2)]
    read.close()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(record=mutated([GOOD]))
def test_mutated_records(measuring, tmp_path, record):
    config = SimpleNamespace(invocation_params=SimpleNamespace(dir=tmp_path))
    plugin = MachineCoverage(config, measuring, Path(__file__).parent)
    if isinstance(record, dict):
        with contextlib.suppress(ProtocolViolation):
            plugin.add(record)
    assert not plugin._error
    assert all(line == sanitize_line(line, 1_000_000) for line in plugin._lines()), [*plugin._lines()]
    plugin.pytest_unconfigure()


def test_amount_is_limited(made, monkeypatch):
    monkeypatch.setattr(machine_coverage, "_MAX_SIZE", 10_000_000)
    large = [[str(number), "lines", __file__, "9999999"] for number in range(20)]
    made.add({**GOOD, "found": large, "children": []})
    assert made._kept == {}
    assert finish(made) == pytest.ExitCode.TESTS_FAILED
    assert "ERROR: it could not be added: it takes more than" in [*made._lines()][-1]


def test_files_of_this_computer(tmp_path):
    folder, outside = tmp_path / "project", tmp_path / "outside.py"
    folder.mkdir()
    (folder / "own.py").touch()
    outside.touch()
    (folder / "link.py").symlink_to(outside)
    (tmp_path / "spelled").symlink_to(folder)
    files = MeasuredFiles(tmp_path / "spelled", tmp_path / "spelled")
    own = os.path.realpath(folder / "own.py")
    installed = str(Path(sysconfig.get_path("purelib"), "pytest", "__init__.py"))
    assert files.name_of(str(tmp_path / "spelled" / "own.py")) == own
    assert files.name_of("own.py") == "own.py"
    assert files.name_of(installed) == os.path.realpath(installed)
    for name in (
        "link.py",
        str(outside),
        "../outside.py",
        "x/../own.py",
        "/etc/passwd",
        "no.py",
        "a\x1bb.py",
        ".",
    ):
        assert files.name_of(name) is None
    assert len(files.left_out) == 8


def test_plugin_that_this_computer_does_not_have(tmp_path):
    (tmp_path / "a.html").touch()
    (tmp_path / "b.html").touch()
    record = {
        "found": [["", "lines", "a.html", "1"], ["", "lines", "b.html", "1"]],
        "tracers": {"a.html": "known.Plugin", "b.html": "other.Plugin"},
        "touched": {"a.html": "", "b.html": ""},
    }
    files = MeasuredFiles(tmp_path, tmp_path)
    executed = parse_executed(record, files, frozenset(["known.Plugin"]))
    assert [places.file for places in executed.places] == ["a.html"]
    assert executed.tracers == {"a.html": "known.Plugin"}
    assert executed.touched == {"a.html"}
    assert [*files.left_out] == ["b.html"]


def settings_of(measuring, folder):
    return machine_settings(measuring, folder, folder)


def test_settings_are_the_same_from_absolute_ones(tmp_path):
    """As a worker of pytest-xdist gets them from its controller."""
    (tmp_path / "src").mkdir()
    (tmp_path / ".coveragerc").write_text("[run]\npatch = subprocess\n")
    common = {"branch": True, "config_file": str(tmp_path / ".coveragerc")}
    one = coverage.Coverage(
        data_file="d/data", source=["src", "package"], include=["a/*", "*/b.py"], omit=["c.py"], **common
    )
    absolute = [str(tmp_path / name) for name in ("d/data", "src", "a/*", "c.py")]
    two = coverage.Coverage(
        data_file=absolute[0], source=[absolute[1], "package"], include=[absolute[2], "*/b.py"],
        omit=[absolute[3]], **common,
    )  # fmt: skip
    settings, told = settings_of(one, tmp_path)
    assert (settings, told) == settings_of(two, tmp_path)
    assert told == []
    assert settings["config_file"] == str(tmp_path / ".coveragerc")
    assert settings["options"]["run:source"] == [absolute[1], "package"]
    assert json.loads(json.dumps(settings)) == settings
    assert measures_workers(one)


def test_settings_of_a_file_outside_the_workspace(tmp_path):
    file, workspace = tmp_path / "rc", tmp_path / "project"
    workspace.mkdir()
    file.write_text("[run]\npatch = subprocess, _exit\nconcurrency = multiprocessing\n")
    settings, told = settings_of(coverage.Coverage(config_file=str(file)), workspace)
    assert settings["config_file"] is None
    assert settings["options"]["run:patch"] == ["_exit"]
    assert settings["options"]["run:concurrency"] == []
    assert set(told) == {f"child processes are not measured: {file} is outside the workspace"}
