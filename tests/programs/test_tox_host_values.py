"""What a project's tox configuration may read of this computer, with real tox; no machine is started."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from pytest_microvm.cli import main
from pytest_microvm.errors import UsageError
from pytest_microvm.settings import trust as project_trust
from pytest_microvm.tox import folders
from pytest_microvm.tox.configuration import ToxFile, find
from pytest_microvm.tox.environment import GUEST_PATH
from pytest_microvm.tox.host_values import HostValueGuard, HostValueRefused, Variables
from pytest_microvm.tox.runner import MicrovmRunner
from support import guards
from support.repositories import git, repository
from support.tiers import thorough_but

SECRET = "correct-horse"  # noqa: S105 - of a test
BEGIN = "[tox]\nno_package = true\n[testenv]\n"


@pytest.fixture(autouse=True)
def _host(tmp_path, monkeypatch):
    """A computer with a variable and a file that are nobody's business."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(project_trust.VARIABLE, raising=False)
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("MY_NAME", "me")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".env").write_text(f"TOKEN={SECRET}\n")


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def configured(folder, text, name="tox.ini"):
    (folder / name).write_text(text)
    return folder


def config(folder, *options, microvm=True):
    """Return what tox says that some keys of the environments are, by the environment."""
    words = [
        "config",
        *(["--microvm"] if microvm else []),
        *options,
        "-k",
        "set_env",
        "commands",
        "description",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tox", *words], cwd=folder, env={**os.environ, "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=guards.SUITE, check=False,
    )  # fmt: skip
    sections = done.stdout.split("[testenv:")[1:]
    return dict(section.split("]\n", 1) for section in sections)


INI = """
[x]
variable = {env:TOKEN}
file = file|{home}/.env

[testenv:variable]
set_env = A = {env:TOKEN}
[testenv:default]
set_env = A = {env:NOT_SET:{env:TOKEN}}
[testenv:command]
commands = echo {env:TOKEN}
[testenv:computed]
set_env =
    N = TOK
    A = {env:{env:N}EN}
[testenv:reference]
commands = echo {[x]variable}
[testenv:itself]
set_env = TOKEN = {env:TOKEN}
[testenv:description]
description = {env:TOKEN}
[testenv:file]
set_env = file|{home}/.env
[testenv:relative]
set_env = file|../home/.env
[testenv:link]
set_env = file|link
[testenv:section]
set_env = {[x]file}
[testenv:names]
commands = echo {glob:{home}/correct*}
"""
TOML = """
[env.text]
set_env.A = "{env:TOKEN}"
[env.table]
set_env.A = { replace = "env", name = "TOKEN" }
[env.file]
set_env = { file = "{home}/.env" }
[env.names]
commands = [["echo", { replace = "glob", pattern = "{home}/correct*" }]]
[env.condition]
description = { replace = "if", condition = "env.TOKEN == 'correct-horse'", then = "a correct-horse" }
"""
LEGACY = """
[project]
version = "1.0"
[tool.tox]
legacy_tox_ini = '''
[testenv:variable]
set_env = A = {env:TOKEN}
'''
"""
FILES = {"tox.ini": INI, "tox.toml": TOML, "pyproject.toml": LEGACY}
"""Each environment reads the variable, the file or its name in a way of its own."""


@pytest.fixture(params=thorough_but(FILES, "tox.toml", "tox.ini"))
def reading(request, project):
    """A project whose configuration reads this computer's secrets, the file, and its environments."""
    home = project.parent / "home"
    (home / SECRET).write_text("")
    (project / "link").symlink_to(home / ".env")
    text = FILES[request.param].replace("{home}", str(home))
    configured(project, text, request.param)
    environments = re.findall(r"^\[(?:testenv:|env\.)(\w+)", text, re.MULTILINE)
    return project, project / request.param, environments


def test_host_values_without_trust_are_not_read(reading):
    folder, _file, environments = reading
    said = config(folder, "-e", ",".join(environments))
    assert sorted(said) == sorted(environments)
    for text in said.values():
        assert "nobody has allowed that: the machine would have it" in text
        assert SECRET not in text


def test_native_tox_reads_it(reading):
    folder, _file, environments = reading
    said = config(folder, "-e", ",".join(environments), microvm=False)
    assert [name for name in environments if SECRET not in said[name]] == []


