"""What machines are given: resolved once, made ready for each, and shown by nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.machine.grants import NO_GRANTS, NOTHING, PROXY, TRUST, Grants, resolve
from pytest_microvm.network.policy.rules import Policy, parse_rules
from pytest_microvm.network.proxy.company_authorities import company_certificates
from pytest_microvm.settings.spec import MachineSpec

CERTIFICATE = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"


def grants(rules=(), **changes):
    spec = MachineSpec().with_changes(changes, "test")
    return resolve(spec, rules, "test: network", project=Path())


@pytest.fixture(autouse=True)
def _no_company(monkeypatch):
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT", "NODE_EXTRA_CA_CERTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pytest_microvm.network.proxy.company_authorities._FOLDERS", ())


def test_nothing_asked_for_is_nothing_given():
    assert grants() == NO_GRANTS
    assert NO_GRANTS.for_machine("vm-1") is NOTHING
    assert NOTHING.message() == {}


def test_secrets_without_a_network():
    given = grants(secrets={"A": {"command": "echo hunter22"}, "B": {"command": "echo key", "as": "file"}})
    given = given.for_machine("vm-1")
    assert given.environment == {"A": "hunter22"}
    assert given.files == (("/run/secrets/B", 0o400, b"key"),)
    assert given.secret
    assert given.redactor.text("hunter22") == "***"
    assert set(given.message()) == {"environment", "files"}
    assert "hunter22" not in repr(given)


def test_a_network_brings_the_proxys_variables_alone():
    given = grants(["example.com"]).for_machine("vm-1")
    assert given.environment["HTTPS_PROXY"] == given.environment["http_proxy"] == PROXY
    assert given.environment["NODE_USE_ENV_PROXY"] == "1"
    assert "SSL_CERT_FILE" not in given.environment
    assert given.access.authority is None
    assert set(given.message()) == {"environment"}


def test_a_company_certificate_is_handed_on(tmp_path, monkeypatch):
    (tmp_path / "company.pem").write_text(f"# ours\n{CERTIFICATE}\n")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "company.pem"))
    assert company_certificates() == CERTIFICATE + "\n"
    given = grants(["example.com"]).for_machine("vm-1")
    assert given.environment["SSL_CERT_FILE"] == given.environment["PIP_CERT"] == TRUST
    assert given.message()["trust"] == CERTIFICATE + "\n"
    assert grants().for_machine("vm-1").message() == {}


def test_the_systems_own_collection_is_not_handed_on(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
    assert company_certificates() == ""


def test_each_machine_gets_its_own_authority_and_placeholder():
    pytest.importorskip("trustme")
    credential = {"host": "example.com", "value": {"command": "echo hunter22"}, "variable": "KEY"}
    one, other = (
        grants(["example.com"], credentials=[credential]).for_machine(name) for name in ("vm-1", "vm-2")
    )
    assert one.environment["KEY"] != other.environment["KEY"]
    assert "hunter22" not in one.environment.values()
    assert one.trust != other.trust
    assert one.environment["SSL_CERT_FILE"] == TRUST
    assert one.redactor.text("hunter22") == "***"
    assert not one.secret
    assert "hunter22" not in repr(one) + repr(grants(["example.com"], credentials=[credential]))


def test_a_path_rule_needs_an_authority():
    pytest.importorskip("trustme")
    assert grants(["https://example.com/pub/*"]).for_machine("vm-1").access.authority is not None
    assert grants(["http://example.com/pub/*"]).for_machine("vm-1").access.authority is None


def test_missing_secret_variable_is_a_usage_error():
    with pytest.raises(UsageError, match="secret A: the variable PYTEST_MICROVM_NOT_SET is not set"):
        grants(secrets={"A": {"env": "PYTEST_MICROVM_NOT_SET"}})


def test_wrong_rules_name_where_they_are_written():
    with pytest.raises(UsageError, match="test: network"):
        grants(["http//example.com"])


def test_where_names_lead_is_known_by_their_one_spelling():
    given = grants(["all"], hosts={"B\u00fccher.Example.": "127.0.0.1:8443", "127.1": "127.0.0.2"})
    assert given.hosts == {"xn--bcher-kva.example": ("127.0.0.1", 8443), "127.0.0.1": ("127.0.0.2", None)}
    with pytest.raises(UsageError, match="hosts: 'a b' is no host"):
        grants(["all"], hosts={"a b": "127.0.0.1"})


def test_grants_with_rules_are_not_nothing():
    assert Grants(parse_rules(["example.com"], "test")).for_machine("vm-1") is not NOTHING
    assert Grants(Policy()).for_machine("vm-1") is NOTHING
