"""A machine's own authority: in memory alone, and for one machine."""

import ssl
import sys
import tempfile

import pytest
from cryptography import x509

from pytest_microvm.errors import UsageError
from pytest_microvm.network.proxy.authority import new_authority


def extension(certificate, kind):
    return certificate.extensions.get_extension_for_class(kind).value


def test_it_is_an_authority_of_its_own():
    one, other = new_authority("vm-1"), new_authority("vm-1")
    assert one.certificate_pem != other.certificate_pem
    certificate = x509.load_pem_x509_certificate(one.certificate_pem.encode())
    limits = extension(certificate, x509.BasicConstraints)
    assert (limits.ca, limits.path_length) == (True, 0)  # it makes no other authorities
    assert "pytest-microvm vm-1" in certificate.subject.rfc4514_string()


def test_keys_are_written_nowhere(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    authority = new_authority("vm-1")
    context = authority.context("a.example")
    assert authority.context("a.example") is context
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert "PRIVATE KEY" not in authority.certificate_pem


@pytest.mark.parametrize("host", ["a.example", "127.0.0.1", "::1", "xn--caf-dma.example"])
def test_what_it_vouches_for(host):
    authority = new_authority("vm-1")
    server = authority.context(host)
    client = ssl.create_default_context(cadata=authority.certificate_pem)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    done = set()
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass
    assert done == set(ends)


@pytest.mark.parametrize("host", ["a..example", "_service.a.example"])
def test_what_no_certificate_can_name(host):
    with pytest.raises(ValueError):
        new_authority("vm-1").context(host)


def test_certificates_of_many_hosts_are_not_all_kept():
    authority = new_authority("vm-1")
    first = authority.context("host-0.example")
    for number in range(1, 257):
        authority.context(f"host-{number}.example")
    assert authority.context("host-0.example") is not first


def test_without_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "trustme", None)
    with pytest.raises(UsageError, match=r"pip install 'pytest-microvm\[network\]'"):
        new_authority("vm-1")
