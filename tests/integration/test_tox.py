"""Real tox on real projects: an environment's every step happens in machines, and behaves as a native one."""

from __future__ import annotations

import os
import platform
import pty
import re
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest

from support import guards
from support.commands import MICROVM
from support.repositories import commit, git, repository
from support.wheels import write_wheel

PYTHON = "py313"  # what the image has
SECRETS = {
    "MY_TOKEN": "token-of-the-host",
    "SSH_AUTH_SOCK": "/run/agent.sock",
    "HTTPS_PROXY": "http://10.1.1.1:1",
}
TOX = [sys.executable, "-m", "tox"]

# The projects that install nothing say so: asking the index what it is takes seconds.
OFFLINE = ["--microvm-prepare-network", "none"]


def tox(folder, *arguments, check=None, env=None):
    """Run tox in ``folder`` and return what it did; ``check`` is the exit status that is expected."""
    variables = {**os.environ, "NO_COLOR": "1", **(env or {})}
    variables.pop("PYTEST_MICROVM_TRUST", None)
    done = subprocess.run(
        [*TOX, *arguments],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=guards.SUITE,
        check=False,
    )
    if check is not None:
        assert done.returncode == check, done.stdout
    return done


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project without a package, whose environments run what follows ``--``."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data.txt").write_text("of the host\n")
    (folder / "tox.ini").write_text(
        textwrap.dedent(f"""\
        [tox]
        env_list = {PYTHON}, second
        no_package = true

        [testenv]
        runner = microvm
        pass_env = MY_*, PATH, HOME, SSH_AUTH_SOCK
        set_env = MINE = mine
        commands = python {{posargs}}

        [testenv:commands]
        base_python = python3.13
        change_dir = sub
        commands_pre = python -c "print('pre')"
        commands =
            - python -c "raise SystemExit(3)"
            ! python -c "raise SystemExit(4)"
            python -c "import os; print('in', os.getcwd())"
            python -c "raise SystemExit(5)"
            python -c "print('not reached')"
        commands_post = python -c "print('post')"

        [testenv:ignoring]
        ignore_errors = true
        allowlist_externals = ls
        microvm_artifacts = out/*.txt
        commands =
            python -c "raise SystemExit(6)"
            ls data.txt
            python -c "import os; os.mkdir('out'); open('out/a.txt', 'w').write('made'); open('b.txt', 'w')"
            touch refused

        [testenv:granting]
        microvm_network = example.com
        """)
    )
    tox(folder, "run", "-e", PYTHON, *OFFLINE, "--notest", check=0)
    return folder


def test_paths_and_variables_are_the_machines(project):
    code = "import os, sys; print(sys.prefix, os.getcwd(), os.uname().nodename); print(dict(os.environ))"
    done = tox(project, "run", "-e", PYTHON, *OFFLINE, "--", "-c", code, check=0, env=SECRETS)
    prefix, cwd, name = re.search(r"^(\S+) (\S+) (vm-\w+)$", done.stdout, re.MULTILINE).groups()
    assert (prefix, cwd) == (str(project / ".tox" / ".microvm" / PYTHON), str(project))
    assert not Path(prefix, "bin").exists()  # there is none here
    (line,) = re.findall(r"^\{.*\}$", done.stdout, re.MULTILINE)
    variables = eval(line)  # noqa: S307 - of a test's own machine
    assert variables["MY_TOKEN"] == SECRETS["MY_TOKEN"]  # it was asked for
    assert variables["MINE"] == "mine"
    assert variables["HOME"] == "/root"
    assert variables["PATH"].split(":")[0] == f"{prefix}/bin"
    assert not set(variables["PATH"].split(":")[1:]) & {str(Path(sys.executable).parent)}
    assert not {"SSH_AUTH_SOCK", "HTTPS_PROXY", "VIRTUAL_ENV", "TMPDIR"} & set(variables)
    assert name != os.uname().nodename


