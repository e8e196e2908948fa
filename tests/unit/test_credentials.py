"""Credentials as people write them: both ways, and every mistake; a value is never repeated."""

from __future__ import annotations

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.credentials import CredentialSpec, parse_credential, parse_credentials
from pytest_microvm.settings.secret_values import SecretSource

TOKEN = SecretSource("env", "TOKEN")


@pytest.mark.parametrize(
    ("table", "text", "parsed"),
    [
        (
            {"host": "API.example.com", "value": {"env": "TOKEN"}},
            "host=API.example.com,env=TOKEN",
            CredentialSpec("api.example.com", TOKEN),
        ),
        (
            {"host": "a.example:8443", "value": {"env": "TOKEN"}, "header": "X-Key", "variable": "KEY"},
            "host=a.example:8443,variable=KEY,env=TOKEN,header=X-Key",
            CredentialSpec("a.example:8443", TOKEN, "X-Key", scheme="raw", variable="KEY"),
        ),
        (
            {"host": "a.example", "value": {"env": "TOKEN"}, "query": "api_key"},
            "query=api_key,host=a.example,env=TOKEN",
            CredentialSpec("a.example", TOKEN, None, "api_key", "raw"),
        ),
        (
            {"host": "a.example", "value": {"command": "pass show a,b=c"}, "scheme": "basic"},
            "host=a.example,command=pass show a,b=c,scheme=basic",
            CredentialSpec("a.example", SecretSource("command", "pass show a,b=c"), scheme="basic"),
        ),
    ],
)
def test_both_ways(table, text, parsed):
    assert parse_credential(table, "here") == parse_credential(text, "here") == parsed
    assert parse_credentials([table, parsed], "here") == (parsed, parsed)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("host=a.example,hunter22", "not where a value is found"),
        ("host=a.example,token=hunter22,env=X", "this host cannot be used"),
        ("hunter22", "not a list of KEY=VALUE"),
        ("host=a.example,value=hunter22", "not a list of KEY=VALUE"),
        ("host=a.example,env=X,env=Y", "not a list of KEY=VALUE"),
        ("host=a.example,env=X,file=Y", "not where a value is found"),
        ({"host": "a.example", "value": "hunter22"}, "not where a value is found"),
        ({"value": {"env": "X"}}, "without a host"),
        ({"host": "a.example", "value": {"env": "X"}, "token": 1}, "unknown key 'token'"),
        ({"host": "https://a.example", "value": {"env": "X"}}, "this host cannot be used"),
        ({"host": "a.example", "value": {"env": "X"}, "header": "a b"}, "this header cannot be used"),
        ({"host": "a.example", "value": {"env": "X"}, "header": "Host"}, "cannot be set"),
        ({"host": "a.example", "value": {"env": "X"}, "header": "Proxy-Authorization"}, "cannot be set"),
        ({"host": "a.example", "value": {"env": "X"}, "header": "A", "query": "b"}, "header or the query"),
        (
            {"host": "a.example", "value": {"env": "X"}, "scheme": "digest"},
            "scheme = 'digest' is not allowed",
        ),
        ({"host": "a.example", "value": {"env": "X"}, "variable": "1A"}, "this variable cannot be used"),
        (7, "not a credential"),
    ],
)
def test_mistakes(written, why):
    with pytest.raises(UsageError, match=why) as caught:
        parse_credential(written, "pyproject.toml: credentials")
    assert str(caught.value).startswith("pyproject.toml: credentials")
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize("written", ["host=a.example,env=X", {"host": "a.example"}, 7])
def test_a_list_is_wanted(written):
    with pytest.raises(UsageError, match="not a list of credentials"):
        parse_credentials(written, "here")
