"""The tox plug-in's parts that need no machine: variables, requirement files, interpreters, output, trust."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tox.config.cli.parser import Parsed
from tox.execute.request import ExecuteRequest, StdinSource
from tox.tox_env.errors import Fail
from tox.tox_env.python.api import PythonInfo, VersionInfo

from pytest_microvm.cli import main
from pytest_microvm.errors import UsageError
from pytest_microvm.settings import trust as project_trust
from pytest_microvm.tox import environment, folders, settings
from pytest_microvm.tox.configuration import ToxFile
from pytest_microvm.tox.display import TerminalText
from pytest_microvm.tox.executor import allowed_command
from pytest_microvm.tox.installer import InstallPlan
from pytest_microvm.tox.interpreters import chosen
from pytest_microvm.tox.package import Package, plan_package
from pytest_microvm.tox.requirements import Needed, is_local, needed

# Variables

HOST = {
    "PATH": "/home/me/bin", "HOME": "/home/me", "SSH_AUTH_SOCK": "/run/agent", "https_proxy": "http://10.0.0.1",
    "TMPDIR": "/var/me", "VIRTUAL_ENV": "/home/me/venv", "TOX_PARALLEL_ENV": "x", "TOKEN": "t", "CI": "true",
}  # fmt: skip


def test_what_names_something_of_this_computer_is_never_passed():
    assert environment.passed(["*"], HOST) == {"TOKEN": "t", "CI": "true"}
    assert environment.passed(["path", "home", "HTTPS_PROXY"], HOST) == {}


def test_only_what_is_named_is_passed():
    assert environment.passed([], HOST) == {}
    assert environment.passed(["tok*"], HOST) == {"TOKEN": "t"}
    assert environment.passed(environment.PASSED, {**HOST, "FORCE_COLOR": "1"}) == {"FORCE_COLOR": "1"}


def test_a_template_is_made_with_nothing_that_was_passed():
    variables = {"PATH": "/x", "TOKEN": "t", "MINE": "1", "PYTHONHASHSEED": "17"}
    assert environment.prepared_with(variables, ["TOKEN"]) == {"PATH": "/x", "MINE": "1"}


def test_the_search_path_is_the_machines():
    assert environment.path_of(["/p/bin"], None) == f"/p/bin:{environment.GUEST_PATH}"
    assert environment.path_of(["/p/bin"], "/opt/x:/p/bin:") == "/p/bin:/opt/x"


# Requirements


@pytest.mark.parametrize(
    "text",
    ["six", "six==1.0 ; python_version > '3'", "a[b,c]>=2", "x @ https://files.example/x.whl",
     "six --hash=sha256:0", "a.b-c", "https://files.example/x-1.tar.gz", "git+https://git.example/x@main"],
)  # fmt: skip
def test_requirements_of_an_index_or_url_are_not_local(text):
    assert not is_local(text)


@pytest.mark.parametrize(
    "text",
    [".", ".[test]", "./libs/a", "libs/a", "/srv/x", "a-1.whl", "x @ file:///srv/x", "file:///srv/x", "../a"],
)
def test_what_lies_in_the_project(text):
    assert is_local(text)


def test_requirement_files_are_followed(tmp_path):
    (tmp_path / "requirements").mkdir()
    (tmp_path / "r.txt").write_text(
        "-r requirements/test.txt\n-c c.txt # why\n--index-url https://x.example\n"
    )
    (tmp_path / "requirements/test.txt").write_text("six \\\n  ==1.0\n-r ../r.txt\n")
    (tmp_path / "c.txt").write_text("")
    found = needed(["six", "-r", "r.txt"], tmp_path)
    assert found == Needed(("r.txt", "requirements/test.txt", "c.txt"), all=False)


@pytest.mark.parametrize("line", ["-e .", "./libs/a", "--find-links=wheels", "-f wheels"])
def test_what_installs_from_the_project_needs_all_of_it(tmp_path, line):
    (tmp_path / "r.txt").write_text(f"six\n{line}\n-r more.txt\n")
    (tmp_path / "more.txt").write_text("")
    assert needed(["-r", "r.txt"], tmp_path) == Needed(("r.txt", "more.txt"), all=True)
    assert needed(["-e", "."], tmp_path).all
    assert not needed(["-i", "https://x.example", "six", "-f", "https://x.example"], tmp_path).all


def test_a_requirement_file_is_not_fetched_here(tmp_path):
    assert needed(["-r", "https://x.example/r.txt"], tmp_path) == Needed()


def test_requirement_file_outside_the_project_is_refused(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (tmp_path / "r.txt").write_text("six")
    (project / "link.txt").symlink_to("../r.txt")
    for name in ("../r.txt", str(tmp_path / "r.txt"), "link.txt"):
        with pytest.raises(UsageError, match="is not in the project"):
            needed(["-r", name], project)


# Packages


class Noting:
    """An installer that notes."""

    def __init__(self):
        self.noted = []

    def package_constraints(self):
        return ["-c", "c.txt"]

    def note(self, args, of_type):
        self.noted.append((args, of_type))

    def install(self, arguments, _section, of_type):
        self.noted.append((sorted(map(str, arguments)), of_type))


def planned(how, root, **changes):
    plan, installer = InstallPlan(), Noting()
    wanted = {
        "extras": frozenset(),
        "given": None,
        "env_dir": Path("/p/env"),
        "python": Path("/p/env/bin/python"),
    }
    plan_package(Package(how=how, root=root, **{**wanted, **changes}), installer, plan)
    return plan, installer.noted


def test_how_a_package_is_installed(tmp_path):
    built, requirement = "/p/env/.pkg", ["-r", "/p/env/.pkg/package.txt", "-c", "c.txt"]
    for how, built_how in {"sdist": "sdist", "sdist-wheel": "sdist", "wheel": "wheel"}.items():
        plan, noted = planned(how, tmp_path, extras=frozenset("ba"))
        script = "/p/env/build_package.py"
        command = ("/p/env/bin/python", "-I", script, built_how, str(tmp_path), built, "[a,b]")
        assert plan.commands == [(command, "build_package")]
        assert set(plan.files) == {script}
        assert noted == [(requirement, "package")]
    plan, noted = planned("editable", tmp_path, extras=frozenset("a"))
    assert noted == [(["-e", f"{tmp_path}[a]", "-c", "c.txt"], "package")]
    assert (plan.commands, plan.files) == ([], {})
    plan, noted = planned("external", tmp_path, given=Path("/dist/x-1.whl"))
    assert plan.pushed == {f"{built}/x-1.whl": Path("/dist/x-1.whl")}
    assert plan.files == {f"{built}/package.txt": f"{built}/x-1.whl\n"}
    assert noted == [(requirement, "package")]


def test_dependencies_alone_have_to_be_written_down(tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\nname = "x"\ndependencies = ["six"]\n')
    assert planned("deps-only", tmp_path)[1] == [(["six"], "package_deps")]
    project.write_text('[project]\nname = "x"\ndynamic = ["dependencies"]\n')
    with pytest.raises(Fail, match="deps-only"):
        planned("deps-only", tmp_path)


# Folders


def test_tox_empties_what_is_its_own(tmp_path):
    folder = tmp_path / ".tox" / "py"
    folders.check_environment(folder, [tmp_path])
    (folder / "log").mkdir(parents=True)
    (folder / ".tox-info.json").write_text("{}")
    (folder / "log" / "1-run.log").write_text("")
    folders.check_environment(folder, [tmp_path])
    folders.check_logs(folder / "log", [tmp_path])


def test_tox_empties_nothing_else(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "code.py").write_text("")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "link").symlink_to(tmp_path)
    for folder, roots in [
        (tmp_path / "src", [tmp_path]),
        (tmp_path, [tmp_path]),
        (tmp_path / "p" / "link", [tmp_path / "p"]),
        (tmp_path / "p" / ".." / "x", [tmp_path / "p"]),
    ]:
        for check in (folders.check_environment, folders.check_logs):
            with pytest.raises(UsageError, match=r"env_.*dir is "):
                check(folder, roots)


def test_new_folder_outside_the_allowed_ones_is_refused(tmp_path):
    folders.check_made("change_dir", Path("/"), [tmp_path])  # it is there
    folders.check_made("change_dir", tmp_path / "a" / "b", [tmp_path])
    with pytest.raises(UsageError, match="change_dir is "):
        folders.check_made("change_dir", tmp_path / "b", [tmp_path / "a"])


class Config:
    """tox's configuration of a project in ``root``."""

    def __init__(self, root, said=None, **core):
        values = {"tox_root": root, "work_dir": root / ".tox", "temp_dir": root / ".tox" / ".tmp", **core}
        self.core = SimpleNamespace(get=lambda key, _type: values[key])
        self.options = SimpleNamespace(work_dir=said)


def test_core_folders_outside_the_project_are_refused(tmp_path):
    root, outside = tmp_path / "project", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "link").symlink_to(root)
    folders.check_core(Config(root), root)
    folders.check_core(Config(root, temp_dir=outside), root)  # it is there: tox does nothing
    folders.check_core(Config(root, said=outside, work_dir=outside), root)
    for key in ("tox_root", "work_dir", "temp_dir"):
        with pytest.raises(UsageError, match=f"{key} is .* not in the project"):
            folders.check_core(Config(root, **{key: outside / "new"}), root)
    for link in (outside / "link", root / ".." / "outside" / "link"):
        with pytest.raises(UsageError, match=r"temp_dir is .*, a link which is not in the project"):
            folders.check_core(Config(root, temp_dir=link), root)


def test_links_that_tox_would_write_through_are_refused(tmp_path):
    (tmp_path / ".tox").mkdir()
    for name in ("CACHEDIR.TAG", ".gitignore"):
        link = tmp_path / ".tox" / name
        link.symlink_to("elsewhere")
        with pytest.raises(UsageError, match="tox would write through it"):
            folders.check_core(Config(tmp_path), tmp_path)
        link.unlink()
    (tmp_path / ".tox-info.json").symlink_to("elsewhere")
    with pytest.raises(UsageError, match="no file of tox"):
        folders.check_environment(tmp_path, [tmp_path.parent])


