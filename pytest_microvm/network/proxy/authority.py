"""A machine's own certificate authority, which exists only in memory."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING

from pytest_microvm.errors import UsageError

if TYPE_CHECKING:
    import trustme

_MOST = 256  # cached certificates of hosts


class Authority:
    """Issuer of certificates, for one machine, for hosts whose TLS the proxy inspects.

    Args:
        authority: The authority's key and certificate.
    """

    def __init__(self, authority: trustme.CA) -> None:
        self.certificate_pem = authority.cert_pem.bytes().decode("ascii")
        self._authority = authority
        self._contexts: dict[str, ssl.SSLContext] = {}

    def context(self, host: str) -> ssl.SSLContext:
        """Return a server-side TLS context with a certificate for ``host``, a name or an address.

        Raises:
            ValueError: No certificate can name that host.
        """
        if host not in self._contexts:
            if len(self._contexts) >= _MOST:
                self._contexts.clear()
            self._contexts[host] = _context(self._authority.issue_cert(host))
        return self._contexts[host]


def new_authority(name: str) -> Authority:
    """Create an authority.

    Args:
        name: The machine's name, which appears in the certificates.

    Raises:
        UsageError: The package trustme is not installed.
    """
    try:
        import trustme  # noqa: PLC0415 - only where TLS is inspected
    except ImportError:
        raise UsageError(
            "looking into https (rules with a path or method, credentials) needs the package trustme",
            resolution="pip install 'pytest-microvm[network]'",
        ) from None
    title = f"pytest-microvm {name}"[:64]  # RFC 5280, ub-organization-name
    return Authority(trustme.CA(path_length=0, organization_name=title, organization_unit_name="one machine"))


def _context(leaf: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0  # no resumption: each connection of a guest names its host
    context.set_alpn_protocols(["http/1.1"])
    # OpenSSL only reads keys from files; this file has no name and is not on a disk.
    file = os.memfd_create("microvm-certificate")
    try:
        for blob in (leaf.private_key_pem, *leaf.cert_chain_pems):
            os.write(file, blob.bytes())
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)
    return context
