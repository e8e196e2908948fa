"""What goes between the hosts of a cluster, and whom they talk to; the cluster itself is in integration/."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from pytest_microvm.ci.cluster import messages
from pytest_microvm.ci.cluster.blobs import PIECE, Inbox
from pytest_microvm.ci.cluster.connection import Certificates, security_for
from pytest_microvm.ci.cluster.messages import Order, pack_reply, unpack_reply
from pytest_microvm.ci.definition.job import Job, Step
from pytest_microvm.ci.definition.task import Source, Task
from pytest_microvm.ci.results.result import Counts, StepResult, TaskResult
from pytest_microvm.ci.running.commands import Stop, Stopped
from pytest_microvm.ci.sources.tar_tree import TarTree, write_tree
from pytest_microvm.ci.sources.tree import tree_digest
from pytest_microvm.errors import HostError, TransferError, UsageError

RESULT = TaskResult("main.test", "main", "c" * 40, "test", "failed")


# What comes back


def test_a_result_and_its_files_come_back_as_they_were(tmp_path):
    folder = tmp_path / "main.test"
    (folder / "artifacts/dist").mkdir(parents=True)
    (folder / "log.txt").write_text("$ make\n")
    (folder / "artifacts/dist/a.bin").write_bytes(bytes(range(256)))
    (folder / "artifacts/link").symlink_to("/etc/passwd")
    result = replace(
        RESULT,
        steps=(StepResult("make", 2, 0.5),),
        tests=Counts(1, 2),
        artifacts=("main.test/artifacts/dist/a.bin",),
        phases={"run": 0.5},
        denied=("evil.example",),
    )
    assert unpack_reply(pack_reply(result, folder), tmp_path / "here") == result
    here = {
        str(path.relative_to(tmp_path / "here")) for path in (tmp_path / "here").rglob("*") if path.is_file()
    }
    assert here == {"log.txt", "artifacts/dist/a.bin"}
    assert (tmp_path / "here/artifacts/dist/a.bin").read_bytes() == bytes(range(256))


def test_what_is_too_much_is_left_out_and_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(messages, "MAX_BYTES", 2 * 1024**2)
    folder = tmp_path / "main.test"
    (folder / "artifacts").mkdir(parents=True)
    (folder / "junit").mkdir()
    (folder / "log.txt").write_text("$ make\n")
    (folder / "junit/a.xml").write_text("<testsuite/>")
    for name in ("a", "b", "c\n::error::x"):
        (folder / "artifacts" / name).write_bytes(b"x" * 1024**2)
    result = replace(
        RESULT, artifacts=tuple(f"main.test/artifacts/{name}" for name in ("a", "b", "c\n::error::x"))
    )
    came = unpack_reply(pack_reply(result, folder), tmp_path / "here")
    assert came.artifacts == ("main.test/artifacts/a",)
    assert (tmp_path / "here/junit/a.xml").exists()
    log = (tmp_path / "here/log.txt").read_text()
    assert "not taken back: artifacts/b: more than 2M" in log
    assert "\n::error" not in log


@pytest.mark.parametrize(
    "blob", [b"", b"\xff" * 100, (5).to_bytes(8, "big") + b"{}   ", (2**62).to_bytes(8, "big") + b"{}"]
)
def test_a_damaged_result_is_refused(tmp_path, blob):
    with pytest.raises(TransferError, match="damaged"):
        unpack_reply(blob, tmp_path / "here")


def test_files_stay_in_the_tasks_folder(tmp_path):
    head = pack_reply(RESULT, tmp_path)
    head = head[: 8 + int.from_bytes(head[:8], "big")]
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w|") as tar:
        member = tarfile.TarInfo("../outside")
        tar.addfile(member, io.BytesIO())
    with pytest.raises(TransferError, match=r"a path with \.\."):
        unpack_reply(head + archive.getvalue(), tmp_path / "here")
    assert not (tmp_path / "outside").exists()


def test_an_order_does_not_show_what_is_in_it():
    job = Job("test", "test", (Step("echo hunter2", "x"),), env=(("TOKEN", "hunter2"),))
    task = Task("main.test", Source("main", "c" * 40), job)
    order = Order("run", "key-1", "1", task, "base", b"{}", "s" * 64, None, "repository", "main")
    assert repr(order) == "<order key-1>"


# Files by digest


class Sender:
    """Answers an inbox with the content it was given, as the submitting host does."""

    def __init__(self, content):
        self.content = content
        self.inbox = Inbox(self.asked)
        self.questions = []

    def asked(self, question):
        self.questions.append(question)
        offset = question["offset"]
        data = None if self.content is None else self.content[offset : offset + PIECE]
        threading.Thread(target=self.inbox.deliver, args=(question["request"], data)).start()


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE])
def test_a_file_comes_in_pieces(tmp_path, size):
    content = bytes(size)
    sender = Sender(content)
    sender.inbox.fetch(hashlib.sha256(content).hexdigest(), tmp_path / "file", Stop())
    assert (tmp_path / "file").read_bytes() == content
    assert len(sender.questions) == size // PIECE + 1


def test_a_file_that_is_something_else_is_refused(tmp_path):
    with pytest.raises(HostError, match="arrived damaged"):
        Sender(b"x").inbox.fetch(hashlib.sha256(b"y").hexdigest(), tmp_path / "file", Stop())
    assert not (tmp_path / "file").exists()


def test_fetching_a_file_that_is_gone_raises_host_error(tmp_path):
    with pytest.raises(HostError, match="does not have file aaaaaaaaaaaa any more"):
        Sender(None).inbox.fetch("a" * 64, tmp_path / "file", Stop())


def test_waiting_for_a_file_ends_with_the_run(tmp_path):
    stop = Stop()
    inbox = Inbox(lambda _question: stop.cancelled.set())
    with pytest.raises(Stopped):
        inbox.fetch("a" * 64, tmp_path / "file", stop)
    with pytest.raises(Stopped):
        Inbox(lambda _question: None).fetch("a" * 64, tmp_path / "file", Stop(deadline=time.monotonic()))


def test_unexpected_answer_is_dropped():
    inbox = Inbox(lambda _question: None)
    inbox.deliver("unknown", b"x")
    assert inbox._waiting == {}


# Sources


def test_tar_tree_digest_matches_its_files_and_survives_a_copy(tmp_path):
    files = {"a.txt": b"a", "bin/run": b"#!/bin/sh", "b/\udcff.txt": b"bytes"}
    path = tmp_path / "tree.tar"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("empty")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755 if name == "bin/run" else 0o644
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        archive.addfile(link)
    tree = TarTree(path)
    sha = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    expected = [(name, "755" if name == "bin/run" else "644", digest) for name, digest in sha.items()]
    assert tree.digest() == tree_digest([*expected, ("link", "link", hashlib.sha256(b"a.txt").hexdigest())])
    assert tree.digest(["bin"]) == tree_digest([("bin/run", "755", sha["bin/run"])])
    copied = tmp_path / "copy.tar"
    write_tree(tree, copied)
    assert TarTree(copied).digest() == tree.digest()
    with tarfile.open(copied) as archive:
        assert archive.getmember("empty").isdir()
        assert archive.getmember("link").linkname == "a.txt"
    with pytest.raises(UsageError, match="nothing of the sources"):
        tree.digest(["c"])


# Whom to talk to


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:8786", "tcp://[::1]:8786", "tcp://localhost:8786"])
def test_this_computer_may_be_talked_to_without_tls(address):
    assert security_for(address, None) is None


@pytest.mark.parametrize(
    "address",
    ["tcp://10.0.0.1:8786", "tcp://0.0.0.0:8786", "tcp://ci.example:8786", "tcp://localhost.example:1"],
)
def test_another_computer_may_not(address):
    with pytest.raises(UsageError, match="without encryption") as caught:
        security_for(address, None)
    assert "--tls-ca, --tls-cert and --tls-key" in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["", "ci.example:8786", "ws://127.0.0.1:1", "ucx://127.0.0.1:1", "tls://:1", "tls://x", "tcp://[::1:1"],
)
def test_what_is_no_schedulers_address_is_refused(address):
    with pytest.raises(UsageError, match="no address of a scheduler"):
        security_for(address, None)


def test_tls_needs_certificates_that_can_be_read(tmp_path):
    with pytest.raises(UsageError, match="needs certificates"):
        security_for("tls://ci.example:8786", None)
    missing = Certificates(tmp_path / "ca", tmp_path / "cert", tmp_path / "key")
    with pytest.raises(UsageError, match="cannot be read"):
        security_for("tls://ci.example:8786", missing)
    for path in (missing.ca, missing.cert, missing.key):
        path.write_text("")
    security = security_for("tls://ci.example:8786", missing)
    assert security.require_encryption


def test_tls_client_and_worker_both_require_certificates(tmp_path):
    names = Certificates(*(Path(tmp_path / name) for name in ("ca", "cert", "key")))
    authority = trustme.CA()
    issued = authority.issue_cert("ci.example")
    authority.cert_pem.write_to_path(names.ca)
    issued.cert_chain_pems[0].write_to_path(names.cert)
    issued.private_key_pem.write_to_path(names.key)
    security = security_for("tls://ci.example:8786", names)
    for role in ("client", "worker"):
        arguments = security.get_connection_args(role)
        assert arguments["require_encryption"]
        assert arguments["ssl_context"].verify_mode.name == "CERT_REQUIRED"
