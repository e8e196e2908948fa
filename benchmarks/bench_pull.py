"""A container image from a registry on loopback: the first pull, the second one, and machines of the image.

The image has the files of the kit `python`, 160 MB, in four layers. Each first pull alternates with the
programs that it cannot do without: skopeo fetches the same layers, gzip unpacks them, mksquashfs packs them.
Machines of the image alternate with machines of the kit.
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
PROGRAM = Path(sys.executable).with_name("pytest-microvm")
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


def main() -> list[dict[str, object]]:
    """Measure in turn, print, and return what was promised."""
    first, second, alone = Samples(), Samples(), Samples()
    with (
        tempfile.TemporaryDirectory(dir=cache_root().parent) as name,
        registry(_made(name, "registry")) as hub,
    ):
        folder = Path(name)
        image = hub.push(_image(folder), "team/python:1")
        for number in range(ROUNDS):
            with _cache(folder) as cache:
                _pull(first, image, hub, cache)
                _pull(second, image, hub, cache)
                if number == ROUNDS - 1:
                    container, kit = _starts(image, hub, cache)
            place = _made(name, f"alone-{number}")
            _run(alone, ["bash", "-c", ALONE, "bash", image], hub, cwd=place)
            shutil.rmtree(place)
    print(f"the first pull                             {first} s")
    print(f"skopeo, gzip and mksquashfs alone          {alone} s")
    print(f"the second pull                            {second} s")
    print(f'start to run(["true"]), of the image       {container} s')
    print(f'start to run(["true"]), of the kit         {kit} s')
    return [
        promise("pull of 160 MB", first.median, 20, " s"),
        promise("pull, against its programs alone", first.median / alone.median, 2.0, " x"),
        promise("second pull", second.median, 1.0, " s"),
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


def _pull(samples: Samples, image: str, hub: Registry, cache: Path) -> None:
    _run(samples, [str(PROGRAM), "image", "pull", image], hub, cache=cache)


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


def _run(
    samples: Samples, command: list[str], hub: Registry, *, cwd: Path | None = None, cache: Path = Path()
) -> None:
    environment = {**os.environ, "HOME": str(hub.home), "PYTEST_MICROVM_CACHE": str(cache)}
    with samples.timing():
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command} failed\n{done.stderr}")


def _made(*parts: str) -> Path:
    path = Path(*parts)
    path.mkdir()
    return path


if __name__ == "__main__":
    main()
