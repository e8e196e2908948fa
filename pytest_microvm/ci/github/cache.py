"""The contents and keys of the action's entries in GitHub's cache.

Keys of images derive from their kits' recipes, which are known before the build. Keys of templates derive
from everything that shaped them, including the hypervisor's build and this computer's CPU: templates are
restored on an identical host only. No key has a mutable part, such as a branch or "latest", and no lookup
uses a key's prefix.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pytest_microvm.ci.github.project import Needs
from pytest_microvm.host.host import Host, guest_code
from pytest_microvm.hypervisors import Accelerator
from pytest_microvm.images import Image
from pytest_microvm.images.kits import host_architecture
from pytest_microvm.templates.chain import FORMAT

_KINDS = (
    "boot",
    "services",
    "prepared",
)  # most other kinds change with every commit, and `started` is quick to make


def images_key(needs: Needs, more: str) -> str:
    """Return the cache key for the images that a run needs.

    Args:
        needs: The run's needs.
        more: A further part of the key, from the user.
    """
    return _named("images", more, *sorted(needs.keys))


def templates_key(
    host: Host, images: Sequence[Image], accelerator: Accelerator, needs: Needs, more: str
) -> str:
    """Return the cache key for the templates that a run starts from.

    Args:
        host: This computer.
        images: The images that the machines boot from.
        accelerator: The accelerator that runs them here.
        needs: The other inputs that shape the templates.
        more: A further part of the key, from the user.
    """
    return _named(
        "templates",
        more,
        str(FORMAT),
        hashlib.sha256(guest_code()).hexdigest(),
        *sorted(image.digest for image in images),
        *sorted(needs.keys),
        *host.hypervisor(host_architecture()).fingerprint(accelerator),
        needs.prepared,
    )


def templates_folder(cache: Path) -> Path:
    """Return the folder that GitHub saves and restores; it must be the same in every job to be found."""
    return cache / "github" / "templates"


def set_aside(host: Host) -> int:
    """Hard-link the templates worth caching into the folder that GitHub saves; return how many.

    Raises:
        OSError: The cache cannot be written.
    """
    folder = templates_folder(host.cache)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chosen = [entry.key for entry in host.templates.list() if entry.kind in _KINDS]
    for key in chosen:
        template = host.templates.open(key)
        if template is None:
            continue
        with template:  # an open template is not removed
            shutil.copytree(template.folder, folder / key, copy_function=os.link)
    return len(chosen)


def take_in(host: Host) -> int:
    """Move the templates that GitHub restored into this host's store; return how many are new.

    A run opens a template by a key that it computes itself, and verifies that its files are intact. GitHub
    controls write access to the cache: a pull request's job cannot write into another branch's.

    Raises:
        OSError: The cache cannot be written.
    """
    folder = templates_folder(host.cache)
    taken = 0
    host.templates.folder.mkdir(parents=True, exist_ok=True)
    for found in sorted(folder.iterdir()) if folder.is_dir() else ():
        if found.is_dir() and not (target := host.templates.folder / found.name).exists():
            found.rename(target)
            taken += 1
    shutil.rmtree(folder, ignore_errors=True)
    return taken


def _named(what: str, more: str, *parts: str) -> str:
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return "-".join(filter(None, ("pytest-microvm", what, host_architecture(), more, digest[:40])))
