"""Write an empty qcow2 overlay, which receives a copy's writes, into a file without a name.

QEMU's ``snapshot=on`` makes the same, but in a folder that QEMU itself must be able to write to.
Source: docs/interop/qcow2 of QEMU.
"""

from __future__ import annotations

import os
import struct
from typing import IO

_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_ENTRY = 8  # bytes of an entry in the L1, L2 and refcount tables
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_REFCOUNT_ORDER = 4  # 16 bits


def write_overlay(file: IO[bytes], size: int) -> None:
    """Write an empty overlay of a disk of ``size`` bytes into an empty file.

    Clusters: the header, the refcount table, its one block, then the L1 table.
    """
    covered = _CLUSTER * (_CLUSTER // _ENTRY)  # by one L2 table
    entries = -(-size // covered)
    tables = -(-entries * _ENTRY // _CLUSTER)
    header = _HEADER.pack(
        b"QFI\xfb", 3,
        0, 0, _CLUSTER_BITS, size, 0,  # no backing file's name: it is given on the command line
        entries, 3 * _CLUSTER,
        1 * _CLUSTER, 1,
        0, 0, 0, 0, 0,  # no snapshots, no feature bits
        _REFCOUNT_ORDER, _HEADER.size,
    )  # fmt: skip
    descriptor = file.fileno()
    os.ftruncate(descriptor, (3 + tables) * _CLUSTER)
    os.pwrite(descriptor, header, 0)
    os.pwrite(descriptor, struct.pack(">Q", 2 * _CLUSTER), _CLUSTER)
    os.pwrite(descriptor, struct.pack(">H", 1) * (3 + tables), 2 * _CLUSTER)