def test_exit_statuses_are_native(project):
    """Those of ``-`` and ``!``, the first failing command's, and that commands_post runs all the same."""
    (project / "sub").mkdir(exist_ok=True)
    done = tox(project, "run", "-e", "commands", *OFFLINE, check=5)
    assert re.findall(r"^(?:pre|post|not reached|in .*)$", done.stdout, re.MULTILINE) == [
        "pre",
        f"in {project}/sub",
        "post",
    ]


def test_errors_are_ignored_and_externals_are_not(project):
    done = tox(project, "run", "-e", "ignoring", *OFFLINE, check=1)
    assert "\ndata.txt\n" in done.stdout
    assert "touch is not allowed, use allowlist_externals to allow it" in done.stdout
    folder = project / ".tox" / ".microvm" / "ignoring" / "artifacts"
    assert [str(path.relative_to(folder)) for path in folder.rglob("*.txt")] == ["out/a.txt"]
    assert not (project / "out").exists()
    assert not (project / "b.txt").exists()


def test_a_status_of_its_own(project):
    code = "import pathlib; pathlib.Path('data.txt').write_text('x'); raise SystemExit(41)"
    tox(project, "run", "-e", PYTHON, *OFFLINE, "--", "-c", code, check=41)
    assert (project / "data.txt").read_text() == "of the host\n"


@pytest.mark.thorough
def test_only_recreate_makes_an_environment_again(project):
    tox(project, "run", "-e", PYTHON, *OFFLINE, "--notest", check=0)
    again = tox(project, "run", "-e", PYTHON, *OFFLINE, "--notest", check=0)
    anew = tox(project, "run", "-e", PYTHON, *OFFLINE, "--notest", "-r", check=0)
    kept = tox(project, "run", "-e", PYTHON, *OFFLINE, "--notest", check=0)
    made = ["making the environment" in done.stdout for done in (again, anew, kept)]
    assert made == [False, True, False]


@pytest.mark.thorough
def test_environments_run_side_by_side(project):
    code = "import socket; print('ran in', socket.gethostname())"
    done = tox(
        project,
        "run-parallel",
        "-p",
        "2",
        "-o",
        "-e",
        f"{PYTHON},second",
        *OFFLINE,
        "--",
        "-c",
        code,
        check=0,
    )
    assert len(set(re.findall(r"ran in (vm-\w+)", done.stdout))) == 2


def test_a_python_that_the_image_has_not(project):
    failed = tox(project, "run", "-e", "py39", "-s", "false", *OFFLINE, check=1)
    assert "could not find python interpreter matching any of the specs py39" in failed.stdout
    skipped = tox(project, "run", "-e", "py39", "-s", "true", *OFFLINE)
    assert "py39: SKIP" in skipped.stdout


def test_what_the_configuration_grants_needs_a_word(project):
    refused = tox(project, "run", "-e", "granting", *OFFLINE, "--", "-c", "print('ran')", check=1)
    assert 'microvm_network = ["example.com"]' in refused.stdout
    assert "\nran\n" not in refused.stdout


def test_ctrl_c_reaches_the_command_and_no_machine_is_left(project):
    code = (
        "import sys, time\ntry:\n    print('ready', flush=True)\n    time.sleep(1000)\n"
        "except KeyboardInterrupt:\n    print('interrupted'); sys.exit(9)"
    )
    (project / "wait.py").write_text(code)
    patience = ["-x", "testenv.interrupt_timeout=60"]
    command = [*TOX, "run", "-e", PYTHON, *OFFLINE, *patience, "--", "wait.py"]
    with subprocess.Popen(
        command,
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    ) as running:
        said = []
        for line in running.stdout:
            said.append(line)
            if line == "ready\n":
                children = _descendants(running.pid)
                running.send_signal(signal.SIGINT)
        assert running.wait(guards.SUITE) != 0  # tox itself gives now the command's, now its own
    assert "interrupted\n" in said, "".join(said)
    assert any("qemu" in command for command in children.values())
    assert [pid for pid in children if Path(f"/proc/{pid}/exe").exists()] == []


