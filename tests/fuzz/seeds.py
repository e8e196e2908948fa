"""Write the committed corpus anew: good values, from which a fuzzer goes on."""

import io
import json
import re
import struct
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pytest_microvm.mounts.live.messages import Op
from pytest_microvm.wire.channel import Channel
from pytest_microvm.wire.frames import Kind, encode
from support import oci
from support.network import client_hello, in_records, request
from support.replayed_reports import real_reports

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"


def conversation(*, hello):
    guest = Channel("agent")
    if not hello:
        guest.take()
    for stream in (1, 2):
        guest.open(stream)
    guest.send({"id": 1, "result": {"size": 3, "names": ["a"], "target": "b"}})
    guest.write(1, b"output")
    guest.write(2, b"more")
    guest.send({"id": 2, "error": {"type": "OSError", "message": "no", "errno": 2}})
    guest.close(1)
    return guest.take() + encode(Kind.CREDIT, 2, b"\0\0\0\1") + encode(Kind.CLOSE, 2)


def archive(form):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as made:
        for name, kind, target in (
            ("d", tarfile.DIRTYPE, ""),
            ("d/f", tarfile.REGTYPE, ""),
            ("d/l", tarfile.SYMTYPE, "f"),
            ("h", tarfile.LNKTYPE, "d/f"),
            ("long" * 40, tarfile.REGTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mtime = kind, target, 1.5 if form == tarfile.PAX_FORMAT else 1
            info.size = 3 if kind == tarfile.REGTYPE else 0
            made.addfile(info, io.BytesIO(b"abc"))
    return out.getvalue().rstrip(b"\0") + bytes(1024)


def collection():
    node = {
        "k": "node",
        "marks": [["slow", [1], {"level": 2}]],
        "extra": ["word"],
        "path": "/p/a.py",
        "attributes": ["x"],
    }
    return [
        {"k": "guest", "python": "3.11", "pytest": "8.2", "header": ["a line"]},
        {**node, "parent": 0, "kind": "file", "class": "Module", "name": "a.py", "nodeid": "a.py"},
        {**node, "parent": 1, "kind": "item", "class": "Function", "name": "t", "nodeid": "a.py::t",
         "doc": "d", "repr": "<r>", "location": ["a.py", 3, "t"]},
        {"k": "collected", "node": 0, "outcome": "passed", "result": [1]},
        {"k": "collected", "node": 1, "outcome": "failed", "result": [],
         "data": {"longrepr": "no"}, "shown": True},
        {"k": "deselected", "items": [2]},
        warning(),
        {"k": "items", "order": [2], "markers": ["slow: takes long"]},
        {"k": "end"},
    ]  # fmt: skip


def warning():
    return {"k": "warning", "when": "runtest", "nodeid": "a.py::test_a", "message": "old", "filename": "a.py",
            "category": ["own.Late", "DeprecationWarning"], "lineno": 3, "line": "x()"}  # fmt: skip


def fuse():
    """What a kernel asks of a live mount: 1 is its root, 2 is "a", from 3 on what it makes."""

    def ask(op, node, body=b""):
        return struct.pack("<IIQQIIIHH", 40 + len(body), op, 1, node, 0, 0, 0, 0, 0) + body

    def words(*values):
        return struct.pack(f"<{len(values)}I", *values)

    def longs(*values):
        return struct.pack(f"<{len(values)}Q", *values)

    part = words(4, 0) + longs(0) + words(0, 0)
    looking = [
        ask(Op.INIT, 0, words(7, 38, 131072, 2**32 - 1)),
        ask(Op.LOOKUP, 1, b"a\0"), ask(Op.GETATTR, 2, bytes(16)), ask(Op.STATFS, 1),
        ask(Op.OPEN, 2, words(2, 0)), ask(Op.READ, 2, longs(1, 0) + part),
        ask(Op.WRITE, 2, longs(1, 9) + part + b"four"), ask(Op.FLUSH, 2, longs(1, 0, 0)),
        ask(Op.SETATTR, 2, words(0x69, 0) + longs(1, 8, 0, 5, 5, 0) + words(0, 0, 0, 0o755, 0, 0, 0, 0)),
        ask(Op.RELEASE, 2, longs(1, 0, 0)), ask(Op.OPENDIR, 1, words(0, 0)),
        ask(Op.READDIR, 1, longs(2, 0) + words(4096, 0) + longs(0) + words(0, 0)),
        ask(Op.READDIRPLUS, 1, longs(2, 2) + words(4096, 0) + longs(0) + words(0, 0)),
        ask(Op.FORGET, 2, longs(1)), ask(Op.BATCH_FORGET, 0, words(1, 0) + longs(2, 9)),
    ]  # fmt: skip
    making = [
        ask(Op.LOOKUP, 1, b"a\0"), ask(Op.MKDIR, 1, words(0o755, 0) + b"d\0"),
        ask(Op.SYMLINK, 3, b"l\0../a\0"), ask(Op.READLINK, 4), ask(Op.LINK, 3, longs(2) + b"h\0"),
        ask(Op.CREATE, 3, words(2, 0o644, 0, 0) + b"c\0"),
        ask(Op.MKNOD, 3, words(0o100644, 0, 0, 0) + b"n\0"),
        ask(Op.RENAME, 3, longs(1) + b"c\0e\0"), ask(Op.RENAME2, 3, longs(1, 0) + b"l\0l\0"),
        ask(Op.UNLINK, 1, b"e\0"), ask(Op.RMDIR, 1, b"sub\0"),
    ]  # fmt: skip
    return b"".join(looking), b"".join(making)


def hiding():
    """What a layer that hides something has."""
    attribute = {"SCHILY.xattr.security.capability": "c"}
    return [
        oci.member("d/.wh.old"), oci.member("e/.wh..wh..opq"),
        oci.member("e/f/x", "x", pax_headers=attribute), oci.member("g", "g"),
        oci.hard_link("h", "g"), oci.member("p", type=tarfile.FIFOTYPE),
    ]  # fmt: skip


def documents():
    """What an image's manifest and configuration have, and an index."""
    one = {"mediaType": oci.LAYER, "digest": "sha256:" + "a" * 64, "size": 7}
    config = {"Env": ["A=b"], "Entrypoint": ["/a"], "Cmd": ["b"], "WorkingDir": "/", "User": "1:2"}
    roots = {"type": "layers", "diff_ids": [one["digest"]]}
    return {
        "manifest": {"schemaVersion": 2, "config": {**one, "mediaType": oci.CONFIGURATION}, "layers": [one]},
        "configuration": {"os": "linux", "architecture": "amd64", "config": config, "rootfs": roots},
        "index": {"manifests": [{**one, "platform": {"os": "linux", "architecture": "arm64"}}]},
    }


CONSOLE = b"""[    1.0] Out of memory: Killed process 77 (py\x1b[2Jthon) anon-rss:900kB, shmem-rss:8kB
Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009
BUG: unable to handle page fault\r
Oops: 0002 [#1]
microvm: too many processes
"""


def write(name, content):
    path = CORPUS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def main():
    write("frames/conversation", conversation(hello=True))
    write("channel/conversation", conversation(hello=True))
    write("link/conversation", conversation(hello=False))
    write("tar/pax", archive(tarfile.PAX_FORMAT))
    write("tar/gnu", archive(tarfile.GNU_FORMAT))
    write("layer/pax", archive(tarfile.PAX_FORMAT))
    write("layer/whiteouts", oci.archive(hiding()))
    for name, document in documents().items():
        write(f"image/{name}", json.dumps(document).encode())
    write("collection/good.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in collection()))
    write("console/lines", CONSOLE)
    write("client_hello/named", client_hello("a.example"))
    write("client_hello/records", in_records(client_hello("a.example"), 50))
    asking = (
        request("http://a.example/path?query", "Content-Length: 4", "X-A: b", method="POST") + b"body",
        request("http://a.example/", "Transfer-Encoding: chunked", method="POST") + b"2;x\r\nab\r\n0\r\n\r\n",
        request("a.example:443", method="CONNECT", host="a.example:443") + client_hello("a.example"),
        request("a.example:8443", method="CONNECT", host="a.example:8443")
        + request("/open/x", "Connection: Upgrade", "Upgrade: websocket", host="a.example:8443"),
        request("http://a.example/") + request("http://user@b.example:8080/?q", host="b.example:8080"),
    )
    for number, one in enumerate(asking):
        write(f"proxy/{number}", one)
    for number, asked in enumerate(fuse()):
        write(f"fuse/{number}", asked)
    write("text/hostile", "plain \x1b[31mred\x1b[0m \x1b[2J\u202e\n ::error::x\n##[group]y \ufffe".encode())
    kinds = {}
    for report in real_reports(("long", "native")):
        longrepr = report["longrepr"]
        style = longrepr["reprtraceback"]["style"] if isinstance(longrepr, dict) else type(longrepr).__name__
        chained = isinstance(longrepr, dict) and len(longrepr["chain"] or [])
        kind = (
            report["outcome"],
            report["when"],
            style,
            chained,
            "wasxfail" in report,
            bool(report["sections"]),
        )
        kinds.setdefault(kind, {**report, "nodeid": "a.py::test_a", "keywords": {"test_a": 1}})
    for number, report in enumerate(kinds.values()):
        text = json.dumps({"k": "report", "data": report}, indent=1)
        text = re.sub(r"/tmp/tmp\w+", "/p", text.replace(sys.prefix, "/usr").replace(str(ROOT), "/p"))
        write(f"report/{number:02}.json", text.encode())
    write("report/warning.json", json.dumps(warning(), indent=1).encode())


if __name__ == "__main__":
    main()
