"""What of a Python environment is mirrored into machines, on environments made of a few files."""

import dataclasses
import importlib.util
import os
import random
import re
import socket
import stat
import struct
import sys
from pathlib import Path

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.images.mirror import environment as environments
from pytest_microvm.images.mirror import layer
from pytest_microvm.images.mirror.environment import environment_at, running_environment
from pytest_microvm.images.mirror.libraries import Dynamic, LibrarySearch, glibc_version, read_dynamic
from pytest_microvm.images.mirror.selection import CREDENTIALS, compiled_is_valid, select

EMPTY = Dynamic("EM_X86_64")


def write(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def base(tmp_path):
    base = tmp_path / "pythons" / "3.13.5"
    library = base / "lib" / "python3.13"
    write(library / "os.py")
    write(library / "encodings" / "__init__.py")
    write(library / "site-packages" / "of_base.py")
    write(library / "test" / "test_os.py")
    write(library / "idlelib" / "idle_test" / "test_x.py")
    write(library / "config-3.13-x86_64-linux-gnu" / "libpython3.13.a")
    write(base / "bin" / "python3.13").chmod(0o755)
    write(base / "bin" / "2to3")
    write(base / "share" / "man" / "python.1")
    return base


@pytest.fixture
def prefix(tmp_path, base):
    prefix = tmp_path / "project" / ".venv"
    write(
        prefix / "pyvenv.cfg", f"home = {base}/bin\nversion = 3.13.5\ninclude-system-site-packages = false\n"
    )
    (prefix / "bin").mkdir()
    (prefix / "bin" / "python").symlink_to("python3")
    (prefix / "bin" / "python3").symlink_to(base / "bin" / "python3.13")
    site = prefix / "lib" / "python3.13" / "site-packages"
    write(site / "package" / "__init__.py")
    write(site / "package-1.0.dist-info" / "METADATA")
    return prefix


def site_of(prefix):
    return prefix / "lib" / "python3.13" / "site-packages"


def mirrored(prefix, without=None):
    return select(environment_at(prefix), without=without)


def test_virtual_environment_is_read_from_its_files(prefix, base):
    found = environment_at(prefix)
    assert (found.prefix, found.base, found.version) == (prefix, base, "3.13.5")
    assert found.sites == (site_of(prefix),)
    assert found.describe() == ".venv (CPython 3.13.5, 1 package)"


def test_running_environment_is_this_one():
    found = running_environment()
    assert (str(found.prefix), str(found.base)) == (sys.prefix, sys.base_prefix)
    assert Path(pytest.__file__).parents[1] in found.sites
    assert Path(os.__file__).parent in found.standard_libraries


def test_system_packages_belong_to_it_if_it_uses_them(prefix, base):
    config = prefix / "pyvenv.cfg"
    config.write_text(config.read_text().replace("= false", "= true"))
    assert environment_at(prefix).sites == (site_of(prefix), base / "lib" / "python3.13" / "site-packages")
    assert str(base / "lib/python3.13/site-packages/of_base.py") in mirrored(prefix).entries


def test_uv_writes_other_keys(prefix, base):
    (prefix / "pyvenv.cfg").write_text(f"home = {base}/bin\nuv = 0.9.1\nversion_info = 3.13.5\n")
    assert environment_at(prefix).base == base


def test_home_that_is_a_folder_of_links(prefix, base, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "python3.13").symlink_to(base / "bin" / "python3.13")
    (prefix / "pyvenv.cfg").write_text(f"home = {tmp_path}/links\nversion = 3.13.5\n")
    assert environment_at(prefix).base == base


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"expected a pyvenv\.cfg in it"),
        ("home = /usr/bin\n", r"expected version and home in pyvenv\.cfg"),
        ("home = /nowhere/bin\nversion = 3.13.5\n", "its Python is no longer in /nowhere/bin"),
    ],
)
def test_folder_that_is_no_environment_is_refused(prefix, config, message):
    (prefix / "pyvenv.cfg").unlink()
    if config is not None:
        (prefix / "pyvenv.cfg").write_text(config)
    with pytest.raises(UsageError, match=message):
        environment_at(prefix)


def test_other_implementations_are_refused(monkeypatch):
    monkeypatch.setattr(environments.platform, "python_implementation", lambda: "PyPy")
    with pytest.raises(UsageError, match=r"PyPy is not CPython\n.*--microvm-python=image"):
        running_environment()