def test_what_was_allowed_is_read_until_it_changes(reading):
    folder, file, environments = reading
    assert main(["trust", str(folder)]) == 0
    said = config(folder, "-e", ",".join(environments))
    assert [name for name in environments if SECRET not in said[name]] == []
    file.write_text(file.read_text().replace('version = "1.0"', 'version = "2.0"'))  # which is not tox's
    assert SECRET in config(folder, "-e", environments[0])[environments[0]]
    file.write_text(
        re.sub(r"^\[(testenv:|env\.).*", r"\g<0>\n# changed", file.read_text(), flags=re.MULTILINE)
    )
    assert SECRET not in str(config(folder, "-e", ",".join(environments)))


def test_trusted_configuration_is_not_trusted_on_another_branch(tmp_path):
    folder = configured(repository(tmp_path / "repository"), BEGIN + "set_env = A = {env:TOKEN}\n")
    git(folder, "commit", "-q", "--allow-empty", "-m", "one")
    assert main(["trust", str(folder)]) == 0
    assert SECRET in config(folder, "-e", "py")["py"]
    git(folder, "checkout", "-q", "-b", "evil")
    assert SECRET not in config(folder, "-e", "py")["py"]


@pytest.mark.parametrize(
    ("named", "read"), [("TOKEN", True), ("TO*, X", True), ("none", False), ("MY_*", False)]
)
def test_the_command_line_names_variables(project, named, read):
    configured(project, BEGIN + "set_env = A = {env:TOKEN:nothing}\n")
    said = config(project, "-e", "py", "--microvm-pass-env", named)["py"]
    assert (f"A={SECRET}" in said, "A=nothing" in said) == (read, not read)


def test_who_starts_the_run_may_answer_for_it(project, monkeypatch):
    monkeypatch.setenv(project_trust.VARIABLE, "1")
    configured(project, BEGIN + f"set_env =\n  A = {{env:TOKEN}}\n  file|{project.parent}/home/.env\n")
    said = config(project, "-e", "py")["py"]
    assert f"A={SECRET}" in said
    assert f"TOKEN={SECRET}" in said


def test_honest_configurations_need_nobodys_word(project, monkeypatch):
    monkeypatch.setenv("CI", "true")
    (project / "sub").mkdir()
    (project / "sub" / ".env").write_text("FROM_FILE=1\n")
    configured(
        project,
        BEGIN + "set_env =\n  file|sub/.env\n  A = {env:CI}\n  B = {env:NOT_SET:else}\n  C = {env:A}\n"
        "  D = {env:HOME}:{env:SSH_AUTH_SOCK:none}\n  E = {env:PATH}\n  F = {glob:sub/.e*}\n",
    )
    said = config(project, "-e", "py")["py"]
    for line in (
        "FROM_FILE=1",
        "A=true",
        "B=else",
        "C=true",
        "D=/root:none",
        f"E={GUEST_PATH}",
        f"F={project}/sub/.env",
    ):
        assert f"\n  {line}\n" in said, said


def test_passed_variables_need_a_word(project):
    file = ToxFile(project, configured(project, BEGIN) / "tox.ini")
    with pytest.raises(HostValueRefused, match="reads the variables MY_NAME, TOKEN of this computer"):
        HostValueGuard(file).allowed(["TOKEN", "LANG", "MY_NAME"])
    assert HostValueGuard(file).allowed(["LANG", "LC_ALL", "CI"]) == {"LANG", "LC_ALL", "CI"}
    assert HostValueGuard(file, ["MY_*"]).allowed(["TOKEN", "LANG", "MY_NAME"]) == {"LANG", "MY_NAME"}
    assert HostValueGuard(file, []).allowed(["TOKEN"]) == set()
    project_trust.trust(project, [project_trust.Grant("tox", "", keys=file.asked)])
    assert HostValueGuard(ToxFile(project, file.path)).allowed(["TOKEN"]) == {"TOKEN"}