def test_a_terminal_is_one_for_the_command_too(project):
    """Colours, a prompt without a newline, what is typed; and nothing that acts on this terminal."""
    code = (
        "import sys\nprint(sys.stdin.isatty(), sys.stdout.isatty())\n"
        "print('\\x1b[31mred\\x1b[0m \\x1b]0;title\\x07')\nprint('hello', input('na' + 'me? '))"
    )
    (project / "ask.py").write_text(code)
    ours, theirs = pty.openpty()
    command = [*TOX, "run", "-e", PYTHON, *OFFLINE, "--", "ask.py"]
    with subprocess.Popen(
        command, cwd=project, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as running:
        os.close(theirs)
        said, typed = b"", False
        with suppress(OSError):  # Linux's way to tell that nobody is at the other end any more
            while data := os.read(ours, 65536):
                said += data
                if b"name? " in said and not typed:
                    typed = True
                    os.write(ours, b"world\n")
        assert running.wait(guards.SUITE) == 0, said
    os.close(ours)
    assert b"True True" in said
    assert b"\x1b[31mred\x1b[0m \\x1b]0;title\\x07" in said
    assert b"hello world" in said
    assert said.count(b"world") == 2  # typed once, said once


def _descendants(pid):
    """Return the processes below ``pid`` with their command lines."""
    found = {}
    for child in Path(f"/proc/{pid}/task").glob("*/children"):
        for text in child.read_text().split():
            found[text] = Path(f"/proc/{text}/cmdline").read_text()
            found |= _descendants(text)
    return found


# A project that attacks: its build backend, setup.py and conftest.py leave marks where they run.

BACKEND = """
import os, pathlib, tarfile, zipfile

def mark(name):
    folder = pathlib.Path({marks!r})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("ran")

mark("backend")

def build_sdist(folder, config_settings=None):
    mark("sdist")
    with tarfile.open(f"{{folder}}/hostile-1.0.tar.gz", "w:gz") as archive:
        for name in ("pyproject.toml", "backend.py", "hostile.py"):
            archive.add(name, f"hostile-1.0/{{name}}")
    return "hostile-1.0.tar.gz"

def build_wheel(folder, config_settings=None, metadata_directory=None):
    mark("wheel")
    with zipfile.ZipFile(f"{{folder}}/hostile-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write("hostile.py")
        about = "hostile-1.0.dist-info"
        wheel.writestr(f"{{about}}/METADATA", "Metadata-Version: 2.1\\nName: hostile\\nVersion: 1.0\\n")
        tags = "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr(f"{{about}}/WHEEL", tags)
        wheel.writestr(f"{{about}}/RECORD", "")
    return "hostile-1.0-py3-none-any.whl"
"""


def test_nothing_of_a_hostile_project_runs_here(tmp_path):
    """With a configuration of one's own, as strangers' projects need it: tox loads a toxfile.py beside it."""
    marks, folder, trusted = tmp_path / "marks", tmp_path / "project", tmp_path / "trusted"
    folder.mkdir()
    trusted.mkdir()
    (folder / "backend.py").write_text(BACKEND.format(marks=str(marks)))
    (folder / "hostile.py").write_text("")
    for name in ("setup", "conftest", "toxfile", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"import backend; backend.mark({name!r})\n")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "hostile"\nversion = "1.0"\n'
    )
    listing = f"import conftest, os; print(sorted(os.listdir('{marks}')))"
    (trusted / "tox.ini").write_text(
        f'[testenv]\nrunner = virtualenv\ndeps = .\ncommands = python -c "{listing}"\n'
    )
    ours = ["-c", str(trusted / "tox.ini"), "--root", "."]
    done = tox(folder, "run", "--microvm", *ours, "-e", PYTHON, *OFFLINE, check=0)
    assert "\n['backend', 'conftest', 'sdist', 'wheel']\n" in done.stdout
    again = tox(folder, "run", "--microvm", *ours, "-e", PYTHON, *OFFLINE, check=0)
    assert "build_package>" in done.stdout
    assert "build_package>" not in again.stdout  # nothing has changed
    assert not marks.exists()


