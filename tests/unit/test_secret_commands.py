"""Commands that give secrets: their environment, and that nothing of the project stands behind them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.secret_values import SecretSource

PYTHON = Path(sys.executable).resolve()  # not the one of a virtual environment, which may be in a project
ENVIRONMENT = f"{PYTHON} -c 'import json, os; print(json.dumps([os.getcwd(), dict(os.environ)]))'"
TOUCH = "#!/bin/sh\necho token\ntouch {mark}\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder that the run starts in, with a script of the branch that leaves a mark."""
    folder = tmp_path / "project"
    (folder / "bin").mkdir(parents=True)
    for name in ("token.sh", "bin/token"):
        script(folder / name, TOUCH.format(mark=tmp_path / "ran"))
    monkeypatch.chdir(folder)
    return folder


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


def value(command, project):
    return SecretSource("command", command).read("secrets: K", project).reveal()


def refused(command, project, why="belongs to the project"):
    with pytest.raises(UsageError, match=why) as caught:
        value(command, project)
    assert not (project.parent / "ran").exists()
    return str(caught.value)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_does_not_find_the_projects_makefile(project, tmp_path):
    (project / "Makefile").write_text(f"token:\n\t@echo token; touch {tmp_path / 'ran'}\n")
    refused("make -s token", project, "ended with status 2")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "Makefile").write_text("token:\n\t@echo token\n")
    assert value(f"make -s -C {outside} token", project) == "token"


def test_python_does_not_find_the_projects_module(project, tmp_path, monkeypatch):
    (project / "mod.py").write_text(f"print('token'); open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", str(project))
    refused(f"{PYTHON} -m mod", project, "ended with status 1")
    assert value(f"{PYTHON} -c 'print(\"token\")'", project) == "token"


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_npm_does_not_find_the_projects_script(project, tmp_path):
    (project / "package.json").write_text(
        json.dumps({"scripts": {"token": f"echo token; touch {tmp_path / 'ran'}"}})
    )
    refused("npm run --silent token", project, "ended with status")


@pytest.mark.parametrize(
    "command",
    [
        "{project}/token.sh", "sh {project}/token.sh", "sh '{project}/token.sh' now", "sh {name}/token.sh",
        "{project}/../project/token.sh", "env --chdir={project} ./token.sh", "make -C{project} token",
        "sh -c '. {project}/token.sh'", "sh -c 'cd {project}; make token'",
        "cat $HOME/project/key", "cat ~/project/key", "cat --files=a:{project}/key", "cat token.sh",
        "sh bin/token", "make -C /proc/self/cwd token", "sh -c 'make -C /proc/$PPID/cwd token'",
        "cat file://{project}/key", "{link}", "sh {link}", "sh {through}",
    ],
)  # fmt: skip
def test_a_word_that_names_the_projects_files_is_refused(project, tmp_path, monkeypatch, command):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(project / "token.sh")
    elsewhere = script(tmp_path / "elsewhere.sh", "echo token")
    (project / "out").symlink_to(elsewhere)  # a branch decides where it leads
    (tmp_path / "through").symlink_to(project / "out")
    places = {"project": project, "name": str(project)[1:], "link": tmp_path / "link"}
    refused(command.format(through=tmp_path / "through", **places), project)


def test_a_path_with_spaces_is_seen(tmp_path, project):
    spaced = tmp_path / "my project"
    project.rename(spaced)
    refused(f"sh '{spaced}/token.sh'", spaced)
    refused(f"sh '--file={spaced}/token.sh'", spaced)


def test_words_that_name_nothing_of_the_project_stay(project, tmp_path):
    outside = script(tmp_path / "give", "#!/bin/sh\necho $*\n")
    words = f"/{project.name} project token https://a.example/project {project}-other/x -m a=b"
    assert value(f"{outside} {words}", project) == words


@pytest.mark.parametrize("command", ["./token.sh", "bin/token", "../project/token.sh"])
def test_a_relative_program_is_refused(project, command):
    refused(command, project, "is relative to the folder")


@pytest.mark.parametrize("entry", ["{project}/bin", "bin", ".", "", "{link}"])
def test_the_search_path_has_nothing_of_the_projects(project, tmp_path, monkeypatch, entry):
    (tmp_path / "link").symlink_to(project / "bin")
    monkeypatch.chdir(project / "bin")
    entry = entry.format(project=project, link=tmp_path / "link")
    monkeypatch.setenv("PATH", f"{entry}:{os.environ['PATH']}")
    refused("token", project, "no such program")
    (tmp_path / "tools").mkdir()
    script(tmp_path / "tools" / "token", "#!/bin/sh\necho mine\n")
    monkeypatch.setenv("PATH", f"{entry}:{tmp_path / 'tools'}:{os.environ['PATH']}")
    assert value("token", project) == "mine"


def test_a_program_on_the_path_that_is_a_link_into_the_project(project, tmp_path, monkeypatch):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "token").symlink_to(project / "token.sh")
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:{os.environ['PATH']}")
    refused("token", project)


def test_a_script_whose_interpreter_is_the_projects(project, tmp_path):
    outside = script(tmp_path / "give", f"#!{project}/token.sh\n")
    refused(str(outside), project)


def test_the_repository_around_the_project_is_a_branchs_too(project, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (project / ".git").mkdir()
    (project / "sub").mkdir()
    refused(f"sh {project}/token.sh", project / "sub")
    (project / ".git").rmdir()
    assert value(f"sh {project}/token.sh", project / "sub") == "token"


def test_a_repository_of_the_home_is_not_in_the_way(project, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".git").mkdir()
    assert value(str(script(tmp_path / "give", "#!/bin/sh\necho token\n")), project) == "token"


def test_it_starts_in_the_root_with_few_variables(project, tmp_path, monkeypatch):
    for name in os.environ:
        monkeypatch.delenv(name)
    given = {
        "PATH": f"{project}/bin:bin::/usr/bin:/bin", "HOME": str(tmp_path), "LANG": "C.UTF-8", "LC_TIME": "C",
        "DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/user/1000/bus", "SSH_AUTH_SOCK": "/run/agent",
        "GPG_TTY": "/dev/pts/0", "OP_SESSION_me": "x", "NO_PROXY": "localhost,.example",
    }  # fmt: skip
    others = {
        "PYTHONPATH": "/x", "BASH_ENV": "/x", "MAKEFLAGS": "-C /x", "NODE_OPTIONS": "-r /x",
        "PASSWORD_STORE_DIR": f"{project}/store", "GNUPGHOME": str(project), "TOKEN": "t",
        "XDG_CONFIG_HOME": f"{project}/../project", "LD_PRELOAD": "", "GIT_SSH_COMMAND": "x",
    }  # fmt: skip
    for name, text in {**given, **others}.items():
        monkeypatch.setenv(name, text)
    folder, variables = json.loads(value(ENVIRONMENT, project))
    assert folder == "/"
    variables.pop("LC_CTYPE", None)  # Python's own, PEP 538
    assert variables == {**given, "PATH": "/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("an unfinished 'quote", "invalid command"),
        ("''", "is empty"),
        ("true " + "x" * 4096, "longer than"),
        ("printf a\0b", "NUL"),
        ("no-such-program-of-anybody", "no such program"),
        ("/no/such/program", "could not be run"),
    ],
)
def test_what_cannot_be_started(project, command, why):
    refused(command, project, why)


def test_without_a_project_every_absolute_path_will_do(project):
    assert value(f"sh {project}/token.sh", None) == "token"
