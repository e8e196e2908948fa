"""Where secret values come from, and that their holder shows them to nobody."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.secret_values import (
    MAX_BYTES,
    Secret,
    SecretSource,
    SecretValue,
    parse_secrets,
    parse_source,
)


def test_each_source(monkeypatch, tmp_path):
    monkeypatch.setenv("A_TOKEN", "from-env")
    (tmp_path / "key").write_text("from-file\n")
    assert SecretSource("env", "A_TOKEN").read("x").reveal() == "from-env"
    assert SecretSource("file", str(tmp_path / "key")).read("x").reveal() == "from-file"
    command = f"{sys.executable} -c 'print(\"from-command\")'"
    assert SecretSource("command", command).read("x").reveal() == "from-command"


def test_file_behind_a_link_of_the_project_is_refused(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    (tmp_path / "key").write_text("the user's")
    (project / "token").symlink_to(tmp_path / "key")
    monkeypatch.chdir(project)
    with pytest.raises(UsageError, match="is a link of the project"):
        SecretSource("file", "token").read("x", project)
    assert SecretSource("file", str(tmp_path / "key")).read("x", project).reveal() == "the user's"


def test_the_keyring(monkeypatch):
    keyring = pytest.importorskip("keyring")
    from keyring.backend import KeyringBackend  # noqa: PLC0415

    class InMemory(KeyringBackend):
        priority = 1

        def get_password(self, service, username):
            return {("shop", "me"): "from-keyring"}.get((service, username))

        def set_password(self, service, username, password):
            raise NotImplementedError

    before = keyring.get_keyring()
    keyring.set_keyring(InMemory())
    try:
        assert SecretSource("keyring", "shop/me").read("x").reveal() == "from-keyring"
        with pytest.raises(UsageError, match="no entry 'shop/you'"):
            SecretSource("keyring", "shop/you").read("x")
    finally:
        keyring.set_keyring(before)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (SecretSource("env", "PYTEST_MICROVM_NO_SUCH"), "is not set"),
        (SecretSource("file", "/no/such/file"), "cannot be read"),
        (SecretSource("command", "false"), "ended with status 1"),
        (SecretSource("command", "no-such-program --token abc"), "could not be run"),
        (SecretSource("command", "true"), "is empty"),
        (SecretSource("command", f"head -c {MAX_BYTES + 1} /dev/zero"), "expected at most 65536 bytes"),
    ],
)
def test_what_gives_no_value(source, why):
    with pytest.raises(UsageError, match=why):
        source.read("secrets: TOKEN")


def test_the_holder_shows_nothing():
    value = SecretValue("hunter22", "TOKEN")
    assert "hunter22" not in f"{value!r} {value} {[value]}"
    for store in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="not to be copied"):
            store(value)
    assert value == SecretValue("hunter22", "TOKEN")
    assert value != SecretValue("hunter23", "TOKEN")


def test_a_commands_arguments_are_not_shown():
    assert str(SecretSource("command", "vault read -token=abc path")) == "command vault ..."


def test_both_ways_to_write_secrets():
    table = {"A": {"env": "X"}, "B": {"file": "~/key", "as": "file"}}
    texts = ["A=env:X", "B=file:~/key,as=file"]
    assert parse_secrets(table, "here") == parse_secrets(texts, "here")
    assert parse_secrets(table, "here") == (
        Secret("A", SecretSource("env", "X")),
        Secret("B", SecretSource("file", "~/key"), "file"),
    )


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"A": "hunter22"}, "invalid source of a value"),
        ({"A": {"env": "X", "file": "y"}}, "invalid source of a value"),
        ({"A": {"env": "X", "as": "pipe"}}, "invalid as: expected one of env, file, got 'pipe'"),
        ({"A-B": {"env": "X"}}, "invalid name: expected letters, digits and underscores, got 'A-B'"),
        (["A=env:X", "A=env:Y"], "named twice"),
        (["A"], "invalid secrets: expected names with their sources"),
        ("A=env:X", "invalid secrets: expected names with their sources"),
    ],
)
def test_what_is_no_secret(value, why):
    with pytest.raises(UsageError, match=why) as caught:
        parse_secrets(value, "pyproject.toml: secrets")
    assert str(caught.value).startswith("pyproject.toml: secrets")
    assert "hunter22" not in str(caught.value)


def test_a_value_in_place_of_its_source_is_not_repeated():
    with pytest.raises(UsageError) as caught:
        parse_source("hunter22", "secrets: TOKEN")
    assert "hunter22" not in str(caught.value)