def test_tox_empties_no_folder_that_is_not_its_own(tmp_path):
    """tox empties an environment's folders, which its configuration chooses."""
    folder, others = tmp_path / "project", tmp_path / "others"
    folder.mkdir()
    others.mkdir()
    (others / "file").write_text("kept")
    (folder / "link").symlink_to(others)
    (folder / "tox.ini").write_text(
        f"[testenv:wiping]\nenv_log_dir = {others}\n[testenv:emptying]\nenv_dir = link\n"
    )
    for env in ("wiping", "emptying"):
        refused = tox(folder, "run", "--microvm", "-r", "-e", env, *OFFLINE, check=1)
        assert "which is not in the project" in refused.stdout
    assert (others / "file").read_text() == "kept"


def test_variables_and_files_of_this_computer_need_a_word(tmp_path):
    """Refused before a machine starts; there with the command line's word, or with trust in the file."""
    folder = tmp_path / "project"
    folder.mkdir()
    (tmp_path / ".env").write_text("FROM_FILE=file-of-the-host\n")
    shows = 'commands = python -c "import os; print(sorted(os.environ.items()))"\n'
    (folder / "tox.ini").write_text(
        f"[tox]\nno_package = true\n[testenv]\n{shows}"
        "[testenv:passing]\npass_env = MY_*, CI\nset_env = SET = {env:MY_TOKEN:nothing}\n"
        f"[testenv:reading]\nset_env = file|{tmp_path}/.env\n"
    )
    host = {**SECRETS, "CI": "yes", "XDG_STATE_HOME": str(tmp_path / "state")}

    def run(env, *options, check):
        return tox(folder, "run", "--microvm", "-e", env, *OFFLINE, *options, check=check, env=host).stdout

    for env, what in {"passing": "MY_TOKEN", "reading": f"{tmp_path}/.env"}.items():
        said = run(env, check=1)
        assert f"{what}" in said
        assert "nobody has allowed that" in said
        assert "of-the-host" not in said
    said = run("passing", "--microvm-pass-env", "none", check=0)
    assert "('CI', 'yes')" in said
    assert "('SET', 'nothing')" in said
    assert "of-the-host" not in said
    said = run("passing", "--microvm-pass-env", "MY_TOKEN", check=0)
    assert f"('MY_TOKEN', '{SECRETS['MY_TOKEN']}')" in said
    subprocess.run(
        [*MICROVM, "trust"], cwd=folder, env={**os.environ, **host}, check=True, timeout=guards.SUITE
    )
    assert "('FROM_FILE', 'file-of-the-host')" in run("reading", check=0)