def test_files_of_the_environment_and_its_interpreter_go_in(prefix, base):
    entries = mirrored(prefix).entries
    wanted = [
        prefix / "pyvenv.cfg",
        prefix / "bin/python",
        prefix / "bin/python3",
        site_of(prefix) / "package/__init__.py",
        base / "bin/python3.13",
        base / "lib/python3.13/os.py",
    ]
    assert {str(path) for path in wanted} <= set(entries)
    assert entries[f"{prefix}/bin/python3"].target == str(base / "bin" / "python3.13")


@pytest.mark.parametrize(
    "name",
    ["test/test_os.py", "idlelib/idle_test", "site-packages", "config-3.13-x86_64-linux-gnu"],
)
def test_parts_of_the_standard_library_stay_out(prefix, base, name):
    entries = mirrored(prefix).entries
    assert str(base / "lib/python3.13" / name) not in entries
    assert str(base / "share") not in entries


@pytest.mark.parametrize("name", [name.replace("*", "a") for name in CREDENTIALS])
def test_names_of_credentials_stay_out(prefix, name):
    write(prefix / name)
    write(site_of(prefix) / "package" / name)
    assert not [path for path in mirrored(prefix).entries if path.endswith("/" + name)]


def test_reference_lists_the_names_of_credentials():
    page = (Path(__file__).parents[2] / "docs/reference/options.md").read_text()
    section = page.partition("## The mirrored environment")[2].partition("\n## ")[0]
    listed = section.partition("alike:\n")[2].partition("\nSo do")[0]
    assert re.findall(r"`([^`]+)`", listed) == list(CREDENTIALS)


@pytest.mark.parametrize("name", [".git/config", ".mypy_cache/a", "lib/libx.a", ".pytest_cache/v"])
def test_caches_and_archives_stay_out(prefix, name):
    write(prefix / name)
    assert str(prefix / name) not in mirrored(prefix).entries


def test_sockets_and_pipes_stay_out(prefix):
    os.mkfifo(prefix / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(prefix / "socket"))
    assert not {str(prefix / "pipe"), str(prefix / "socket")} & set(mirrored(prefix).entries)


@pytest.mark.parametrize(
    "name",
    [
        "pytest_microvm/__init__.py",
        "pytest_microvm-0.1.0.dist-info/entry_points.txt",
        "_editable_impl_pytest_microvm.pth",
        "__editable__.pytest_microvm-0.1.0.pth",
    ],
)
def test_own_package_stays_out(prefix, name):
    write(site_of(prefix) / name, "/usr\n")
    assert str(site_of(prefix) / name) not in mirrored(prefix).entries


def test_own_package_stays_out_of_other_packages_that_a_pth_file_adds(prefix, tmp_path):
    other = tmp_path / "other" / "site-packages"
    write(other / "module.py")
    write(other / "pytest_microvm-0.1.0.dist-info" / "entry_points.txt")
    write(site_of(prefix) / "other.pth", f"{other}\n")
    entries = mirrored(prefix).entries
    assert str(other / "module.py") in entries
    assert str(other / "pytest_microvm-0.1.0.dist-info") not in entries


def test_conda_keeps_its_package_cache_here(base):
    write(base / "conda-meta" / "history")
    write(base / "pkgs" / "numpy.conda")
    entries = select(environments.PythonEnvironment(base, base, "3.13.5", shares_base=True)).entries
    assert str(base / "lib/python3.13/site-packages/of_base.py") in entries
    assert str(base / "share/man/python.1") in entries
    assert not {str(base / "pkgs"), str(base / "conda-meta")} & set(entries)


def compiled(source, *, flags=0, mtime=None):
    folder = source.parent / "__pycache__"
    folder.mkdir(exist_ok=True)
    found = source.stat()
    time = int(found.st_mtime) if mtime is None else mtime
    path = folder / f"{source.stem}.cpython-313.pyc"
    path.write_bytes(b"\xf3\r\r\n" + struct.pack("<III", flags, time, found.st_size))
    return path


def test_compiled_modules_go_in_if_they_are_of_their_source(prefix):
    source = site_of(prefix) / "package" / "__init__.py"
    path = compiled(source)
    entries = mirrored(prefix).entries
    assert str(path) in entries
    assert compiled_is_valid(str(path), entries)
    compiled(source, mtime=1)
    assert not compiled_is_valid(str(path), entries)
    compiled(source, flags=1, mtime=1)  # by content
    assert compiled_is_valid(str(path), entries)
    source.unlink()
    assert not compiled_is_valid(str(path), mirrored(prefix).entries)