def test_requirements_do_not_read_variables(project):
    """Some versions of tox expand ${NAME} in them from all of this computer's variables."""
    code = """
from pathlib import Path
from tox.report import HandledError
from tox.tox_env.python.pip.req_file import PythonDeps
from pytest_microvm.tox.configuration import ToxFile
from pytest_microvm.tox.host_values import HostValueGuard, install
deps = PythonDeps("six==${TOKEN}", Path())
print(deps.as_root_args)
install(HostValueGuard(ToxFile(Path().resolve(), Path("tox.ini").resolve())))
try:
    print(PythonDeps("six==${TOKEN}", Path()).as_root_args)
except HandledError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, check=True, capture_output=True, text=True
    )
    before, after = done.stdout.splitlines()
    assert before == f"['six=={SECRET}']"
    assert "reads the variables TOKEN of this computer" in after


def test_the_runner_passes_what_is_allowed(project, monkeypatch):
    file = ToxFile(project, configured(project, BEGIN) / "tox.ini")
    monkeypatch.setenv("CI", "true")
    assert MicrovmRunner._load_pass_env(["TOK*"]) == {"TOKEN": SECRET}  # as in native tox
    monkeypatch.setattr(MicrovmRunner, "guard", HostValueGuard(file))
    with pytest.raises(HostValueRefused, match="TOKEN"):
        MicrovmRunner._load_pass_env(["*"])
    assert MicrovmRunner._load_pass_env(["CI", "NOT_SET"]) == {"CI": "true"}
    monkeypatch.setattr(MicrovmRunner, "guard", HostValueGuard(file, ["MY_NAME"]))
    assert MicrovmRunner._load_pass_env(["TOKEN", "MY_*"]) == {"MY_NAME": "me"}


def test_names_of_places_are_the_machines_even_if_all_is_allowed(project, monkeypatch):
    monkeypatch.setenv(project_trust.VARIABLE, "1")
    monkeypatch.setenv("GNUPGHOME", "/x")
    variables = Variables(HostValueGuard(ToxFile(project, project / "tox.ini")))
    assert variables["HOME"] == "/root"
    assert "GNUPGHOME" not in variables
    assert variables.get("TOKEN") == SECRET


def test_the_project_is_the_folder_of_its_configuration(project):
    folders.check_read("tox_root", project / "sub", project)
    (project / "link").symlink_to(project.parent)
    for path in (project.parent, project / "link", project / ".."):
        with pytest.raises(UsageError, match=r"tox_root is .*, which is not in the project"):
            folders.check_read("tox_root", path, project)


@pytest.mark.parametrize(
    ("line", "key"),
    [("tox_root = {home}", "tox_root"), ("package_root = {home}", "package_root")],
)
def test_a_configuration_names_no_other_folder_as_the_project(project, line, key):
    home = project.parent / "home"
    configured(project, f"[tox]\n{line.format(home=home)}\n[testenv]\npackage = wheel\n")
    (project / "pyproject.toml").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "tox", "run", "-e", "py", "--microvm"], cwd=project, text=True, check=False,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=guards.SUITE,
    )  # fmt: skip
    assert done.returncode
    assert f"{key} is {home}, which is not in the project" in done.stdout + done.stderr


# What is shown before


def test_the_command_shows_what_tox_reads(project, capsys):
    configured(
        project,
        "[testenv]\npass_env =\n  TOKEN\n  MY_*\nset_env =\n  file|/x/.env\n  A = {env:OTHER}\n"
        "microvm_network = a.example\n",
    )
    assert main(["trust", str(project), "--show"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{project}/tox.ini, a folder without a repository, asks for"
    assert said[1].startswith('  tox = "tox.ini (sha256 ')
    assert said[2:] == [
        "  reads variables, where they are set: MY_*, OTHER, TOKEN",
        "  reads files: /x/.env",
        '  microvm_network = "a.example"',
        "not allowed for a folder without a repository",
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tox.toml", 'env_list = ["py"]\n'), ("tox.ini", "[testenv]\ncommands = pytest\n"),
        ("setup.cfg", "[metadata]\n"), ("pyproject.toml", "[tool.other]\n"), ("tox.ini", "no ini"),
        ("tox.toml", "no = toml ="),
    ],
)  # fmt: skip
def test_a_configuration_that_reads_nothing_asks_for_nothing(project, name, text, capsys):
    configured(project, text, name)
    assert main(["trust", str(project)]) == 0
    assert capsys.readouterr().out == "it asks for nothing\n"


def test_the_same_file_as_toxs_counts(project):
    configured(project, "[tool.tox]\nenv_list = ['a']\n", "pyproject.toml")
    configured(project, "", "tox.toml")
    assert find(project).path.name == "pyproject.toml"
    configured(project, "[metadata]\n", "setup.cfg")
    assert find(project).path.name == "pyproject.toml"
    configured(project, "[tox:tox]\n", "setup.cfg")
    assert find(project).path.name == "setup.cfg"
    configured(project, "")
    assert find(project).path.name == "tox.ini"


def test_a_file_that_is_too_long_is_refused(project):
    with pytest.raises(UsageError, match="more than"):
        ToxFile(project, configured(project, "#" * 1024 * 1025) / "tox.ini").asked  # noqa: B018
