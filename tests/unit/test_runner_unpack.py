"""The workspace on its way into a runner that waits for it, over a socket instead of a port."""

import io
import socket
import tarfile
import threading

import pytest

from pytest_microvm.agent.link import Link
from pytest_microvm.agent.transfer import send_file
from pytest_microvm.errors import TransferError
from pytest_microvm.guest.port import Port
from pytest_microvm.guest.runner_requests import Runner
from pytest_microvm.wire.channel import WINDOW
from support import guards


@pytest.fixture
def link():
    """The host's link to a runner that unpacks what it gets, and answers other requests with their text."""
    here, there = socket.socketpair()
    runner = Runner(Port(there.detach(), "runner"), resume=lambda message: message)

    def serve():
        while (request := runner.next_request())["op"] != "stop":
            if request["op"] == "unpack":
                runner.unpack(request)
            else:
                runner.reply(request, {"text": request["text"]})
        runner.close()

    serving = threading.Thread(target=serve)
    serving.start()
    link = Link(here)
    yield link
    link.request("stop")
    serving.join(guards.PROCESS)
    link.close()
    assert not serving.is_alive()


def archive(**files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    buffer.seek(0)
    return buffer


def test_files_arrive_whole_however_large(link, tmp_path):
    large = bytes(range(256)) * (3 * WINDOW // 256)
    send_file(link, "unpack", str(tmp_path / "new"), archive(small=b"1", large=large))
    assert (tmp_path / "new" / "small").read_bytes() == b"1"
    assert (tmp_path / "new" / "large").read_bytes() == large
    assert link.call("echo", text="hi", timeout=guards.PROCESS) == {"text": "hi"}


def test_second_workspace_over_the_same_link(link, tmp_path):
    send_file(link, "unpack", str(tmp_path), archive(a=b"1"))
    send_file(link, "unpack", str(tmp_path), archive(b=b"2"))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_folder_that_cannot_be_made_is_an_error_and_the_runner_serves_on(link, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="in the machine"):
        send_file(link, "unpack", str(tmp_path / "file"), archive(a=b"x" * (2 * WINDOW)))
    assert link.call("echo", text="hi", timeout=guards.PROCESS) == {"text": "hi"}


def test_what_is_no_archive_is_an_error(link, tmp_path):
    with pytest.raises(TransferError, match="ReadError"):
        send_file(link, "unpack", str(tmp_path), io.BytesIO(b"no archive" * 200))
    assert list(tmp_path.iterdir()) == []