def test_compiled_modules_of_other_pythons_stay_out(prefix):
    folder = site_of(prefix) / "package" / "__pycache__"
    write(folder / "__init__.cpython-312.pyc")
    write(site_of(prefix) / "old.pyc")
    assert not [path for path in mirrored(prefix).entries if path.endswith(".pyc")]


def test_digest_changes_with_a_file_and_not_with_a_compiled_one(prefix):
    before = mirrored(prefix).digest
    compiled(site_of(prefix) / "package" / "__init__.py")
    assert mirrored(prefix).digest == before
    write(site_of(prefix) / "package" / "__init__.py", "other")
    assert mirrored(prefix).digest != before


def test_editable_sources_elsewhere_go_in(prefix, tmp_path):
    for name in ("flat", "mapped"):
        write(tmp_path / name / "src" / name / "__init__.py")
        write(tmp_path / name / "src" / ".git" / "config")
        write(tmp_path / name / "src" / "env" / "pyvenv.cfg")
    write(site_of(prefix) / "flat.pth", f"# a comment\nimport flat_hook\n{tmp_path}/flat/src\n/nowhere\n")
    finder = f"MAPPING: dict[str, str] = {{'mapped': '{tmp_path}/mapped/src/mapped'}}\nNAMESPACES = {{}}\n"
    write(site_of(prefix) / "__editable___mapped_1_0_finder.py", finder)
    found = mirrored(prefix)
    assert found.editable == [tmp_path / "mapped/src/mapped", tmp_path / "flat/src"]
    assert str(tmp_path / "flat/src/flat/__init__.py") in found.entries
    assert str(tmp_path / "mapped/src/mapped/__init__.py") in found.entries
    assert not {str(tmp_path / "flat/src/.git"), str(tmp_path / "flat/src/env")} & set(found.entries)


def test_editable_sources_in_the_workspace_come_with_it(prefix):
    source = write(prefix.parent / "src" / "own" / "__init__.py")
    write(site_of(prefix) / "own.pth", f"{prefix.parent}/src\n")
    found = mirrored(prefix, without=prefix.parent)
    assert found.editable == []
    assert str(source) not in found.entries


def test_finder_is_read_and_not_executed(prefix, tmp_path):
    finder = f"open({str(tmp_path / 'sprung')!r}, 'w')\nMAPPING = dict(a=1)\n"
    write(site_of(prefix) / "__editable___evil_finder.py", finder)
    assert mirrored(prefix).editable == []
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("folder", ["/", "/usr", "~", "above"])
def test_editable_installation_of_too_much_is_refused(prefix, folder):
    folder = prefix.parent.parent if folder == "above" else Path(folder).expanduser()
    write(site_of(prefix) / "wide.pth", f"{folder}\n")
    with pytest.raises(UsageError, match="expected a project's folder"):
        mirrored(prefix)


def test_links_out_of_the_environment_are_followed(prefix, tmp_path):
    write(tmp_path / "cache" / "module.py")
    write(tmp_path / "store" / "deep" / "file.py")
    (tmp_path / "hop").symlink_to("store")
    site = site_of(prefix)
    (site / "module.py").symlink_to(tmp_path / "cache" / "module.py")
    (site / "deep").symlink_to(tmp_path / "hop" / "deep")
    (site / "dangling").symlink_to("/nowhere/at/all")
    (site / "root").symlink_to("/")
    entries = mirrored(prefix).entries
    assert {
        str(tmp_path / "cache/module.py"),
        str(tmp_path / "hop"),
        str(tmp_path / "store/deep/file.py"),
    } <= set(entries)
    assert entries[str(site / "root")].target == "/"
    assert "/etc" not in entries


def test_environment_behind_a_link_keeps_both_paths(prefix, tmp_path):
    (tmp_path / "link").symlink_to(prefix.parent)
    entries = mirrored(tmp_path / "link" / ".venv").entries
    assert entries[str(tmp_path / "link")].target == str(prefix.parent)
    assert stat.S_ISREG(entries[str(prefix / "pyvenv.cfg")].mode)


def test_tox_files_with_values_of_this_computer_stay_out(prefix):
    for name in ("log/1.log", "tmp/a", "constraints.txt"):
        write(prefix / name)
        assert str(prefix / name) in mirrored(prefix).entries
    write(prefix / ".tox-info.json", "{}")
    names = {os.path.relpath(path, prefix) for path in mirrored(prefix).entries}
    assert not {".tox-info.json", "log", "log/1.log", "tmp", "constraints.txt"} & names


