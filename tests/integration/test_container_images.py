"""Machines from container images of every kind: files, users, commands and layers as with `docker run`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pytest_microvm import MicroVM
from pytest_microvm.images.mirror.libraries import LibrarySearch
from pytest_microvm.images.store import ImageStore, cache_root
from support import guards
from support.commands import MICROVM, PYTEST
from support.oci import (
    BUSYBOX,
    LayoutBuilder,
    archive,
    busybox_layer,
    folder,
    hard_link,
    member,
    program,
    symlink,
)

MUSL = next(Path("/lib").glob("ld-musl-*.so.1"), None)
SHELL = ("sh", "cat", "ls", "id", "env", "pwd", "stat", "find", "sort", "test", "true", "readlink", "getent")


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """A folder of images; they leave the cache with it."""
    builder = LayoutBuilder(tmp_path_factory.mktemp("images") / "oci")
    yield builder
    store = ImageStore(cache_root())
    for reference in {entry.reference for entry in store.list() if str(builder.path) in entry.reference}:
        store.remove(reference)


def microvm(*words, **options):
    return subprocess.run(
        [*MICROVM, *words], capture_output=True, text=True, timeout=guards.MACHINE, check=False, **options
    )


def run(image, *words):
    """Run a command in a machine of an image; return its output."""
    done = microvm("run", "--quiet", "--image", image, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Eight images


@pytest.fixture(scope="module")
def debian(layout, tmp_path_factory):
    """The tree of the python kit, as an image of one layer."""
    rootfs = ImageStore(cache_root()).get("python", progress=print).rootfs
    tree = tmp_path_factory.mktemp("debian") / "tree"
    command = ["unsquashfs", "-q", "-n", "-d", tree, rootfs]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)  # not root: it complains about owners
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", errors="surrogateescape") as tar:
        tar.add(tree, ".", filter=_as_root)
    config = {"Cmd": ["bash"], "Env": ["GREETING=hello"]}
    return layout.publish(layout.image(buffer.getvalue(), config=config), "debian")


def test_debian_tree(debian):
    """Packages, users and set-user-id programs are as in the kit's own image."""
    script = "dpkg -s dpkg | grep Status; id nobody; stat -c %A /usr/bin/passwd"
    assert run(debian, "--", "sh", "-c", script).splitlines() == [
        "Status: install ok installed", "uid=65534(nobody) gid=65534(nogroup) groups=65534(nogroup)",
        "-rwsr-xr-x",
    ]  # fmt: skip


def test_suite_runs_in_the_python_of_the_image(debian, tmp_path):
    tests = "import os, sys\ndef test_a():\n    assert sys.prefix + os.environ['GREETING'] == '/usrhello'\n"
    assert "1 passed" in suite(tmp_path, debian, tests)


