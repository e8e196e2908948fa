"""Read the headers of an untrusted tar archive: bounded before tarfile reads what they announce."""

from __future__ import annotations

import tarfile

MAX_HEADER = 64 * 1024
"""Bytes of a long name or of extended attributes, which are read into memory."""

_MAX_HEADERS = 8  # consecutive headers that extend the next one: attributes, a long name, a long link
_EXTENDING = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class RefusedHeader(Exception):
    """A header that is not read any further.

    Args:
        name: The member's name, so far as it is known.
        why: The reason, as a noun: ``a negative size``.
    """

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name[:200]!r}: {why}")
        self.name = name
        self.why = why


class CheckedHeader(tarfile.TarInfo):
    """A header block, validated before tarfile reads the data that it announces.

    Attributes:
        skips_global: Whether attributes of all that follows are skipped; otherwise they are refused.
    """

    skips_global = False

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> CheckedHeader:
        """Parse and validate the header in ``buf``."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise RefusedHeader(header.name, "a negative size")
        if header.type in _EXTENDING and header.size > MAX_HEADER:
            raise RefusedHeader(header.name, "a name or attributes that are too long")
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise RefusedHeader(header.name, "a sparse file")
        return header

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> CheckedHeader:
        """Return the next member; limit the number of headers that extend it."""
        depth = getattr(tarfile, "headers_in_a_row", 0)
        if depth > _MAX_HEADERS:
            raise RefusedHeader("a member", "too many headers")
        if tarfile.pax_headers and not cls.skips_global:
            raise RefusedHeader("a member", "attributes of all that follows")
        tarfile.pax_headers = {}  # tarfile keeps them all, and copies them for every member
        tarfile.headers_in_a_row = depth + 1  # type: ignore[attr-defined]  # this archive's alone
        try:
            return super().fromtarfile(tarfile)
        finally:
            tarfile.headers_in_a_row = depth  # type: ignore[attr-defined]

    def _refuse_sparse(self, _next: tarfile.TarInfo, *_headers: object) -> None:
        raise RefusedHeader(self.name, "a sparse file")

    # tarfile reads a sparse map of any length into memory before a caller can see the member's type.
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse
