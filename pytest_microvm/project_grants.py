"""What a project's configuration asks for that needs its user's trust, its own kits included."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pytest_microvm.config import Settings
from pytest_microvm.images.kits import find_kit, load_kit, shipped_kits
from pytest_microvm.mounts import absolute

_PIECE = 256 * 1024  # bytes


def asked_by(settings: Settings) -> dict[str, Any]:
    """Return what a project asks for, by key: its grants, and a kit of its own with a digest of all it says.

    A kit's commands run on this computer when its image is built; one that ships is nobody's request. What
    the command line says is not the project's. ``behind`` tells what stands behind words of the others that
    name the project's own files: another branch may have other files there, and the same words.

    Args:
        settings: The project's.

    Raises:
        KitError: The image's kit cannot be used.
    """
    found = {key: value for key, value in settings.asked.items() if key != "image" and value}
    own = own_kit(settings.spec.image, settings.project)
    if own is not None:
        shown, network = own
        if "image" in settings.asked:
            found["image"] = shown
        if settings.spec.network is None and network:
            found["network"] = [*network]
    behind = sorted({line for key in found for line in _behind(key, settings)})
    return {**found, "behind": behind} if behind else found


def own_kit(image: str, project: Path) -> tuple[str, Sequence[str]] | None:
    """Return a kit of the project's own with a digest of all it says, and its network; ``None``: it ships.

    Raises:
        KitError: There is no such kit, or it cannot be used.
    """
    if shipped_kits() in find_kit(image, project=project).parents:
        return None
    kit = load_kit(image, project=project)
    recipe = json.dumps(kit.recipe(), sort_keys=True, default=str)
    return f"{image} (sha256 {hashlib.sha256(recipe.encode()).hexdigest()[:32]})", kit.network or ()


def _behind(key: str, settings: Settings) -> Iterator[str]:
    """Yield what a key's paths in the project lead to by links, and what the programs are that it has run."""
    spec, project = settings.spec, settings.project.absolute()
    sources = {
        "secrets": [secret.source for secret in spec.secrets],
        "credentials": [credential.source for credential in spec.credentials],
    }.get(key, [])
    paths = [mount.source for mount in spec.mounts] if key == "mounts" else []
    paths += [absolute(source.where, Path.cwd()) for source in sources if source.kind == "file"]
    for path in paths:
        if _named_in(project, path) and path.resolve() != _without_links(project, path):
            yield f"{path} is {path.resolve()}"
    for source in sources:
        for word in _words(source.where) if source.kind == "command" else ():
            path = Path.cwd() / word
            if _named_in(project, path) and os.path.isfile(path):  # noqa: PTH113 - any word: no name may raise
                yield f"{path} (sha256 {_digest(path)})"


def _named_in(project: Path, path: Path) -> bool:
    """Whether a path is the project's by its name, or by where it leads."""
    return path.is_relative_to(project) or path.resolve().is_relative_to(project.resolve())


def _without_links(project: Path, path: Path) -> Path:
    """Return where a path in the project would lead if nothing in that were a link."""
    below = path.relative_to(project) if path.is_relative_to(project) else path
    return Path(os.path.normpath(project.resolve() / below))


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # reading the value will say so
        return []


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_PIECE):
            total.update(data)
    return total.hexdigest()[:32]