# A stranger's environment


def confined(prefix):
    return select(dataclasses.replace(environment_at(prefix), confined=True)).entries


def test_confined_environment_has_its_files_and_its_python(prefix, base, tmp_path):
    (tmp_path / "alias").symlink_to(base / "bin" / "python3.13")
    (prefix / "bin" / "python3.13").symlink_to(tmp_path / "alias")
    (prefix / "lib64").symlink_to("lib")
    assert confined(prefix).keys() == mirrored(prefix).entries.keys()
    assert str(tmp_path / "alias") in confined(prefix)


@pytest.mark.parametrize("target", ["file", "folder", "hop/file", "hop", "base/lib/python3.13/site-packages"])
def test_confined_environment_does_not_lead_elsewhere(prefix, base, tmp_path, target):
    write(tmp_path / "private" / "folder" / "file")
    write(tmp_path / "private" / "file")
    (tmp_path / "private" / "base").symlink_to(base)
    (tmp_path / "hop").symlink_to("private")
    (tmp_path / "private" / "hop").symlink_to(tmp_path / "hop" / "folder")
    (site_of(prefix) / "link").symlink_to(tmp_path / "private" / target)
    with pytest.raises(UsageError, match="link leads out of the environment and of its Python"):
        confined(prefix)


@pytest.mark.parametrize("folder", ["lib", "lib/python3.13", "lib/python3.13/site-packages"])
def test_confined_environment_has_no_folder_of_another(prefix, tmp_path, folder):
    (tmp_path / "other").mkdir()
    (prefix / folder).rename(tmp_path / "other" / "lib")
    (prefix / folder).symlink_to(tmp_path / "other" / "lib")
    with pytest.raises(UsageError, match="leads out of the environment and of its Python"):
        confined(prefix)


def test_confined_link_to_nothing_or_to_a_left_out_file_stays(prefix, tmp_path):
    write(prefix / ".cache" / "a")
    write(tmp_path / "private" / "file")
    (tmp_path / "hop").symlink_to("private")
    for name, target in {"cached": ".cache/a", "nothing": tmp_path / "hop" / "nothing"}.items():
        (prefix / name).symlink_to(target)
    entries = confined(prefix)
    assert {str(prefix / "cached"), str(prefix / "nothing")} <= entries.keys()
    assert not {str(prefix / ".cache/a"), str(tmp_path / "hop"), str(tmp_path / "private")} & entries.keys()


def test_links_of_the_base_are_followed_even_if_confined(prefix, base, tmp_path):
    write(tmp_path / "etc" / "sitecustomize.py")
    (base / "lib" / "python3.13" / "sitecustomize.py").symlink_to(tmp_path / "etc" / "sitecustomize.py")
    assert str(tmp_path / "etc" / "sitecustomize.py") in confined(prefix)


def test_confined_environment_has_no_editable_sources_elsewhere(prefix, tmp_path):
    source = write(tmp_path / "private" / "module.py")
    write(site_of(prefix) / "private.pth", f"{tmp_path}/private\n")
    write(site_of(prefix) / "__editable___a_finder.py", f"MAPPING = {{'a': '{tmp_path}/private'}}\n")
    assert str(source) not in confined(prefix)


@pytest.mark.parametrize(
    "text", ["(" * 100_000, "MAPPING = " + "[" * 5000, "MAPPING = -" + "-" * 90_000 + "1"]
)
def test_finder_of_deep_nesting_is_none(prefix, text):
    write(site_of(prefix) / "__editable___a_finder.py", text)
    assert list(environment_at(prefix).editable_sources()) == []


def test_pipe_in_place_of_a_pth_file_does_not_block(prefix):
    os.mkfifo(site_of(prefix) / "pipe.pth")
    assert list(environment_at(prefix).editable_sources()) == []


def test_file_exchanged_for_a_link_is_not_read(prefix, tmp_path):
    secret = write(tmp_path / "private" / "__init__.py", "secret")
    package = site_of(prefix) / "package"
    with layer._Files(prefix) as files:
        with files.open(str(package / "__init__.py")) as file:
            assert file.read() == b"x"
        with files.open(str(secret)) as file:  # chosen by the base, or by the user's own environment
            assert file.read() == b"secret"
    package.rename(tmp_path / "package")
    package.symlink_to(secret.parent)
    with layer._Files(prefix) as files, pytest.raises(FileNotFoundError):
        files.open(str(package / "__init__.py"))


