"""Hostile projects, each through `tox run --microvm` (real machines), and through `tox run` as a control."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import guards
from support.attacks import Attack, Listener, entry_folders_where

TOX = Path(sys.executable).with_name("tox")
OFFLINE = ["--microvm", "--microvm-prepare-network", "none"]
SECRET = "correct-horse"  # noqa: S105 - of a test


@pytest.fixture
def listener():
    with Listener() as server:
        yield server
        server.shutdown()


@pytest.fixture
def attack(request, tmp_path):
    """The project, beside a file and a folder that have a secret in their content and their names."""
    project = tmp_path / "project"
    project.mkdir()
    made = Attack(request.param, project)
    made.outside.write_text(f"ATTACK_SECRET={SECRET}\n")
    (made.folder / SECRET).write_text("")
    made.before = made.look()
    return made


def run_tox(attack, listener, *words):
    """Run tox in the project, and return its status and what it has shown."""
    proxy = f"http://127.0.0.1:{listener.server_address[1]}"
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("TOX", "PIP_"))}
    variables |= {
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), proxy),
        "ATTACK_SECRET": SECRET,
        "NO_COLOR": "1",
        "PIP_RETRIES": "0",
        "VIRTUALENV_NO_PERIODIC_UPDATE": "1",
        "XDG_STATE_HOME": os.fspath(attack.path.parent / "state"),
    }
    variables.pop("PYTEST_MICROVM_TRUST", None)
    command = [sys.executable, "-m", "tox"] if attack.about.get("python_m") else [TOX]
    done = subprocess.run(
        [*command, "run", *words],
        cwd=attack.path,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=guards.SUITE,
        check=False,
    )
    return done.returncode, done.stdout.decode(errors="backslashreplace")


def sprung(attack, listener, text):
    """Return what it has done to this computer, its terminal and its CI system."""
    found = attack.sprung(listener)
    found += ["a secret was shown"] if SECRET in text else []
    found += ["a terminal was commanded"] if "\x1b]" in text else []
    found += ["a CI system was commanded"] if re.search(r"^\s*::|##vso\[", text, re.MULTILINE) else []
    return found


@pytest.mark.parametrize("attack", entry_folders_where("tox", "outcome", "passed", "failed"), indirect=True)
def test_what_runs_in_a_machine_stays_there(attack, listener):
    status, text = run_tox(attack, listener, *OFFLINE, *attack.words("words", "tox"))
    if attack.about["tox"]["outcome"] == "passed":
        assert status == 0, text
        assert re.search(r"^in vm-\w+", text, re.MULTILINE), text
    else:
        assert status == 1, text
    assert attack.about["tox"].get("made", "making the environment") in text
    check_what_is_shown(attack, text)
    assert sprung(attack, listener, text) == [], text


@pytest.mark.parametrize("attack", entry_folders_where("tox", "outcome", "refused"), indirect=True)
def test_what_would_act_here_is_refused(attack, listener):
    status, text = run_tox(attack, listener, "--microvm", *attack.words("words", "tox"))
    assert status in {1, 254}, text  # an environment's failure, and one of the whole run
    assert "making the environment" not in text
    assert "commands[0]>" not in text
    check_what_is_shown(attack, text)
    assert sprung(attack, listener, text) == [], text


def check_what_is_shown(attack, text):
    assert attack.about["tox"].get("said", "") in text, text
    assert "Traceback (most" not in text, text


@pytest.mark.parametrize("attack", entry_folders_where("tox", "outcome", "sprung"), indirect=True)
def test_what_tox_cannot_promise(attack, listener):
    """Python or tox loads these before any plug-in; whoever closes one tells SECURITY.md."""
    _status, text = run_tox(attack, listener, "--microvm", *attack.words("words", "tox"))
    assert attack.about["tox"].get("said", "") in text, text
    assert attack.marker.exists()


@pytest.mark.thorough  # what the attacks do does not change with this package
@pytest.mark.parametrize("attack", entry_folders_where("tox", "native", None), indirect=True)
def test_unprotected(attack, listener):
    """The control: the same springs in plain tox."""
    _status, text = run_tox(attack, listener, *attack.words("control", "tox"))
    assert sprung(attack, listener, text) != [], text
