"""Images from a registry on loopback: the first pull, the second one, and the machines that start from them.

The container image has the files of the kit `python`, 160 MB, in four layers. Each first pull alternates with
the programs that it cannot do without: skopeo fetches the same layers, gzip unpacks them, mksquashfs packs.
The two are compared by CPU time, which other work on this computer hardly changes. Machines of the image
alternate with machines of the kit. The kit's built image is pushed, and pulled into an empty cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from unittest.mock import patch

from measure import Samples, promise

from pytest_microvm.host.host import Host
from pytest_microvm.images.store import ImageStore, cache_root

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.oci import LayoutBuilder
from support.registry import Registry, registry

ROUNDS = 5
STARTS = 10
IMAGE = [str(Path(sys.executable).with_name("pytest-microvm")), "image"]
LIBRARIES = "./usr/lib/x86_64-linux-gnu"
LAYERS = (
    ["--exclude=./usr/lib", "--exclude=./usr/share", "."],
    [LIBRARIES],
    [f"--exclude={LIBRARIES}", "./usr/lib"],
    ["./usr/share"],
)
ALONE = """
set -o pipefail -e
skopeo --insecure-policy copy --quiet "$1" oci:layout:image
for blob in layout/blobs/sha256/*; do
    gzip -t $blob 2>/dev/null || continue  # a document
    gzip -dc $blob | mksquashfs - $blob.squashfs -tar -noappend -no-progress -quiet -comp lz4
done
"""


class Runs:
    """Runs of a program, measured by the clock and by the CPU time of the program and its children."""

    def __init__(self) -> None:
        self.wall, self.cpu = Samples(), Samples()

    def run(
        self, command: list[str], hub: Registry, *, cwd: Path | None = None, cache: Path = Path()
    ) -> None:
        """Run the program as a user who knows the registry."""
        environment = {**os.environ, "HOME": str(hub.home), "PYTEST_MICROVM_CACHE": str(cache)}
        before = os.times()
        with self.wall.timing():
            done = subprocess.run(
                command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
            )
        after = os.times()
        if done.returncode != 0:
            raise SystemExit(f"{command} failed\n{done.stderr}")
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        self.cpu.values.append(spent)

    def __str__(self) -> str:
        return f"{self.wall} s, CPU {self.cpu} s"


def main() -> list[dict[str, object]]:
    """Measure in turn, print, and return what was promised."""
    first, second, alone, pushed, built = Runs(), Runs(), Runs(), Runs(), Runs()
    with (
        tempfile.TemporaryDirectory(dir=cache_root().parent) as name,
        registry(_made(name, "registry")) as hub,
    ):
        folder = Path(name)
        image = hub.push(_image(folder), "team/python:1")
        kit_image = f"{hub.address}/team/kit:1"
        pushed.run([*IMAGE, "push", "python", kit_image], hub, cache=cache_root())
        for number in range(ROUNDS):
            with _cache(folder) as cache:
                first.run([*IMAGE, "pull", image], hub, cache=cache)
                second.run([*IMAGE, "pull", image], hub, cache=cache)
                if number == ROUNDS - 1:
                    container, kit = _starts(image, hub, cache)
            place = _made(name, f"alone-{number}")
            alone.run(["bash", "-c", ALONE, "bash", image], hub, cwd=place)
            empty = _made(name, f"empty-{number}")
            built.run([*IMAGE, "pull", f"docker://{kit_image}"], hub, cache=empty)
            for path in (place, empty):
                shutil.rmtree(path)
    print(f"the first pull                          {first}")
    print(f"skopeo, gzip and mksquashfs alone       {alone}")
    print(f"the second pull                         {second}")
    print(f"the kit's built image, pushed           {pushed}")
    print(f"the same, pulled                        {built}")
    print(f'start to run(["true"]), of the image    {container} s')
    print(f'start to run(["true"]), of the kit      {kit} s')
    return [
        promise("pull of 160 MB", first.wall.median, 20, " s"),
        promise("its CPU time, against its programs alone", first.cpu.median / alone.cpu.median, 1.3, " x"),
        promise("second pull", second.wall.median, 1.0, " s"),
        promise("pull of a built image", built.wall.median, 10, " s"),
        promise("start of the image, against the kit's", container.median / kit.median, 1.15, " x"),
    ]


def _image(folder: Path) -> str:
    """Make the image, and return its reference."""
    root, layout = folder / "root", LayoutBuilder(folder / "oci")
    rootfs = ImageStore(cache_root()).get("python").rootfs
    subprocess.run(["unsquashfs", "-q", "-n", "-d", root, rootfs], check=True, stdout=subprocess.DEVNULL)
    layers = [
        subprocess.run(
            ["tar", "-C", root, "--sort=name", "-c", *words], check=True, capture_output=True
        ).stdout
        for words in LAYERS
    ]
    print(f"{sum(map(len, layers)) / 1e6:.0f} MB in {len(layers)} layers")
    return layout.publish(layout.image(*layers), "v1")


@contextmanager
def _cache(folder: Path) -> Iterator[Path]:
    """Yield a cache with the user's images as links, and without container images and templates."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        target = Path(name) / "images"
        left = shutil.ignore_patterns("locks", "building", "downloads", "oci-*")
        shutil.copytree(cache_root() / "images", target, ignore=left, copy_function=os.link)
        if (known := cache_root() / "accelerator.json").exists():
            shutil.copy(known, name)
        yield Path(name)


def _starts(image: str, hub: Registry, cache: Path) -> tuple[Samples, Samples]:
    """Start machines of the image and of the kit in turn, with templates made before."""
    container, kit = Samples(), Samples()
    variables = {"HOME": str(hub.home), "PYTEST_MICROVM_CACHE": str(cache)}
    with patch.dict(os.environ, variables), closing(Host(say=lambda _line: None)) as host:
        for number in range(STARTS + 1):
            for samples, name in ((container, image), (kit, "python")):
                with (samples if number else Samples()).timing():  # the first one makes the template
                    machine = host.start(image=name)
                    machine.run(["true"], check=True)
                machine.close()
    return container, kit


def _made(*parts: str) -> Path:
    path = Path(*parts)
    path.mkdir()
    return path


if __name__ == "__main__":
    main()
