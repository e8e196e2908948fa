"""What GitHub's cache keeps of ours, under which keys.

Images go by their kits' recipes, which are known before anything is built. Templates go by all that shaped
them, the hypervisor's build and this computer's CPU included: they are restored on an identical host alone.
No key has a part that moves, such as a branch or "latest", and none is looked for by its beginning.
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

_KINDS = ("boot", "prepared")  # of the others most follow every commit, and `started` is soon made


def images_key(needs: Needs, more: str) -> str:
    """Return the key of a cache with the images that a run needs.

    Args:
        needs: What it needs.
        more: What else tells it from others, from the user.
    """
    return _named("images", more, *sorted(needs.keys))


def templates_key(
    host: Host, images: Sequence[Image], accelerator: Accelerator, needs: Needs, more: str
) -> str:
    """Return the key of a cache with the templates that a run begins with.

    Args:
        host: This computer.
        images: What the machines boot from.
        accelerator: What runs them here.
        needs: What else shapes the templates.
        more: What else tells it from others, from the user.
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
    """Return the folder that GitHub saves and restores; the same in every job, or it would not be found."""
    return cache / "github" / "templates"


def set_aside(host: Host) -> int:
    """Put the templates that are worth to be saved where GitHub finds them; return how many.

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
        with template:  # nobody removes it meanwhile
            shutil.copytree(template.folder, folder / key, copy_function=os.link)
    return len(chosen)


def take_in(host: Host) -> int:
    """Put the templates that GitHub restored where runs find them; return how many are new.

    A run opens a template by a key that it computes for itself, and verifies that its files are whole. Who
    may write into the cache is GitHub's to say: a pull request's job cannot write into another branch's.

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
