"""Certificates of a company's own authorities, which this computer trusts beyond its system's collection.

These are public certificates, no secrets. Sources: update-ca-certificates(8), update-ca-trust(8).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

_FOLDERS = (
    Path("/usr/local/share/ca-certificates"),  # Debian, Ubuntu, Alpine
    Path("/etc/pki/ca-trust/source/anchors"),  # Fedora, RHEL
    Path("/etc/ca-certificates/trust-source/anchors"),  # Arch
)
_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT", "NODE_EXTRA_CA_CERTS")
_SYSTEM = ("/etc/ssl", "/etc/pki", "/usr/share", "/usr/lib")  # folders of the system's own collection
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
_MOST = 256 * 1024  # bytes: some dozen authorities


def company_certificates() -> str:
    """Return, in PEM, the authorities that this computer's administrator or user added.

    Sources are the folders for administrators, and the files named by variables such as ``SSL_CERT_FILE``
    unless they are the system's own collection.
    """
    found: dict[str, None] = {}
    size = 0
    for path in _files():
        try:
            text = path.read_text(encoding="ascii", errors="replace")
        except OSError:
            continue
        for certificate in _CERTIFICATE.findall(text):
            size += len(certificate)
            if size > _MOST:
                return "".join(f"{each}\n" for each in found)
            found[certificate] = None
    return "".join(f"{each}\n" for each in found)


def _files() -> Iterator[Path]:
    for folder in _FOLDERS:
        yield from sorted(path for path in folder.rglob("*") if path.suffix in (".crt", ".pem", ".cer"))
    for name in _VARIABLES:
        value = os.environ.get(name)
        if value and not os.path.realpath(value).startswith(_SYSTEM):
            yield Path(value)
