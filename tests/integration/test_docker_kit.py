"""The kit ``docker``: a machine's own daemon runs, builds and pulls, and clients of the host use it."""

import os
import ssl
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from pytest_microvm.errors import UsageError
from support import guards
from support.network import PUBLIC
from support.registry import registry

PORTS = range(49152, 49216)  # those that the kit's daemon gives to containers
NAME = "registry.example"

DOCKERFILE = """
FROM scratch
COPY busybox /bin/
RUN ["/bin/busybox", "--install", "-s", "/bin"]
COPY index.html /www/
CMD ["httpd", "-f", "-p", "8080", "-h", "/www"]
"""
VISITS = """\
#!/bin/sh
printf 'Content-Type: text/plain\\n\\n'
redis-cli -h db incr visits
"""
COMPOSE = """
services:
  db:
    image: redis
    command: ["redis-server", "--protected-mode", "no", "--save", ""]
  web:
    build: .
    ports: ["8080:8080"]
    depends_on: [db]
"""
WEB = """
FROM redis
COPY busybox /bin/
RUN ["/bin/busybox", "--install", "-s", "/bin"]
COPY visits /www/cgi-bin/
CMD ["httpd", "-f", "-p", "8080", "-h", "/www"]
"""
TEST = """
from urllib.request import urlopen

from testcontainers.core.container import DockerContainer
from testcontainers.core.wait_strategies import HttpWaitStrategy


def test_web():
    container = DockerContainer("web").with_exposed_ports(8080)
    with container.waiting_for(HttpWaitStrategy(8080)) as web:
        where = f"http://{web.get_container_host_ip()}:{web.get_exposed_port(8080)}"
        with urlopen(where) as response:
            assert response.read() == b"a page"
        assert web.exec(["cat", "/www/index.html"]).output == b"a page"
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Run a registry that this computer trusts; return where its name leads."""
    folder = tmp_path_factory.mktemp("registry")
    certificate, key, authority = folder / "cert.pem", folder / "key.pem", folder / "company.pem"
    issued = PUBLIC.issue_cert(NAME, "127.0.0.1")
    issued.private_key_pem.write_to_path(key)
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    PUBLIC.cert_pem.write_to_path(authority)
    (folder / "data").mkdir()
    with pytest.MonkeyPatch.context() as patch, registry(folder / "data", tls=(certificate, key)) as running:
        system = os.environ.get("SSL_CERT_DIR") or ssl.get_default_verify_paths().openssl_capath
        patch.setenv("SSL_CERT_DIR", system)
        patch.setenv("SSL_CERT_FILE", str(authority))
        yield {NAME: running.address}


@pytest.fixture(scope="module")
def machine(host, hosts):
    """A machine with an image called ``web``."""
    with host.start(image="docker", network=[NAME], hosts=hosts, timeout=guards.MACHINE) as machine:
        folder = machine.path("/srv/web")
        folder.mkdir()
        (folder / "Dockerfile").write_text(DOCKERFILE)
        (folder / "index.html").write_text("a page")
        machine.push("/bin/busybox", "/srv/web/busybox")
        built = machine.run(["docker", "build", "--progress=plain", "-t", "web", "/srv/web"], check=True)
        assert "load build definition from Dockerfile" in built.stderr  # BuildKit's words
        yield machine


def fetch(url):
    with urlopen(url, timeout=guards.MACHINE) as response:  # noqa: S310 - of the machine
        return response.read()


def asked(machine):
    """Return what the proxy was asked for; the daemon also looks names up, which leads nowhere."""
    return {(each.host, each.allowed) for each in machine.network.requests if each.seen_by == "host"}


def test_a_container_runs(machine):
    done = machine.run(["docker", "run", "--rm", "web", "cat", "/www/index.html"], check=True)
    assert done.stdout == "a page"
    assert machine.run(["docker", "info", "-f", "{{.Driver}}"], check=True).stdout == "overlay2\n"
    found = machine.run(["stat", "-f", "-c", "%T", "/var/lib/docker"], check=True).stdout
    assert found == "ext2/ext3\n"  # the scratch disk, not the overlay on it


@pytest.mark.thorough
def test_images_go_through_the_proxy_as_the_rules_allow(machine):
    name = f"{NAME}/team/web:1"
    for command in (["tag", "web", name], ["push", name], ["rmi", name], ["pull", name]):
        machine.run(["docker", *command], check=True)
    assert asked(machine) == {(NAME, True)}
    refused = machine.run(["docker", "pull", "elsewhere.example/web"])
    assert refused.returncode != 0
    assert asked(machine) == {(NAME, True), ("elsewhere.example", False)}


def test_a_container_reaches_nothing_outside(machine):
    seen = len(machine.network.denied)
    done = machine.run(["docker", "run", "--rm", "web", "nc", "-w", "5", "192.0.2.1", "80"])
    assert done.returncode != 0
    assert {(each.host, each.port) for each in machine.network.denied[seen:]} == {("192.0.2.1", 80)}


@pytest.mark.thorough
def test_the_session_for_the_daemon(host, machine):
    assert machine.docker.get("/version").json()["Os"] == "linux"
    images = machine.docker.get("/images/json").json()
    assert "web:latest" in [tag for image in images for tag in image["RepoTags"] or ()]
    with host.start(image="docker", timeout=guards.MACHINE) as other:
        assert other.docker.get("/images/json").json() == []
        session = other.docker
        assert other.docker is session
        (folder,) = (Path(session.url.removeprefix("http+unix://").replace("%2F", "/")).parent,)
        assert folder.exists()
    assert not folder.exists()
    with pytest.raises(UsageError):
        other.docker  # noqa: B018 - reading it is the test


@pytest.mark.thorough
def test_testcontainers_on_the_host(machine, tmp_path):
    (tmp_path / "test_web.py").write_text(TEST)
    with machine.forward("/run/docker.sock") as daemon, machine.forward_ports(PORTS) as address:
        environment = {
            **os.environ,
            "DOCKER_HOST": f"unix://{daemon}",
            "TESTCONTAINERS_HOST_OVERRIDE": address,
            "TESTCONTAINERS_RYUK_DISABLED": "true",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_web.py"]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=guards.MACHINE,
        )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    assert machine.docker.get("/containers/json").json() == []


@pytest.mark.thorough
def test_compose_runs_a_web_service_with_a_database(host, machine):
    with host.start(image="services", timeout=guards.MACHINE) as other:
        # each once: tar would store the second one as a link to itself
        libraries = "$(ldd /usr/bin/redis-server /usr/bin/redis-cli | grep -o '/[^ ]*\\.so[^ ]*' | sort -u)"
        command = f"tar -C / -ch $(echo usr/bin/redis-server usr/bin/redis-cli {libraries} | sed 's| /| |g')"
        files = other.run(command, text=False, check=True).stdout
    machine.run(["docker", "import", "-", "redis"], input=files, text=False, check=True)
    folder = machine.path("/srv/shop")
    folder.mkdir()
    for name, text in (("Dockerfile", WEB), ("docker-compose.yml", COMPOSE), ("visits", VISITS)):
        (folder / name).write_text(text)
    machine.run("cp /srv/web/busybox /srv/shop && chmod +x /srv/shop/visits", check=True)
    machine.run(["docker", "compose", "up", "-d"], cwd="/srv/shop", check=True)
    machine.wait_for_port(8080, timeout=guards.MACHINE)
    with machine.forward(8080) as address:
        for number in (1, 2):
            assert fetch(f"{address.url}/cgi-bin/visits") == b"%d\n" % number
    machine.run(["docker-compose", "down"], cwd="/srv/shop", check=True)
