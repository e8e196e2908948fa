"""Everything that makes up an image, as ``microvm.lock`` pins it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_microvm.images.image import Image
from pytest_microvm.images.kit_keys import ARCHITECTURES
from pytest_microvm.images.kits import Kit
from pytest_microvm.images.lock_file import Pins
from pytest_microvm.images.process import build_environment
from pytest_microvm.programs.needed import require_program

_STATUS = "var/lib/dpkg/status"
_MAX_STATUS = 32 * 1024**2  # bytes; of 2,000 packages it has 2 MB
_MOST_PACKAGES = 20_000
_FIELD = re.compile(r"(Package|Architecture|Version|Status): (\S.*)")


def container_pins(record: Mapping[str, str], image: Image, project: Path) -> Pins:
    """Return the pins of a container image.

    Args:
        record: The store's record of its pull.
        image: The image.
        project: The folder that references to folders are relative to.
    """
    return {
        "kind": "container",
        "reference": _portable(record["reference"], project),
        "platform": record["platform"],
        "index": "" if record["resolved"] == record["manifest"] else record["resolved"],
        "manifest": record["manifest"],
        "configuration": record["configuration"],
        "diff_ids": record["diff_ids"].split(),
        "converter": int(record["converter"]),
        **_files(image),
    }


def kit_pins(kit: Kit, builder: int, key: str, image: Image) -> Pins:
    """Return the pins of a kit's image.

    Args:
        kit: The kit.
        builder: The version of the builder.
        key: The digest of all its inputs.
        image: Its image.

    Raises:
        HostError: This computer lacks the program that reads the image's list of packages.
    """
    return {**recipe_pins(kit, builder, key), "installed": installed_packages(image), **_files(image)}


def recipe_pins(kit: Kit, builder: int, key: str) -> Pins:
    """Return those pins of a kit's image that are known before it is built."""
    recipe = {name: value for name, value in kit.recipe().items() if name != "architecture"}
    files = {target: f"{mode:04o} sha256:{sha256}" for target, mode, sha256 in recipe["files"]}
    recipe |= {"files": files, "environment": dict(recipe["environment"])}
    recipe |= {"resources": dict(kit.resources), "network": kit.network, **kit.services_recipe()}
    plain = json.loads(json.dumps(recipe))  # tuples become lists
    return {"kind": "kit", "builder": builder, "recipe": plain, "key": f"sha256:{key}"}


def installed_packages(image: Image) -> dict[str, str]:
    """Return the versions of the Debian packages in an image, by name; they are read and not run.

    A package of a foreign architecture has it in its name, as in ``libc6:i386``.

    Raises:
        HostError: unsquashfs is missing.
    """
    require_program("unsquashfs")
    for layer in reversed(image.file_systems):
        status = _read_from(layer, _STATUS)
        if status:
            return _parsed(status, ARCHITECTURES[image.architecture])
    return {}


def _read_from(layer: Path, path: str) -> str:
    """Return a file of a file system; empty if it has none, or none that can be read."""
    command = ["unsquashfs", "-no-wildcards", "-cat", os.fspath(layer), path]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=build_environment()
    )
    with process:
        assert process.stdout is not None
        content = process.stdout.read(_MAX_STATUS + 1)
        process.stdout.close()  # a longer file ends it
    return "" if len(content) > _MAX_STATUS else content.decode(errors="replace")


def _parsed(status: str, native: str) -> dict[str, str]:
    """Return the installed packages of dpkg's status file (dpkg-query(1), deb-control(5))."""
    paragraphs = [dict(map(_field, _FIELD.findall(text))) for text in status.split("\n\n")]
    installed = [each for each in paragraphs if each.get("Status", "").endswith(" installed")]
    found = {}
    for each in installed[:_MOST_PACKAGES]:
        own = each.get("Architecture") in (native, "all", None)
        name = each.get("Package", "") if own else f"{each.get('Package', '')}:{each.get('Architecture')}"
        found[name] = each.get("Version", "")
    return found


def _field(found: tuple[str, str]) -> tuple[str, str]:
    return found[0], found[1].strip()


def _files(image: Image) -> dict[str, Any]:
    return {
        "kernel": _digest(image.kernel),
        "initramfs": _digest(image.initramfs),
        "runtime": _digest(image.runtime),
        "file_systems": [_digest(path) for path in image.file_systems],
        "digest": f"sha256:{image.digest}",
    }


def _digest(path: Path) -> str:
    """Return the digest of a stored file, which is its name."""
    return f"sha256:{path.name}"


def _portable(reference: str, project: Path) -> str:
    """Return a reference without the folders of this computer in it."""
    prefix, colon, path = reference.partition(":")
    if prefix not in ("oci", "oci-archive"):
        return reference
    top = f"{project.absolute()}/"
    return prefix + colon + (path[len(top) :] if path.startswith(top) else path.rpartition("/")[2])
