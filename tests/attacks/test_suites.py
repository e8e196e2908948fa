"""Hostile projects, each through `pytest --microvm`, `pytest-microvm test`, and unprotected as a control.

What runs the tests are local processes here, where a variable tells code that it is in "the machine". Real
machines run some of them in tests/integration/test_attacks.py.
"""

import os
import re
import sys

import pytest

from support.attacks import Attack, Listener, folders_where
from support.comparison import BACKEND, ENTRIES


@pytest.fixture
def listener(monkeypatch):
    with Listener() as server:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_address[1]}")
        yield server
        server.shutdown()


@pytest.fixture
def attack(request, project, monkeypatch, listener):
    made = Attack(request.param, project.path)
    if made.about.get("guest_acts") and BACKEND == "local" and request.function is not test_unprotected:
        pytest.skip("the machine obeys it as well, and here that is a process of this computer")
    monkeypatch.setenv("ATTACK_FOLDER", os.fspath(made.folder))
    monkeypatch.chdir(project.path / made.about.get("folder", "."))
    return made


def check(attack, listener, expected, result):
    text = result.stdout.str() + result.stderr.str()
    if expected in {"passed", "warned"}:
        assert result.ret == 0, text
        result.assert_outcomes(passed=1, warnings=int(expected == "warned"))
        assert "in 1 machine" in text
    else:
        assert result.ret == pytest.ExitCode.USAGE_ERROR, text
        assert not re.search(r"\d passed", text)
        assert "Traceback (most" not in text, text
    assert attack.about.get("said", "") in text
    assert "\x1b]" not in text
    assert not re.search(r"^::", text, re.MULTILINE)
    assert not attack.ran.exists(), "tests ran outside the machine"
    if expected in {"told", "warned"}:
        attack.marker.unlink(missing_ok=True)
    assert attack.sprung(listener) == [], text


@pytest.mark.parametrize("attack", folders_where("test", "passed", "refused"), indirect=True)
@pytest.mark.parametrize("entry", ENTRIES[1:])
def test_through_the_launcher(attack, listener, project):
    result = project.launched(*attack.words("words"), *attack.words("test_words"))
    check(attack, listener, attack.about["test"], result)


@pytest.mark.thorough
@pytest.mark.parametrize("attack", folders_where("action", "passed", "refused"), indirect=True)
def test_through_the_action(attack, listener, project):
    """It has a report of its own, so a project's is left out."""
    expected = attack.about.get("action", attack.about["test"])
    check(attack, listener, expected, project.in_the_action(*attack.words("words")))


@pytest.mark.parametrize(
    "attack", folders_where("pytest", "passed", "refused", "told", "warned"), indirect=True
)
def test_through_the_option(attack, listener, project):
    result = project.command(*attack.words("words"))
    check(attack, listener, attack.about["pytest"], result)


@pytest.mark.parametrize("attack", folders_where("pytest", "sprung"), indirect=True)
def test_what_the_option_cannot_promise(attack, listener, project):
    """These are why there is a launcher; whoever mends one tells SECURITY.md."""
    if attack.about.get("python_m"):
        project.run(sys.executable, "-m", "pytest", "--microvm")
    else:
        project.command(*attack.words("words"))
    assert attack.marker.exists()


@pytest.mark.thorough  # what the attacks do does not change with this package
@pytest.mark.parametrize("attack", folders_where("native", None), indirect=True)
def test_unprotected(attack, listener, project):
    """The control: the same springs where pytest is run as it is."""
    plain = [sys.executable, "-m", "pytest"] if attack.about.get("python_m") else [project.PYTEST]
    project.run(*plain, *attack.words("control"))
    attack.ran.unlink(missing_ok=True)
    assert attack.sprung(listener) != []