@pytest.mark.thorough
def test_environment_of_this_computer_is_mirrored(tmp_path):
    """Made by plain tox; the machine gets it at the same path, and installs nothing."""
    wheel, other = write_wheel(tmp_path, "one"), write_wheel(tmp_path, "other")
    config = f"[tox]\nno_package = true\n[testenv]\nmicrovm_python = host\ndeps =\n    ./{wheel}\n"
    config += "commands = python {posargs}\nmicrovm_artifacts = out.txt\n[testenv:mine]\n[testenv:none]\n"
    (tmp_path / "tox.ini").write_text(config)
    prefix = tmp_path / ".tox" / "mine"
    missing = tox(tmp_path, "run", "--microvm", "-e", "none", *OFFLINE, check=1)
    assert "next step: run `tox -e none` once without --microvm" in missing.stdout
    tox(tmp_path, "run", "-e", "mine", "--notest", check=0, env={"PIP_NO_INDEX": "1"})
    before = {path: path.lstat().st_mtime_ns for path in prefix.rglob("*")}
    code = (
        "import one, os, platform, ssl, sys; "
        "print(sys.prefix, platform.python_version(), os.uname().nodename, one.__file__); "
        "print(sorted(os.listdir(sys.prefix))); open('out.txt', 'w'); os.remove(one.__file__)"
    )
    done = tox(tmp_path, "run", "--microvm", "-e", "mine", *OFFLINE, "--", "-c", code, check=0)
    found = re.search(r"^(\S+) (\S+) (vm-\w+) (\S+)$", done.stdout, re.MULTILINE).groups()
    assert found[:2] == (str(prefix), platform.python_version())
    assert found[3].startswith(f"{prefix}/lib/")
    assert "making the environment" not in done.stdout
    assert not {"log", ".tox-info.json"} & set(eval(re.search(r"^\[.*\]$", done.stdout, re.MULTILINE)[0]))  # noqa: S307
    assert (tmp_path / ".tox/.microvm/mine/artifacts/out.txt").exists()
    assert {path: path.lstat().st_mtime_ns for path in prefix.rglob("*")} == before
    again = tox(tmp_path, "run", "--microvm", "-e", "mine", *OFFLINE, "--", "-m", "pip", "list", check=0)
    assert re.search(r"^one +1\.0", again.stdout, re.MULTILINE)
    assert "mirroring" not in again.stdout
    (tmp_path / "tox.ini").write_text(config.replace(wheel, f"{wheel}\n    ./{other}"))
    stale = tox(tmp_path, "run", "--microvm", "-e", "mine", *OFFLINE, "--", "-V", check=1)
    assert "is stale: deps: now also" in stale.stdout


def test_tox_does_not_provision_an_untrusted_project(tmp_path):
    (tmp_path / "tox.ini").write_text("[tox]\nrequires = six==1.0.1\n[testenv]\ncommands = python -V\n")
    done = tox(tmp_path, "run", "--microvm", "-e", PYTHON, *OFFLINE)
    assert "provisioning explicitly disabled" in done.stdout
    assert done.returncode != 0


@pytest.mark.thorough
def test_a_published_package_has_native_counts(tmp_path):
    """Its own tox.ini, unchanged: a build backend from the index, and unittest."""
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", "."]
    subprocess.run([*download, "pathspec==0.12.1"], cwd=tmp_path, check=True, timeout=guards.SUITE)
    subprocess.run(["tar", "xzf", "pathspec-0.12.1.tar.gz"], cwd=tmp_path, check=True)
    folder = tmp_path / "pathspec-0.12.1"
    counts = {}
    for where, options in {"machine": ["--microvm"], "native": []}.items():
        done = tox(folder, "run", *options, "-e", PYTHON, check=0)
        counts[where] = re.search(r"^Ran (\d+) tests in .*\n\n(.*)$", done.stdout, re.MULTILINE).groups()
    assert counts["machine"] == counts["native"]
    assert int(counts["native"][0]) > 100


ASKING = """
[tox]
no_package = true
[testenv]
runner = microvm
microvm_image = agent
allowlist_externals = git
commands =
    git describe --tags --long --dirty
    git status --porcelain
"""


@pytest.mark.thorough
def test_commands_ask_git_for_the_version(tmp_path):
    folder = repository(tmp_path / "project")
    commit(folder, {"tox.ini": ASKING, ".gitignore": ".tox\n"})
    git(folder, "tag", "v1.0")
    commit(folder, {"a": "a"})
    done = tox(folder, "run", "-e", PYTHON, *OFFLINE, "--microvm-git", check=0)
    assert git(folder, "describe", "--tags", "--long") in done.stdout.splitlines()
    assert "??" not in done.stdout
    assert tox(folder, "run", "-e", PYTHON, *OFFLINE).returncode != 0
