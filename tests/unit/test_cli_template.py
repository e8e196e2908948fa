"""``pytest-microvm template``."""

import json

import pytest

from pytest_microvm.cli import EXIT_USAGE, main
from pytest_microvm.templates.store import TemplateStore


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(tmp_path))
    monkeypatch.delenv("PYTEST_MICROVM_CACHE_SIZE", raising=False)
    return TemplateStore(tmp_path, cap=2**40)


def make(store, key):
    with store.draft() as draft:
        for name in ("ram", "scratch", "state"):
            (draft / name).write_bytes(b"x" * 2**20)
        store.publish(key, draft, {"kind": "boot", "image": "base"})


def test_list(store, capsys):
    assert main(["template", "list"]) == 0
    assert capsys.readouterr() == ("", "no templates yet; the first run makes them\n")
    make(store, "a" * 64)
    with store.open("a" * 64):
        assert main(["template", "list"]) == 0
    heading, line, total = capsys.readouterr().out.splitlines()
    assert heading.split() == ["KEY", "KIND", "IMAGE", "SIZE", "USED"]
    assert line.split() == ["a" * 12, "boot", "base", "3", "MB", "just", "now", "in", "use"]
    assert total == "1 templates, 3 MB of at most 10G"


def test_list_json(store, capsys):
    make(store, "a" * 64)
    assert main(["template", "list", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["key"], entry["kind"], entry["image"], entry["in_use"]) == ("a" * 64, "boot", "base", False)
    assert entry["size"] >= 3 * 2**20
    assert entry["created"] <= entry["used"]


def test_remove(store, capsys):
    for key in ("aa1", "aa2", "bb1", "cc1"):
        make(store, key)
    assert main(["template", "remove", "aa", "bb1"]) == 0
    assert sorted(capsys.readouterr().out.split()) == ["aa1", "aa2", "bb1", "removed", "removed", "removed"]
    assert [entry.key for entry in store.list()] == ["cc1"]
    assert main(["template", "remove", "zz"]) == EXIT_USAGE
    assert "there is no template 'zz'" in capsys.readouterr().err
    with store.open("cc1"):
        assert main(["template", "remove", "cc1"]) == EXIT_USAGE
    assert "in use: cc1" in capsys.readouterr().err


def test_prune(store, capsys):
    make(store, "a1")
    make(store, "b1")
    with store.open("b1"):
        assert main(["template", "prune"]) == 0
    assert capsys.readouterr().out == "freed 3 MB\n"
    assert main(["template", "prune", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] >= 3 * 2**20
    assert store.list() == []


@pytest.mark.parametrize("arguments", [["template"], ["template", "remove"], ["template", "wipe"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: pytest-microvm template" in capsys.readouterr().err


def test_help_teaches_with_examples(capsys):
    with pytest.raises(SystemExit):
        main(["template", "--help"])
    assert "pytest-microvm template prune" in capsys.readouterr().out
