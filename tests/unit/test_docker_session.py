"""The session for a machine's Docker daemon, which may be hostile: it reaches nothing but that daemon."""

import http.server
import json
import socketserver
import threading
from urllib.parse import quote

import pytest
import requests

from pytest_microvm.errors import MachineError
from pytest_microvm.machine import docker
from pytest_microvm.machine.docker import DockerSession
from support import guards


class Daemon(socketserver.ThreadingUnixStreamServer):
    """A server on a Unix socket that answers with its path, or redirects from ``/to/URL``."""

    daemon_threads = True

    def __init__(self, path):
        self.asked = []
        daemon = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                daemon.asked.append((self.path, dict(self.headers)))
                target = self.path.removeprefix("/to/")
                body = json.dumps({"path": self.path}).encode()
                self.send_response(200 if target == self.path else 307)
                self.send_header("Location", target)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        super().__init__(str(path), Handler)
        self.url = f"http+unix://{quote(str(path), safe='')}"

    def get_request(self):
        request, _address = super().get_request()
        return request, ("guest", 0)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


@pytest.fixture
def daemon(tmp_path):
    with Daemon(tmp_path / "docker.sock") as daemon:
        yield daemon


def test_paths_are_those_of_the_daemon(daemon, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with DockerSession(daemon.url) as session:
        answer = session.get("/containers/json", params={"all": 1}, timeout=guards.PROCESS)
        assert answer.json() == {"path": "/containers/json?all=1"}
        assert session.get(f"{session.url}/version", timeout=guards.PROCESS).json() == {"path": "/version"}
    assert {headers["Host"] for _path, headers in daemon.asked} == {"localhost"}


def test_a_redirect_of_the_daemon_is_not_followed(daemon, tmp_path):
    with Daemon(tmp_path / "docker.sock-of-the-host") as other, DockerSession(daemon.url) as session:
        for target in (f"{other.url}/version", "http://127.0.0.1:9/", "//x/", "/version"):
            answer = session.get(f"/to/{target}", timeout=guards.PROCESS)
            assert (answer.status_code, answer.history) == (307, [])
        assert other.asked == []


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/", "https://elsewhere.example/", "http+unix://x/version"]
)
def test_the_session_has_no_other_servers(daemon, url):
    with DockerSession(daemon.url) as session, pytest.raises(requests.exceptions.InvalidSchema):
        session.get(url, timeout=guards.PROCESS)


def test_a_body_is_bounded_unless_it_is_streamed(daemon, monkeypatch):
    monkeypatch.setattr(docker, "MOST_BYTES", 100)
    with DockerSession(daemon.url) as session:
        assert session.get("/short", timeout=guards.PROCESS).json() == {"path": "/short"}
        with pytest.raises(MachineError, match="more than 0 MiB"):
            session.get("/" + "x" * 100, timeout=guards.PROCESS)
        with session.get("/" + "x" * 100, stream=True, timeout=guards.PROCESS) as answer:
            assert answer.raw.read(10) == b'{"path": "'