def test_loop_of_links_leads_nowhere(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert not folders.is_below(tmp_path / "loop", tmp_path)


def test_pipe_in_a_files_place_is_refused(tmp_path):
    folders.check_file("pylock", tmp_path / "none", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="which is no file"):
        folders.check_file("pylock", tmp_path / "pipe", tmp_path)


# Interpreters


def python(minor, called="/usr/bin/python3", implementation="CPython"):
    version = VersionInfo(3, minor, 2, "final", 0)
    return PythonInfo(implementation, version, f"3.{minor}.2", True, "linux", {"called": called})


def test_the_first_python_that_is_asked_for():
    image = [python(11), python(9, "/usr/bin/python3.9"), python(10, "/usr/bin/pypy3", "PyPy")]
    for specs, expected in [
        (["py311"], 0), (["python3.9"], 1), (["3.12", "3.9"], 1), (["pypy3"], 2), (["pypy310"], 2),
        (["py"], 0), (["/opt/mine/python3.9"], 1), ([sys.executable], 0), (["python3"], 0),
        (["3.11.2"], 0), (["py312"], None), (["3.11.7"], None), (["jython"], None), (["pypy311"], None),
    ]:  # fmt: skip
        assert chosen(specs, image) is (None if expected is None else image[expected]), specs


# Output


def test_terminal_text_keeps_only_colours_and_progress():
    data = b"\x1b[31mred\x1b[0m 10%\r20%\x1b[K\r\n\x1b]0;title\x07\x1b[2Jend"
    whole = TerminalText().feed(data, final=True)
    assert whole == b"\x1b[31mred\x1b[0m 10%\r20%\x1b[K\r\n\\x1b]0;title\\x07\\x1b[2Jend"


def test_a_terminals_output_may_come_in_any_pieces():
    data = "\x1b[31mré\x1b[0m\r\n\x1b]0;x\x07\x1b[1;2".encode()
    whole = TerminalText().feed(data, final=True)
    for size in range(1, len(data)):
        text = TerminalText()
        pieces = [text.feed(data[at : at + size]) for at in range(0, len(data), size)]
        assert b"".join([*pieces, text.feed(b"", final=True)]) == whole


def test_a_prompt_without_a_newline_comes_at_once():
    assert TerminalText().feed(b"name? ") == b"name? "


# Commands


class Files:
    """A machine that has these files."""

    def __init__(self, *paths):
        self.paths = paths

    def path(self, path):
        return SimpleNamespace(is_file=lambda: str(path) in self.paths)


def request(*cmd, allow):
    return ExecuteRequest(
        cmd, Path("/p"), {"PATH": "/p/env/bin:/usr/bin"}, StdinSource.OFF, "run", allow=allow
    )


def test_commands_of_the_environment_and_of_the_list_are_allowed():
    machine = Files("/p/env/bin/pytest", "/usr/bin/ls")
    own = ["/p/env/bin/*"]
    assert allowed_command(request("pytest", "-q", allow=own), machine) == ["/p/env/bin/pytest", "-q"]
    assert allowed_command(request("ls", allow=[*own, "ls"]), machine) == ["ls"]
    assert allowed_command(request("ls", allow=[*own, "/usr/bin/l?"]), machine) == ["/usr/bin/ls"]
    assert allowed_command(request("ls", allow=["*"]), machine) == ["ls"]
    with pytest.raises(Fail, match="ls is not allowed, use allowlist_externals to allow it"):
        allowed_command(request("ls", allow=own), machine)
    with pytest.raises(Fail, match=r"\./x is not allowed"):
        allowed_command(request("./x", allow=own), machine)


def test_what_the_machine_has_not_is_left_to_fail():
    assert allowed_command(request("nothing", allow=["/p/env/bin/*"]), Files()) == ["nothing"]


# Settings and trust


class Conf(dict):
    """An environment's configuration."""

    name = "py"

    def __init__(self, **values):
        super().__init__(
            {f"microvm_{name}": values.get(name, key.default) for name, key in settings.KEYS.items()}
        )


def options(**values):
    given = {"microvm_image": None, "microvm_network": None, "microvm_prepare_network": None, **values}
    return Parsed(**given)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(project_trust.VARIABLE, raising=False)
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def tox_file(project):
    return ToxFile(project, project / "tox.ini")


def test_defaults_ask_for_nothing(project):
    read = settings.read(Conf(), options(), project, tox_file(project))
    assert (read.spec.image, read.spec.network, read.spec.secrets) == ("python", (), ())
    assert read.spec.python == "image"
    assert (read.prepare.network, read.artifacts) == (("pip",), ())


def test_quotas_are_read(project):
    read = settings.read(
        Conf(memory="1G", cpus="2", timeout="60", artifacts=["*.xml"]), options(), project, tox_file(project)
    )
    assert (read.spec.memory, read.spec.cpus, read.spec.timeout) == (1024**3, 2, 60.0)
    assert (read.prepare.memory, read.artifacts) == (1024**3, ("*.xml",))
    with pytest.raises(UsageError, match="tox environment py: memory"):
        settings.read(Conf(memory="much"), options(), project, tox_file(project))


def test_python_of_the_host_is_asked_for_by_a_key(project, monkeypatch):
    conf = Conf(python="host")
    conf["system_site_packages"] = False
    assert settings.read(conf, options(), project, tox_file(project)).spec.python == "host"
    with pytest.raises(UsageError, match="python: invalid value: expected one of host, image, got 'other'"):
        settings.read(Conf(python="other"), options(), project, tox_file(project))
    conf["system_site_packages"] = True
    with pytest.raises(UsageError, match="nobody has allowed that") as refused:
        settings.read(conf, options(), project, tox_file(project))
    assert refused.value.details.startswith("microvm_python = ")
    monkeypatch.setenv(project_trust.VARIABLE, "1")
    assert settings.read(conf, options(), project, tox_file(project)).spec.python == "host"


@pytest.mark.parametrize(
    "asked",
    [
        {"network": ["a.example"]},
        {"prepare_network": ["pip", "a.example"]},
        {"secrets": ["TOKEN=env:TOKEN"]},
        {"credentials": ["host=a.example,env=KEY"]},
        {"hosts": ["a.example=10.0.0.1"]},
        {"git": True},
    ],
)
def test_what_the_configuration_grants_needs_a_word(project, monkeypatch, asked):
    with pytest.raises(UsageError, match="nobody has allowed that") as refused:
        settings.read(Conf(**asked), options(), project, tox_file(project))
    assert refused.value.details.startswith(f"microvm_{next(iter(asked))} = ")
    monkeypatch.setenv(project_trust.VARIABLE, "1")
    monkeypatch.setenv("TOKEN", "t")
    settings.read(Conf(**asked), options(), project, tox_file(project))


def test_grants_count_once_their_file_was_allowed(project):
    (project / "tox.ini").write_text("[testenv]\nmicrovm_network = a.example\n")
    conf = Conf(network=["a.example"])
    with pytest.raises(UsageError, match="nobody has allowed that for a folder"):
        settings.read(conf, options(), project, tox_file(project))
    assert main(["trust", str(project)]) == 0
    assert settings.read(conf, options(), project, tox_file(project)).spec.network == ("a.example",)
    (project / "tox.ini").write_text("[testenv]\nmicrovm_network = b.example\n")
    with pytest.raises(UsageError, match="nobody has allowed that for a folder"):
        settings.read(conf, options(), project, tox_file(project))


def test_less_needs_none(project):
    assert (
        settings.read(Conf(prepare_network=[]), options(), project, tox_file(project)).prepare.network == ()
    )


def test_the_command_line_replaces_the_configuration(project):
    conf = Conf(network=["a.example"], prepare_network=["all"])
    given = options(microvm_network="pip, b.example", microvm_prepare_network="none")
    read = settings.read(conf, given, project, tox_file(project))
    assert (read.spec.network, read.prepare.network) == (("pip", "b.example"), ())
    assert not read.git
    assert settings.read(Conf(git=True), options(microvm_git=True), project, tox_file(project)).git


def test_a_kit_of_the_projects_own_needs_a_word(project):
    kit = project / "microvm" / "kits" / "mine"
    kit.mkdir(parents=True)
    (kit / "kit.toml").write_text('description = "x"\nparent = "base"\nsetup = ["touch /tmp/built"]\n')
    (project / "tox.ini").write_text("[testenv]\nmicrovm_image = mine\n")
    with pytest.raises(UsageError, match="nobody has allowed that") as refused:
        settings.read(Conf(image="mine"), options(), project, tox_file(project))
    assert refused.value.details.startswith('tox.image.mine = "mine (sha256 ')
    assert main(["trust", str(project)]) == 0
    settings.read(Conf(image="mine"), options(), project, tox_file(project))
    (kit / "kit.toml").write_text('description = "x"\nparent = "base"\nsetup = ["touch /tmp/other"]\n')
    with pytest.raises(UsageError, match="nobody has allowed that"):
        settings.read(Conf(image="mine"), options(), project, tox_file(project))


# The plug-in


def test_loading_it_imports_nothing_heavy():
    code = (
        "import tox.run, sys; before = set(sys.modules);"
        "import pytest_microvm.tox.plugin, pytest_microvm.tox.runner;"
        "print(sorted(name for name in set(sys.modules) - before if name.startswith('pytest_microvm')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = {"pytest_microvm.tox.plugin", "pytest_microvm.tox"}
    light = ("environment", "failures", "folders", "generation", "installer", "runner")
    names |= {f"pytest_microvm.tox.{name}" for name in light}
    assert set(eval(done.stdout)) <= {"pytest_microvm", "pytest_microvm.errors", *names}  # noqa: S307 - ours


def test_the_option_switches_every_runner(monkeypatch, tmp_path):
    from tox.plugin.manager import MANAGER  # noqa: PLC0415 - tox is only needed here
    from tox.tox_env.register import REGISTER  # noqa: PLC0415

    from pytest_microvm.tox.options import switch_over  # noqa: PLC0415
    from pytest_microvm.tox.runner import MicrovmRunner  # noqa: PLC0415

    MANAGER.load_plugins(tmp_path / "tox.ini")
    monkeypatch.setattr(REGISTER, "_run_envs", dict(REGISTER._run_envs))
    given = Parsed(no_provision=False)
    switch_over(given)
    assert given.no_provision is True
    assert {"virtualenv", "microvm"} <= set(REGISTER.env_runners)
    assert all(issubclass(REGISTER.runner(name), MicrovmRunner) for name in REGISTER.env_runners)
    assert all(REGISTER.runner(name).id() == name for name in REGISTER.env_runners)