def suite(place, image, tests, *options, status=0):
    """Run a suite in machines of an image; return what pytest printed."""
    (place / "pytest.ini").write_text("[pytest]\n")
    (place / "test_it.py").write_text(tests)
    command = [*PYTEST, "--microvm", f"--microvm-image={image}", *options, "-q", str(place)]
    done = subprocess.run(
        command, cwd=place, capture_output=True, text=True, timeout=guards.SUITE, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def _as_root(info):
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


@pytest.fixture(scope="module")
def musl(layout):
    """An image with musl's C library and busybox, and a folder /lib of its own, as Alpine has."""
    loader = f"lib/{MUSL.name}"
    layer = busybox_layer(
        *SHELL,
        more=[
            folder("lib"), member(loader, MUSL.resolve().read_bytes(), mode=0o755),
            symlink("lib/libc.musl.so.1", MUSL.name), folder("etc"),
            member("etc/passwd", "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"),
            member("etc/group", "root:x:0:\napp:x:1000:\nstaff:x:50:app\n"),
            folder("home/app", uid=1000, gid=1000),
        ],
    )  # fmt: skip
    return layout.publish(layout.image(layer, config={"Env": ["GREETING=hello"]}), "musl")


def test_musl_and_busybox(musl):
    out = run(musl, "--", "sh", "-c", f"echo $GREETING; cat /etc/hosts; /lib/{MUSL.name} 2>&1; true")
    assert out.splitlines()[:2] == ["hello", "127.0.0.1\tlocalhost"]
    assert "musl libc" in out


def test_no_shell(layout):
    """A dynamic program with its libraries, and nothing else: without a shell, errors say so."""
    cat = Path("/usr/bin/cat")
    libraries = LibrarySearch().closure([cat])
    files = [program(str(path), path.resolve()) for path in {cat, *libraries.values()}]
    image = layout.publish(layout.image(archive([*files, member("etc/motd", "no shell here\n")])), "no-shell")
    assert run(image, "--", "/usr/bin/cat", "/etc/motd") == "no shell here\n"
    done = microvm("run", "--quiet", "--image", image, "--", "sh", "-c", "id")
    assert (done.returncode, "no such program in the machine: 'sh'" in done.stderr) == (127, True)
    with MicroVM.start(image=image) as machine:
        with pytest.raises(FileNotFoundError, match="the machine has no shell: give a program and a list"):
            machine.run("id")
        assert machine.run(["/usr/bin/cat", "/etc/motd"]).stdout == "no shell here\n"


def test_one_static_program_and_nothing_else(layout):
    """As of an image that is built from scratch: no /etc, no /tmp, no C library."""
    config = {"Entrypoint": ["/busybox"], "Cmd": ["echo", "from scratch"]}
    image = layout.publish(layout.image(archive([program("busybox", BUSYBOX)]), config=config), "scratch")
    assert run(image) == "from scratch\n"
    assert run(image, "--", "stat", "-c", "%a", "/tmp") == "1777\n"
    broken = layout.publish(
        layout.image(archive([program("busybox", BUSYBOX), program("cat", Path("/usr/bin/cat"))])), "no-libc"
    )
    done = microvm("run", "--quiet", "--image", broken, "--", "/cat")
    assert (done.returncode, "the loader of its C library, is not in the machine" in done.stderr) == (
        127,
        True,
    )


def test_many_layers_with_whiteouts_and_hard_links(layout):
    """Forty layers, more than virtio-blk devices: each adds, replaces and hides files of those below."""
    files = [folder("d"), *(member(f"d/old{number}", "old") for number in range(40))]
    layers = [
        busybox_layer(*SHELL, "head", "wc", more=files),
        archive([folder("opaque"), member("opaque/hidden", "h"), member("gone/x", "x"), member("f", "f")]),
        *(archive(changes(number)) for number in range(1, 40)),
        archive([folder("opaque", mode=0o711), member("opaque/.wh..wh..opq"), member("opaque/x", "x")]),
        archive([member(".wh.gone"), folder("f"), member("f/.wh.x"), member("f/y", "y")]),
    ]
    image = layout.publish(layout.image(*layers), "deep")
    script = (
        "ls /d | sort | head -n 3; ls /d | wc -l; cat /d/last; echo; stat -c %h /d/link7; cat /d/link7; echo;"
        "ls /opaque; stat -c %a /opaque; test -e /gone || echo gone; ls /f; test -d /f && echo folder"
    )
    out = run(image, "--", "sh", "-c", script)
    assert out.split() == [
        "last", "link1", "link10", "80", "39", "2", "7", "x", "711", "gone", "y", "folder",
    ]  # fmt: skip


def changes(number):
    """Return the members of one of many layers."""
    return [
        member(f"d/.wh.old{number}"), member(f"d/new{number}", str(number)),
        hard_link(f"d/link{number}", f"d/new{number}"), member("d/last", str(number)),
    ]  # fmt: skip


def test_user_and_working_directory(layout):
    files = [folder("srv/data", uid=1000), member("srv/data/mine", "m", mode=0o600, uid=1000, gid=1000)]
    layer = busybox_layer(
        *SHELL,
        more=[
            member("etc/passwd", "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"),
            member("etc/group", "root:x:0:\napp:x:1000:\nstaff:x:50:app\nlast:x:60:\n"), *files,
        ],
    )  # fmt: skip
    script = ["sh", "-c", "id -u; id -g; id -G; pwd; echo $HOME; stat -c %u:%a ."]
    config = {"User": "app", "WorkingDir": "/var/lib/app", "Cmd": script}
    image = layout.publish(layout.image(layer, config=config), "user")
    assert run(image).split() == ["1000", "1000", "1000", "50", "/var/lib/app", "/home/app", "0:755"]
    assert run(image, "--user", "7:last").split()[:3] == ["7", "60", "60"]
    assert run(image, "--user", "7").split() == ["7", "0", "0", "/var/lib/app", "/", "0:755"]
    assert run(image, "--user", "root", "--workdir", "/srv").split()[:4] == ["0", "0", "0", "/srv"]
    assert run(image, "--", "cat", "/srv/data/mine") == "m"
    done = microvm("run", "--quiet", "--image", image, "--user", "nobody")
    assert done.returncode != 0
    assert "the machine has no user 'nobody'" in done.stderr


def test_entry_point(layout):
    config = {
        "Entrypoint": ["sh", "-c", 'echo "$0" "$@"'],
        "Cmd": ["default", "two"],
        "Env": ["PATH=/usr/bin:/bin"],
    }
    image = layout.publish(layout.image(busybox_layer(*SHELL), config=config), "entry")
    assert run(image) == "default two\n"
    assert run(image, "--", "one", "--help") == "one --help\n"
    assert run(image, "--entrypoint", "env").splitlines()[-1].partition("=")[0] != ""
    assert run(image, "--entrypoint", "cat", "--", "/etc/hosts").startswith("127.0.0.1")
    shown = json.loads(microvm("image", "inspect", image, "--json").stdout)
    assert shown["start"] == {"entrypoint": config["Entrypoint"], "arguments": config["Cmd"]}
    no_command = layout.publish(layout.image(busybox_layer(*SHELL)), "no-command")
    done = microvm("run", "--image", no_command)
    assert (done.returncode, "no command: expected one after --" in done.stderr) == (4, True)


@pytest.mark.thorough
def test_names_that_are_odd_but_possible(layout):
    odd = [
        b"caf\xe9", b"new\nline", b"\x1b]0;title\x07", b"-rf", b" ", b"*", b"$(id)", b"n" * 255,
        b"::error::x", "\u202eright".encode(), b"...", b"a\\b",
    ]  # fmt: skip
    names = [name.decode("utf-8", "surrogateescape") for name in odd]
    layer = busybox_layer(*SHELL, more=[member(f"odd/{name}", str(n)) for n, name in enumerate(names)])
    image = layout.publish(layout.image(layer), "odd")
    with MicroVM.start(image=image) as machine:
        found = machine.run(["find", "/odd", "-type", "f", "-print0"], text=False).stdout.split(b"\0")[:-1]
        assert {path.partition(b"/odd/")[2] for path in found} == set(odd)
        assert machine.run(["sh", "-c", "cat /odd/*"]).stdout


# With the environment of this computer on top


SUITE = """
import os, subprocess, sys
import hypothesis

def test_python_is_the_hosts():
    assert sys.prefix == {prefix!r}
    assert os.environ["GREETING"] == "hello"

def test_programs_are_the_images():
    assert os.readlink("/bin/sh") == "busybox"
    assert "musl libc" in subprocess.run(["/lib/{loader}"], capture_output=True, text=True).stderr
    assert subprocess.check_output("cat /etc/group", shell=True, text=True).endswith("staff:x:50:app\\n")
"""


@pytest.mark.thorough
def test_suite_runs_in_the_hosts_environment_on_another_c_library(musl, tmp_path):
    """glibc's Python on an image with musl and a folder /lib of its own: neither hides the other's loader."""
    tests = SUITE.format(prefix=sys.prefix, loader=MUSL.name)
    assert "2 passed" in suite(tmp_path, musl, tests, "--microvm-python=host")


def test_image_without_python_says_what_to_do(musl, tmp_path):
    shown = suite(tmp_path, musl, "def test_a(): pass\n", status=pytest.ExitCode.USAGE_ERROR)
    assert "does the image have Python and pytest?" in shown
