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
        ("host=a.example,hunter22", "invalid source of a value"),
        ("host=a.example,token=hunter22,env=X", "invalid host: expected HOST or HOST:PORT"),
        ("hunter22", "invalid credential: expected KEY=VALUE,KEY=VALUE"),
        ("host=a.example,value=hunter22", "invalid credential: expected KEY=VALUE,KEY=VALUE"),
        ("host=a.example,env=X,env=Y", "invalid credential: expected KEY=VALUE,KEY=VALUE"),
        ("host=a.example,env=X,file=Y", "invalid source of a value"),
        ({"host": "a.example", "value": "hunter22"}, "invalid source of a value"),
        ({"value": {"env": "X"}}, "expected a host, got none"),
        ({"host": "a.example", "value": {"env": "X"}, "token": 1}, "unknown key 'token'"),
        ({"host": "https://a.example", "value": {"env": "X"}}, "invalid host: expected HOST or HOST:PORT"),
        (
            {"host": "a.example", "value": {"env": "X"}, "header": "a b"},
            "invalid header: expected a header's name",
        ),
        (
            {"host": "a.example", "value": {"env": "X"}, "header": "Host"},
            "invalid header: expected one that no connection sets",
        ),
        (
            {"host": "a.example", "value": {"env": "X"}, "header": "Proxy-Authorization"},
            "invalid header: expected one that no connection sets",
        ),
        (
            {"host": "a.example", "value": {"env": "X"}, "header": "A", "query": "b"},
            "expected a header or a query parameter, got both",
        ),
        (
            {"host": "a.example", "value": {"env": "X"}, "scheme": "digest"},
            "invalid scheme: expected one of bearer, basic, raw, got 'digest'",
        ),
        (
            {"host": "a.example", "value": {"env": "X"}, "variable": "1A"},
            "invalid variable: expected a variable's name",
        ),
        (7, "invalid credential: expected a table or text, got int"),
    ],
)
def test_mistakes(written, why):
    with pytest.raises(UsageError, match=why) as caught:
        parse_credential(written, "pyproject.toml: credentials")
    assert str(caught.value).startswith("pyproject.toml: credentials")
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize("written", ["host=a.example,env=X", {"host": "a.example"}, 7])
def test_a_list_is_wanted(written):
    with pytest.raises(UsageError, match="invalid credentials: expected a list, got"):
        parse_credentials(written, "here")
