"""A client of this computer that is asked: what it prints, and what it does wrong."""

import sys

import pytest

from pytest_microvm.errors import HostError
from pytest_microvm.network.policy import clients
from pytest_microvm.network.policy.clients import answer, without_login


def python(program, **more):
    return answer([sys.executable, "-"], what="the question", stdin=program, **more)


def test_what_it_prints_and_what_it_says_beside_that(tmp_path):
    program = "import os, sys; print(os.getcwd()); print('https://me:hunter2@a.example/x', file=sys.stderr)"
    assert python(program, folder=tmp_path) == (f"{tmp_path}\n", "https://a.example/x")


def test_it_runs_in_nobodys_project():
    assert python("import os; print(os.getcwd())")[0] == "/\n"


def test_it_fails():
    program = "import sys; sys.exit('no index at https://me:hunter2@a.example/')"
    with pytest.raises(HostError) as caught:
        python(program)
    assert caught.value.brief.startswith("the question: python")
    assert caught.value.brief.endswith("failed (status 1)")
    assert caught.value.details == "no index at https://a.example/"
    assert python(program, statuses=(1,))[1] == "no index at https://a.example/"


def test_it_never_answers(monkeypatch):
    monkeypatch.setattr(clients, "TIMEOUT", 0.2)
    with pytest.raises(HostError, match=r"failed \(no answer in 0.2 s\)"):
        python("import signal; signal.pause()")


def test_what_it_started_is_ended_too(monkeypatch, tmp_path):
    monkeypatch.setattr(clients, "TIMEOUT", 0.2)
    with pytest.raises(HostError, match=r"failed \(no answer in 0.2 s\)"):
        answer(["sh", "-c", '(sleep 5; touch "$0") & wait', str(tmp_path / "lived")], what="the question")
    assert not (tmp_path / "lived").exists()  # it was not waited for


def test_it_says_too_much(monkeypatch):
    monkeypatch.setattr(clients, "MAX_ANSWER", 1000)
    with pytest.raises(HostError, match="its answer is longer than 1000 bytes"):
        python("while True: print('x' * 100)")


def test_it_is_not_there():
    with pytest.raises(HostError, match="no-such-client could not be run: No such file"):
        answer(["/no-such-client"], what="the question")


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("https://me:hunter2@a.example/x", "https://a.example/x"),
        ("ssh://git@a.example/x and https://token@b.example", "ssh://a.example/x and https://b.example"),
        ("https://me:hun@ter2@a.example/x", "https://a.example/x"),
        ("https://a.example/@scope", "https://a.example/@scope"),
        ("git@a.example:x", "git@a.example:x"),
    ],
)
def test_without_login(text, bare):
    assert without_login(text) == bare