def test_circle_of_links_ends(prefix):
    (prefix / "a").symlink_to("b")
    (prefix / "b").symlink_to("a")
    assert str(prefix / "a") in mirrored(prefix).entries


def libraries_of(*files):
    return LibrarySearch().closure([Path(os.path.realpath(file)) for file in files])


def test_libraries_of_the_interpreter_are_found():
    found = libraries_of(sys.executable)
    assert "libc.so.6" in found
    assert any(name.startswith("ld-linux") for name in found)
    assert "libm.so.6" in found  # all parts of glibc, loaded or not
    assert all(path.is_file() for path in found.values())


def test_libraries_of_libraries_are_found():

    crypto = libraries_of(importlib.util.find_spec("_hashlib").origin)

    assert [name for name in crypto if name.startswith("libcrypto")]


def test_glibc_version_is_that_of_this_computer():
    found = libraries_of(sys.executable)["libc.so.6"].read_bytes()
    assert f"glibc 2.{glibc_version(found)}" == os.confstr("CS_GNU_LIBC_VERSION")
    assert glibc_version(b"musl libc") == 0


@pytest.mark.parametrize("place", ["environment", "base"])
def test_libraries_elsewhere_are_not_found_for_a_stranger(monkeypatch, tmp_path, place):
    environment, base = tmp_path / "environment", tmp_path / "base"
    program = write(tmp_path / place / "program")
    write(environment / "own.so")
    write(base / "base.so")
    write(tmp_path / "private.so")
    write(base / "packages" / "below.so")
    (environment / "link.so").symlink_to(tmp_path / "private.so")
    absolute = (f"{tmp_path}/private.so", f"{base}/packages/below.so", f"{base}/../private.so")
    names = ("own.so", "base.so", "link.so", *absolute, "libm.so.6")
    needs = Dynamic("EM_X86_64", names, (str(environment), str(base)))
    inherits = Dynamic("EM_X86_64", ("private.so",), (str(tmp_path),))
    read = {program: needs, base / "base.so": inherits}
    monkeypatch.setattr(
        LibrarySearch, "_read", lambda _self, p: read.get(p) or (EMPTY if p.exists() else None)
    )
    everything = {"own.so", "base.so", "link.so", "private.so", "below.so", "libm.so.6"}
    assert LibrarySearch().closure([program]).keys() >= everything
    found = LibrarySearch(confined=environment, base=[base]).closure([program]).keys() & everything
    assert found == (everything if place == "base" else {"own.so", "base.so", "libm.so.6"})


@pytest.mark.parametrize("size", [0, 3, 4, 40, 64, 200, 4000])
def test_damaged_elf_file_has_no_libraries(tmp_path, size):
    file = tmp_path / "damaged.so"
    file.write_bytes(Path(os.path.realpath(sys.executable)).read_bytes()[:size])
    assert libraries_of(file) == {}


def test_elf_file_with_wrong_bytes_is_read_or_left_out(tmp_path):
    content = Path(os.path.realpath(sys.executable)).read_bytes()[:20_000]
    choose = random.Random(1)  # noqa: S311 - of a test
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(4):
            at = choose.randrange(4, choose.choice([64, 600, 20_000]) - 8)
            damaged[at : at + 8] = choose.choice([choose.randbytes(8), b"\xff" * 8, bytes(8)])
        (tmp_path / "damaged.so").write_bytes(damaged)
        assert isinstance(read_dynamic(tmp_path / "damaged.so"), Dynamic | None)


def test_folders_of_the_loader_include_configured_ones(tmp_path):
    write(tmp_path / "ld.so.conf.d" / "own.conf", "/opt/own/lib # theirs\n")
    write(tmp_path / "ld.so.conf", "include ld.so.conf.d/*.conf\n/opt/first\ninclude ld.so.conf\n")
    folders = LibrarySearch(tmp_path / "ld.so.conf").folders
    assert folders[:2] == ("/opt/own/lib", "/opt/first")
    assert "/usr/lib" in folders


def test_dynamic_section_names_needed_libraries():
    found = read_dynamic(Path(os.path.realpath(sys.executable)))
    assert found is not None
    assert "libc.so.6" in found.needed
    assert re.match(r"/lib(64)?/", found.interpreter)
