"""Presets: hosts as the clients of this computer tell them. The clients are real, what they ask is local."""

import base64
import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import venv
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pytest_microvm.errors import HostError, UsageError
from pytest_microvm.network.policy import presets, python_indexes
from pytest_microvm.network.policy.presets import named_presets, preset_rules, read_preset
from pytest_microvm.network.policy.rules import Policy, Request, parse_rules
from support import repositories
from support.wheels import wheel

WHEEL = "packaging-99.0-py3-none-any.whl"
JSON = "application/vnd.pypi.simple.v1+json"


@pytest.fixture(autouse=True)
def _asked_anew():
    presets._read.cache_clear()
    yield
    presets._read.cache_clear()


@pytest.fixture
def index():
    """Run a server of given pages, by path, or by URL as a proxy; it remembers the logins it was given."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            logins.append(self.headers["Authorization"])
            kind, body = pages.get(self.path, ("text/plain", None))
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode() if isinstance(body, str) else body or b"")

        def log_message(self, *_):
            pass

    pages, logins = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.pages, server.logins = pages, logins
        server.where = f"127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def pip_uses(monkeypatch, tmp_path):
    """Return a function that configures pip by a file, as a user does."""

    def configure(text):
        (tmp_path / "pip.conf").write_text("[global]\n" + text)
        for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX", "CERT", "PROXY"):
            monkeypatch.delenv(f"PIP_{name}", raising=False)
        monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
        presets._read.cache_clear()

    return configure


def texts(preset):
    return [str(rule) for rule in preset.rules]


def serves_packaging_from(index, url, kind=JSON, at="/simple"):
    if kind == JSON:
        file = {"filename": WHEEL, "url": url, "hashes": {}}
        body = json.dumps({"meta": {"api-version": "1.0"}, "name": "packaging", "files": [file]})
    else:
        body = f'<!DOCTYPE html><html><body><a href="{url}">{WHEEL}</a></body></html>'
    index.pages[f"{at}/packaging/"] = (kind, body)


@pytest.mark.parametrize("kind", [JSON, "text/html"])
def test_pip_preset_allows_the_index_and_its_file_host(index, pip_uses, tmp_path, kind):
    serves_packaging_from(index, f"http://files.example:8443/{WHEEL}", kind, f"http://{index.where}/simple")
    index.pages[f"http://files.example:8443/{WHEEL}"] = ("application/zip", wheel("packaging", "99.0"))
    pip_uses(
        f"index-url = http://{index.where}/simple\nextra-index-url = file:///nowhere\n"
        f"proxy = http://{index.where}\n"
        "[install]\nconstraint = /nowhere\nrequire-virtualenv = true\ntarget = /nowhere\npre = true"
    )
    preset = read_preset("pip", tmp_path)
    assert texts(preset) == [f"http://{index.where}", "http://files.example:8443"]
    assert dict(preset.environment) == {"PIP_INDEX_URL": f"http://{index.where}/simple"}
    assert preset.hints == ()
    policy = parse_rules(["pip"], "network", preset_rules(tmp_path))
    assert policy.decide_address(Request("files.example", 8443, "http", "GET", "/"), "10.0.0.1").allowed


def test_files_beside_the_index_and_one_index_that_has_none(index, pip_uses, tmp_path):
    serves_packaging_from(index, f"../../packages/{WHEEL}")
    index.pages[f"/packages/{WHEEL}"] = ("application/zip", wheel("packaging", "99.0"))
    pip_uses(
        f"index-url = http://{index.where}/simple\nextra-index-url = http://{index.where}/empty\n"
        f"find-links = http://{index.where}/links /opt/wheels\ntrusted-host = files.example"
    )
    preset = read_preset("pip", tmp_path)
    assert texts(preset) == [f"http://{index.where}"]
    assert dict(preset.environment) == {
        "PIP_INDEX_URL": f"http://{index.where}/simple",
        "PIP_EXTRA_INDEX_URL": f"http://{index.where}/empty",
        "PIP_FIND_LINKS": f"http://{index.where}/links",
        "PIP_TRUSTED_HOST": "files.example",
    }
    assert [hint.split(" told no files")[0] for hint in preset.hints] == [
        f"preset pip: http://{index.where}/empty",
        f"preset pip: http://{index.where}/links",
    ]


def test_pip_preset_reads_pages_of_links(index, pip_uses, tmp_path):
    index.pages["/links"] = ("text/html", f'<a href="http://localhost:{index.server_port}/{WHEEL}">x</a>')
    index.pages[f"/{WHEEL}"] = ("application/zip", wheel("packaging", "99.0"))
    pip_uses(f"no-index = yes\nfind-links = http://{index.where}/links")
    preset = read_preset("pip", tmp_path)
    assert texts(preset) == [f"http://{index.where}", f"http://localhost:{index.server_port}"]
    assert dict(preset.environment) == {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": f"http://{index.where}/links",
    }


def test_pip_preset_runs_no_code_of_a_project(index, pip_uses, tmp_path, monkeypatch):
    """Neither a package named pip where pytest runs, nor a source distribution's setup.py."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')"
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text(code)
    (tmp_path / "pip" / "__main__.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in (("PKG-INFO", "Name: packaging\nVersion: 99.0\n"), ("setup.py", code)):
            entry = tarfile.TarInfo(f"packaging-99.0/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content.encode()))
    index.pages["/packaging-99.0.tar.gz"] = ("application/gzip", archive.getvalue())
    index.pages["/simple/packaging/"] = ("text/html", '<a href="/packaging-99.0.tar.gz">x</a>')
    pip_uses(f"index-url = http://{index.where}/simple")
    with pytest.raises(HostError, match="no index told where its files are"):
        read_preset("pip", tmp_path)
    assert not ran.exists()


def test_pip_preset_uses_a_login_of_netrc(index, pip_uses, tmp_path, monkeypatch):
    serves_packaging_from(index, f"http://{index.where}/{WHEEL}")
    index.pages[f"/{WHEEL}"] = ("application/zip", wheel("packaging", "99.0"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    pip_uses(f"index-url = http://{index.where}/simple")
    assert texts(read_preset("pip", tmp_path)) == [f"http://{index.where}"]
    assert set(index.logins) == {"Basic " + base64.b64encode(b"me:hunter2").decode()}


def test_pip_preset_names_the_default_index(pip_uses, tmp_path, monkeypatch):
    pip_uses("")
    default = python_indexes._default_index([sys.executable, "-m", "pip"])
    pip_uses("proxy = http://127.0.0.1:9")
    with pytest.raises(HostError) as caught:
        read_preset("pip", tmp_path)
    assert default.startswith("https://")
    assert caught.value.brief == f"preset pip: no index told where its files are ({default})"


def test_pip_preset_uses_a_login_without_exposing_it(index, pip_uses, tmp_path):
    serves_packaging_from(index, f"http://{index.where}/{WHEEL}")
    index.pages[f"/{WHEEL}"] = ("application/zip", wheel("packaging", "99.0"))
    pip_uses(f"index-url = http://me:hunter2@{index.where}/simple")
    preset = read_preset("pip", tmp_path)
    assert "Basic " + base64.b64encode(b"me:hunter2").decode() in index.logins
    assert "hunter2" not in repr(preset)
    assert "credential" in preset.hints[0]


def test_an_index_that_does_not_answer(pip_uses, tmp_path):
    pip_uses("index-url = http://me:hunter2@127.0.0.1:9/simple")
    with pytest.raises(HostError) as caught:
        read_preset("pip", tmp_path)
    assert "http://127.0.0.1:9/simple" in caught.value.brief
    assert "127.0.0.1" in caught.value.details
    assert "hunter2" not in str(caught.value)


def test_pip_without_an_index(pip_uses, tmp_path):
    pip_uses("no-index = true\nfind-links = /opt/wheels")
    with pytest.raises(UsageError, match="no index that is reached over http"):
        read_preset("pip", tmp_path)


def test_pip_preset_refuses_an_invalid_url_without_showing_it(pip_uses, tmp_path):
    pip_uses("index-url = http://me:hunter2@[::1/simple")
    with pytest.raises(UsageError, match="preset pip: invalid URL") as caught:
        read_preset("pip", tmp_path)
    assert caught.value.__cause__ is None
    assert "hunter2" not in str(caught.value)


def test_an_index_is_asked_once(index, pip_uses, tmp_path):
    serves_packaging_from(index, f"http://{index.where}/{WHEEL}")
    index.pages[f"/{WHEEL}"] = ("application/zip", wheel("packaging", "99.0"))
    pip_uses(f"index-url = http://{index.where}/simple")
    assert read_preset("pip", tmp_path) is read_preset("pip", tmp_path / "other")


@pytest.mark.parametrize(
    ("index_url", "file", "may"),
    [
        ("https://index.example/simple", "https://files.example/x", True),
        ("https://index.example/simple", "http://127.0.0.1/x", False),
        ("https://index.example/simple", "http://169.254.169.254/x", False),
        ("https://index.example/simple", "http://10.0.0.1/x", False),
        ("https://index.example/simple", "http://a.localhost/x", False),
        ("https://index.example/simple", "http://2130706433/x", False),
        ("http://127.0.0.1:3141/simple", "http://localhost:3141/x", True),
    ],
)
def test_an_index_opens_no_way_into_the_network_it_is_not_in(index_url, file, may):
    assert presets._may_lead(index_url, file) is may


@pytest.mark.parametrize(("at", "may"), [("198.51.100.7", False), ("10.0.0.7", True), (None, False)])
def test_an_index_opens_no_way_by_names_either(monkeypatch, at, may):
    """Where a name leads is known later, and decided by whoever owns it."""

    def look_up(host, *_words, **_keys):
        assert host == "index.example"
        if at is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (at, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    index, files = "https://index.example/simple", ["https://index.example", "https://files.example"]
    made = presets._preset("pip", [index], told={index: files})
    assert texts(made) == ["https://index.example", "https://files.example"]
    policy = Policy(made.rules)
    for host, expected in {"index.example": True, "files.example": may}.items():
        request = Request(host, 443, "https", "GET", "/")
        assert policy.decide_address(request, "93.184.216.34").allowed
        assert policy.decide_address(request, "10.0.0.1").allowed is expected


@pytest.mark.parametrize("name", ["pip", "npm", "apt", "git"])
def test_a_client_that_is_not_installed(monkeypatch, tmp_path, name):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError) as caught:
        read_preset(name, tmp_path)
    assert caught.value.brief.startswith(f"preset {name}: ")
    assert "write the hosts themselves as rules" in caught.value.resolution


def test_pip_preset_refuses_a_pip_without_reports(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'pip 22.1.2 from /usr/lib (python 3.10)'\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError) as caught:
        read_preset("pip", tmp_path)
    assert caught.value.brief == (
        f"preset pip: invalid pip: expected version 22.2 or later, got 22.1.2 of {python}"
    )
    assert f"{python} -m pip install --upgrade pip" in caught.value.resolution


@pytest.fixture
def without_pip(monkeypatch, tmp_path):
    """Make a virtual environment without pip the one that pytest runs in."""
    folder = tmp_path / "venv"
    venv.create(folder)
    monkeypatch.setattr("sys.executable", str(folder / "bin" / "python"))
    monkeypatch.setenv("PATH", str(folder / "bin"))
    return folder / "bin"


def test_pip_preset_in_an_environment_without_pip_and_uv(without_pip, tmp_path):
    with pytest.raises(UsageError) as caught:
        read_preset("pip", tmp_path)
    assert caught.value.brief.startswith(f"preset pip: {without_pip / 'python'} has no pip")
    assert "uv is not installed" in caught.value.brief
    assert "ensurepip" in caught.value.resolution


@pytest.fixture
def uv_uses(monkeypatch, tmp_path, request):
    """Return a function that configures uv by the user's file, in an environment without pip."""
    uv = Path(sys.executable).with_name("uv")
    (request.getfixturevalue("without_pip") / "uv").symlink_to(uv)

    def configure(text):
        (tmp_path / "config" / "uv").mkdir(parents=True)
        (tmp_path / "config" / "uv" / "uv.toml").write_text(text)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
        for name in ("DEFAULT_INDEX", "INDEX", "INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "CONFIG_FILE"):
            monkeypatch.delenv(f"UV_{name}", raising=False)

    return configure


def test_pip_preset_asks_uv_without_pip(index, uv_uses, tmp_path, monkeypatch):
    """Each of its indexes, with its login, and no configuration of the project."""
    serves_packaging_from(index, f"http://localhost:{index.server_port}/{WHEEL}")
    index.pages[f"/{WHEEL}"] = ("application/zip", wheel("packaging", "99.0"))
    uv_uses(
        f'[[index]]\nurl = "http://me:hunter2@{index.where}/simple"\ndefault = true\n'
        f'[[index]]\nurl = "http://{index.where}/empty"\n[pip]\nfind-links = ["/opt/wheels"]\n'
    )
    (tmp_path / "pyproject.toml").write_text('[[tool.uv.index]]\nurl = "http://stranger.example/simple"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UV_PROJECT", str(tmp_path))
    preset = read_preset("pip", tmp_path)
    assert texts(preset) == [f"http://{index.where}", f"http://localhost:{index.server_port}"]
    assert dict(preset.environment) == {
        "PIP_INDEX_URL": f"http://{index.where}/simple",
        "PIP_EXTRA_INDEX_URL": f"http://{index.where}/empty",
    }
    silent, login = preset.hints
    assert silent.startswith(f"preset pip: http://{index.where}/empty told no files")
    assert "credential" in login
    assert "Basic " + base64.b64encode(b"me:hunter2").decode() in index.logins
    assert "hunter2" not in repr(preset)


def test_pip_preset_reports_an_index_that_uv_cannot_reach(uv_uses, tmp_path, monkeypatch):
    uv_uses("")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://me:hunter2@127.0.0.1:9/simple")
    with pytest.raises(HostError) as caught:
        read_preset("pip", tmp_path)
    assert "http://127.0.0.1:9/simple" in caught.value.brief
    assert "Connection refused" in caught.value.details
    assert "hunter2" not in str(caught.value)


def test_an_unknown_preset(tmp_path):
    with pytest.raises(UsageError, match="no preset"):
        read_preset("cargo", tmp_path)


def test_which_presets_rules_allow():
    assert named_presets(["npm", "deny:git", "files.example", "pip", "npm"]) == ["npm", "pip"]


needs_npm = pytest.mark.skipif(not shutil.which("npm"), reason="needs npm")


@pytest.fixture
def npm_uses(monkeypatch, tmp_path):
    def configure(text):
        (tmp_path / "npmrc").write_text(text)
        monkeypatch.setenv("npm_config_userconfig", str(tmp_path / "npmrc"))
        monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))

    return configure


@needs_npm
def test_npm_preset_allows_registries_and_the_tarball_host(index, npm_uses, tmp_path):
    dist = {"tarball": "https://tarballs.example/npm/-/npm-9.0.0.tgz"}
    version = {"name": "npm", "version": "9.0.0", "dist": dist}
    packument = {"name": "npm", "dist-tags": {"latest": "9.0.0"}, "versions": {"9.0.0": version}}
    index.pages["/npm"] = ("application/json", json.dumps(packument))
    npm_uses(f"registry=http://{index.where}/\n@acme:registry=https://npm.acme.example/x/\n")
    preset = read_preset("npm", tmp_path)
    assert texts(preset) == [f"http://{index.where}", "https://npm.acme.example", "https://tarballs.example"]
    assert dict(preset.environment) == {"NPM_CONFIG_REGISTRY": f"http://{index.where}/"}


@needs_npm
def test_npm_preset_rejects_a_registry_url_with_a_login(npm_uses, tmp_path):
    npm_uses("registry=https://me:hunter2@npm.example/\n")
    with pytest.raises(UsageError) as caught:
        read_preset("npm", tmp_path)
    assert "_authToken" in caught.value.resolution
    assert "hunter2" not in str(caught.value)


@needs_npm
def test_a_registry_that_does_not_answer(npm_uses, tmp_path):
    npm_uses("registry=http://127.0.0.1:9/\n")
    with pytest.raises(HostError) as caught:
        read_preset("npm", tmp_path)
    assert caught.value.brief == "preset npm: http://127.0.0.1:9/: npm failed (status 1)"
    assert "127.0.0.1:9" in caught.value.details


needs_apt = pytest.mark.skipif(not shutil.which("apt-get"), reason="needs apt")
needs_squashfs = pytest.mark.skipif(not shutil.which("mksquashfs"), reason="needs squashfs-tools")


@pytest.fixture
def apt_uses(monkeypatch, tmp_path):
    def configure(text):
        (tmp_path / "sources.list").write_text(text)
        (tmp_path / "apt.conf").write_text(
            f'Dir::Etc::SourceList "{tmp_path}/sources.list"; Dir::Etc::SourceParts "-";'
        )
        monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))

    return configure


@needs_apt
def test_apt_is_sent_to_its_sources(apt_uses, tmp_path):
    apt_uses(
        "deb http://me:hunter2@deb.example/debian bookworm main\n"
        "deb [trusted=yes] https://deb.example:8443/debian bookworm main\ndeb file:///srv/debian ./\n"
    )
    preset = read_preset("apt", tmp_path)
    assert sorted(texts(preset)) == ["http://deb.example", "https://deb.example:8443"]
    assert "hunter2" not in repr(preset)


@needs_apt
@needs_squashfs
def test_apt_in_the_guest_uses_the_sources_of_its_image(apt_uses, tmp_path):
    apt_uses("")
    parts = tmp_path / "root" / "etc" / "apt" / "sources.list.d"
    parts.mkdir(parents=True)
    (parts.parent / "sources.list").write_text(
        "# deb http://old.example/ a b\ndeb http://one.example/debian a b\n"
    )
    (parts / "two.sources").write_text("Types: deb\nURIs: https://two.example/debian\nSuites: a\n")
    rootfs = tmp_path / "rootfs"
    subprocess.run(
        ["mksquashfs", str(tmp_path / "root"), str(rootfs), "-quiet"], check=True, capture_output=True
    )
    assert sorted(texts(read_preset("apt", tmp_path, (rootfs,)))) == [
        "http://one.example",
        "https://two.example",
    ]
    with pytest.raises(UsageError, match="neither this computer's apt nor the image"):
        read_preset("apt", tmp_path)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Return a repository's folder, and a function that runs git in it with a configuration of its own."""
    config = tmp_path / "gitconfig"
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    folder = repositories.repository(tmp_path / "repository")
    return folder, partial(repositories.git, folder, config=config)


def test_git_is_sent_to_the_remotes_of_the_project(repository):
    folder, git = repository
    git("remote", "add", "origin", "https://me:hunter2@git.example/a b.git")
    git("remote", "add", "other", "forge:them/a.git")
    git("remote", "add", "shell", "ssh://git@ssh.example/a.git")
    git("config", "--global", "url.https://mirror.example:8443/.insteadOf", "forge:")
    preset = read_preset("git", folder)
    assert texts(preset) == ["https://git.example", "https://mirror.example:8443"]
    assert dict(preset.environment) == {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "url.https://mirror.example:8443/.insteadOf",
        "GIT_CONFIG_VALUE_0": "forge:",
    }
    assert "credential" in preset.hints[0]
    assert "hunter2" not in repr(preset)


def test_git_preset_leaves_out_insteadof_urls_with_logins(repository):
    folder, git = repository
    git("remote", "add", "origin", "https://git.example/a.git")
    for old in (
        "https://me:hunter2@old.example/",
        "https://hunter2@b.example/",
        "ssh://me:hunter2@c.example/",
    ):
        git("config", "--global", "--add", "url.https://git.example/.insteadOf", old)
    git("config", "--global", "--add", "url.https://git.example/.insteadOf", "ssh://git@shell.example/")
    git("config", "--global", "url.https://hunter2@git.example/.insteadOf", "https://new.example/")
    preset = read_preset("git", folder)
    assert "hunter2" not in repr(preset)
    assert dict(preset.environment)["GIT_CONFIG_COUNT"] == "1"
    assert dict(preset.environment)["GIT_CONFIG_VALUE_0"] == "ssh://git@shell.example/"


def test_git_without_a_remote_over_http(repository):
    folder, git = repository
    git("remote", "add", "shell", "ssh://git:hunter2@ssh.example/a.git")
    with pytest.raises(UsageError) as caught:
        read_preset("git", folder)
    assert "ssh://ssh.example/a.git" in caught.value.brief
    assert "hunter2" not in str(caught.value)


def test_git_where_there_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(HostError) as caught:
        read_preset("git", tmp_path)
    assert "not a git repository" in caught.value.details
