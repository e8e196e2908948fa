"""An environment that tox made on this computer, described from files that a stranger may have written."""

import os
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.tox import folders
from pytest_microvm.tox.native import find_python, native_environment


@pytest.fixture
def base(tmp_path):
    base = tmp_path / "pythons" / "3.13.5"
    for name in ("lib/python3.13/os.py", "lib/python3.13/encodings/__init__.py", "bin/python3.13"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("")
    return base


@pytest.fixture
def folder(tmp_path, base):
    folder = tmp_path / "project" / ".tox" / "py"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(base / "bin" / "python3.13")
    (folder / ".tox-info.json").write_text('{"PythonRun": {}}')
    config(folder, base / "bin")
    return folder


def config(folder, home, version="3.13.5", more=""):
    (folder / "pyvenv.cfg").write_text(f"home = {home}\nversion_info = {version}.final.0\n{more}")


def python(base, **changes):
    known = {
        "system_executable": str(base / "bin" / "python3.13"),
        "system_prefix": str(base),
        "implementation": "CPython",
        "version_info": (3, 13, 5, "final", 0),
        "version": "3.13.5 (main)",
        "architecture": 64,
        "platform": "linux",
    }
    return SimpleNamespace(**{**known, **changes})


def found(folder, base, **changes):
    return native_environment(folder, lambda version: python(base, **changes), "run tox once")


def test_environment_is_described_from_its_files(folder, base):
    asked = []
    native = native_environment(folder, lambda version: asked.append(version) or python(base), "run tox")
    environment = native.environment
    assert asked == ["3.13.5"]
    assert (environment.prefix, environment.base, environment.version) == (folder, base, "3.13.5")
    assert (environment.shares_base, environment.confined) == (False, True)
    assert (native.python.version_dot, native.record) == ("3.13", {"PythonRun": {}})
    config(folder, base / "bin", more="include-system-site-packages = true\n")
    assert found(folder, base).environment.shares_base


def test_base_keeps_the_path_by_which_python_finds_it(folder, base, tmp_path):
    (tmp_path / "pythons" / "3.13").symlink_to("3.13.5")
    config(folder, tmp_path / "pythons" / "3.13" / "bin")
    assert found(folder, base).environment.base == tmp_path / "pythons" / "3.13"
    config(folder, f"{base}/lib/../bin")
    assert found(folder, base).environment.base == base


def test_program_that_is_a_link_elsewhere_has_its_base(folder, base, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "python3.13").symlink_to(base / "bin" / "python3.13")
    program = str(tmp_path / "links" / "python3.13")
    for home in (tmp_path / "links", base / "bin"):
        config(folder, home)
        assert found(folder, base, system_executable=program).environment.base == base


@pytest.mark.parametrize(
    ("home", "version"),
    [
        ("bin", "3.13.5"), ("", "3.13.5"), ("/bin\0", "3.13.5"), ("/usr/bin", "2.7.18"), ("/usr/bin", "3.13"),
        ("/usr/bin", "3.13.5555"), ("/usr/bin", "3.13.5".rjust(2 * 1024**2, "0")),
    ],
)  # fmt: skip
def test_invalid_pyvenv_cfg_is_refused(folder, base, home, version):
    config(folder, home, version)
    with pytest.raises(UsageError, match=r"expected version and home in pyvenv\.cfg|has more than \d+ bytes"):
        found(folder, base)


@pytest.mark.parametrize(
    "home", ["private/bin", "pythons/3.13.5", "pythons/3.13.5/bin/../../other/bin", "loop"]
)
def test_base_that_tox_does_not_find_is_refused(folder, base, tmp_path, home):
    for other in ("private", "pythons/other"):
        for name in ("lib/python3.13/os.py", "lib/python3.13/encodings/__init__.py", "bin/python3.13"):
            (tmp_path / other / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / other / name).write_text("")
    (tmp_path / "loop").symlink_to("loop")
    config(folder, tmp_path / home)
    with pytest.raises(UsageError, match="which tox does not find on this computer"):
        found(folder, base)
    with pytest.raises(UsageError, match="which tox does not find on this computer") as refused:
        native_environment(folder, lambda _version: None, "run tox")
    assert refused.value.resolution == "run tox"


def test_pypy_is_refused(folder, base):
    with pytest.raises(UsageError, match="only CPython can be mirrored"):
        found(folder, base, implementation="PyPy")


@pytest.mark.parametrize("name", ["pyvenv.cfg", ".tox-info.json"])
def test_file_of_the_environment_is_not_read_through_a_link_or_pipe(folder, base, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=f"is no virtual environment of tox: it has no {name}"):
        found(folder, base)
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a link, and links of a project are not followed"):
        found(folder, base)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UsageError, match="is no regular file"):
        found(folder, base)


@pytest.mark.parametrize("text", ["", "[]", "1", "{", "[" * 100_000, f'{{"a": {"1" * 5000}}}'])
def test_damaged_record_is_refused(folder, base, text):
    (folder / ".tox-info.json").write_text(text)
    with pytest.raises(UsageError, match=r"has a damaged \.tox-info\.json"):
        found(folder, base)


def test_python_that_is_gone_is_refused(folder, base):
    (base / "bin" / "python3.13").unlink()
    with pytest.raises(UsageError, match="its Python is gone"):
        found(folder, base)


def test_environment_behind_a_link_of_the_project_is_refused(folder, tmp_path):
    project = tmp_path / "project"
    folders.check_mirrored(folder, [project], project)
    (project / "link").symlink_to(folder.parent)
    with pytest.raises(UsageError, match="is a link of the project"):
        folders.check_mirrored(project / "link" / "py", [project], project)
    with pytest.raises(UsageError, match="which is not in the project"):
        folders.check_mirrored(tmp_path, [project], project)


def test_editable_sources_decide_whether_the_package_is_a_copy(folder, base, tmp_path):
    site = folder / "lib" / "python3.13" / "site-packages"
    site.mkdir(parents=True)
    native = found(folder, base)
    (site / "long.pth").write_text("a" * 10_000 + "\n\0\n")
    (site / "other.pth").write_text(f"{tmp_path}\n")
    assert not found(folder, base).imports_from(tmp_path / "project")
    (site / "own.pth").write_text(f"{tmp_path}/project\n")
    assert native.imports_from(tmp_path / "project")


# Programs are found as tox finds them


def test_running_python_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_python(platform.python_version(), tmp_path, [])
    assert found.system_prefix == sys.base_prefix
    assert find_python("3.6.99", tmp_path, []) is None


@pytest.mark.parametrize("where", ["project/bin", "elsewhere"])
def test_program_of_the_project_is_not_started(tmp_path, monkeypatch, where):
    program = tmp_path / where / "python3.6"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho started >> {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert find_python("3.6.99", tmp_path / "project", []) is None
    assert Path(tmp_path / "started").exists() == (where == "elsewhere")
