"""The set-up of a kit: its part that runs in a machine, and whose changes become a layer of the image."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pytest_microvm.errors import BuildError, PullError
from pytest_microvm.images.artifacts import Built
from pytest_microvm.images.oci.contents import LayerContents, inspect
from pytest_microvm.images.oci.layer import rewrite
from pytest_microvm.images.process import Progress
from pytest_microvm.images.records import LAYER
from pytest_microvm.images.squashfs import squash_stream

if TYPE_CHECKING:
    from pytest_microvm.images.image import Image
    from pytest_microvm.images.kits import Kit, KitFile

# What an image does not keep: caches, logs, temporary files, documentation (as rootfs.py). The folders stay.
_NOT_KEPT = re.compile(
    r"(tmp|var/tmp|var/cache/(apt|ldconfig)|var/lib/apt/lists|usr/share/(doc|info|lintian|locale|man))/.*"
    r"|root/\.cache(/.*)?"
    r"|var/(cache/debconf|lib/dpkg)/[^/]*-old"
    r"|etc/((passwd|group|shadow|gshadow)-|\.pwd\.lock)",
    re.DOTALL,
)
_LOGS = "var/log/"


@dataclass(frozen=True)
class SetUp:
    """The work of a kit in a machine while its image is built.

    Args:
        kit: The kit's name.
        image: The image that the machine boots from.
        files: The files to install first.
        sdists: Pinned pip requirements to build from source, with the machine's pip.
        commands: The shell commands, run one after the other as root.
        network: The network rules of the machine.
        environment: The variables of the commands.
        resources: The kit's default limits of a machine; a build gets at least some.
        epoch: Newest time stamp of any file in the image, in seconds.
    """

    kit: str
    image: Image
    files: tuple[KitFile, ...]
    sdists: tuple[str, ...]
    commands: tuple[str, ...]
    network: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    resources: tuple[tuple[str, float], ...]
    epoch: int

    def recipe(self) -> dict[str, object]:
        """Return all inputs of the layer, for its build key."""
        return {
            "below": [path.name for path in self.image.file_systems],
            "files": [(file.target, file.mode, file.sha256()) for file in self.files],
            "sdists": self.sdists,
            "commands": self.commands,
            "network": self.network,
            "environment": self.environment,
        }


RunSetUp = Callable[[SetUp, IO[bytes], Progress], None]
"""Runs a set-up in a machine, and writes the archive of its changes, which is untrusted, to a file.

Raises:
    BuildError: A command failed, or the machine exceeded a limit.
    HostError: This computer cannot run machines.
"""


def no_machine(set_up: SetUp, _archive: IO[bytes], _tell: Progress) -> None:
    """Raise the error of an image store that cannot run machines."""
    raise BuildError(
        f"kit {set_up.kit} needs a machine to be built, and this image store has none",
        resolution="build it with `pytest-microvm image build`",
    )


def set_up_of(kit: Kit, image: Image, epoch: int) -> SetUp:
    """Return the set-up of a kit on the image below, as the kit's files are now."""
    return SetUp(
        kit=kit.name,
        image=image,
        files=kit.files_in_machine,
        sdists=kit.sdists,
        commands=kit.setup,
        network=tuple(dict.fromkeys([*kit.setup_network, *(["pip"] if kit.sdists else [])])),
        environment=merged_environment(kit, image),
        resources=tuple(sorted(kit.resources.items())),
        epoch=epoch,
    )


def merged_environment(kit: Kit, image: Image) -> tuple[tuple[str, str], ...]:
    """Return the variables of a kit on the image below: a container image has its own."""
    return tuple(sorted({**dict(image.environment), **dict(kit.environment)}.items()))


def build_set_up_layer(folder: Path, set_up: SetUp, run: RunSetUp, tell: Progress) -> Built:
    """Run a set-up and make a layer of its changes.

    Args:
        folder: The empty folder for the result and everything temporary.
        set_up: The set-up.
        run: Runs it.
        tell: Called with each stage.

    Raises:
        BuildError: It failed, or its changes are refused.
        HostError: This computer cannot run machines.
    """
    target = folder / "layer.squashfs"
    with tempfile.TemporaryFile(dir=folder) as archive:
        run(set_up, archive, tell)
        tell("packing what the set-up changed")
        try:
            contents = inspect(archive)
            leave_out(contents)
            squash_stream(lambda stream: rewrite(stream, archive, contents, {}), target, epoch=set_up.epoch)
        except PullError as error:
            raise BuildError(
                f"what the set-up of kit {set_up.kit} changed cannot be a part of an image",
                details=error.brief,
                resolution="correct the kit's set-up commands and build again",
            ) from error
    return Built({LAYER: target}, {"entries": str(contents.entries)})


def leave_out(contents: LayerContents) -> None:
    """Remove from a layer what an image does not keep."""
    folders = {path: found for path, found in contents.folders.items() if not _NOT_KEPT.fullmatch(path)}
    contents.folders.clear()
    contents.folders.update(folders)
    for number, names in list(contents.names.items()):
        contents.names[number] = kept = [name for name in names if not _is_left_out(name)]
        if not kept:
            del contents.names[number], contents.files[number]
    contents.whiteouts -= {path for path in contents.whiteouts if _is_left_out(path)}
    contents.opaque &= folders.keys()


def _is_left_out(path: str) -> bool:
    return path.startswith(_LOGS) or _NOT_KEPT.fullmatch(path) is not None
