"""Requests of a project's configuration that need its user's trust, including its own kits and images."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from pytest_microvm.errors import KitError
from pytest_microvm.images.kits import find_kit, load_kit, shipped_kits
from pytest_microvm.images.oci.references import is_reference
from pytest_microvm.images.store import ImageStore, cache_root
from pytest_microvm.settings.configuration import Settings
from pytest_microvm.settings.mounts import absolute
from pytest_microvm.settings.secret_commands import NotStarted, prepared
from pytest_microvm.settings.secret_values import SecretSource
from pytest_microvm.settings.spec import MachineSpec


def asked_by(settings: Settings) -> dict[str, Any]:
    """Return a project's requests by key: its grants, and its own kit with a digest of its recipe.

    A kit's packages are installed on this computer when its image is built, from the mirror that it names,
    and this computer fetches a container image from wherever its reference leads. A shipped kit, and an image
    that the user pulled under a name, are no requests. Options of the command line are not the project's.
    ``behind`` lists the link targets of paths in the other requests that name the project's own files:
    another branch may have other files there, under the same names.

    Args:
        settings: The project's settings.

    Raises:
        KitError: The image's kit cannot be used.
        UsesProject: A command that supplies a secret uses something of the project.
    """
    found = {key: value for key, value in settings.asked.items() if key != "image" and value}
    sources = _sources(settings.spec)
    check_commands((source for key in found for source in sources.get(key, ())), settings.project)
    own = own_image(settings.spec.image, settings.project)
    if own is not None:
        shown, network = own
        if "image" in settings.asked:
            found["image"] = shown
        if settings.spec.network is None and network:
            found["network"] = [*network]
    behind = sorted({line for key in found for line in _behind(key, settings)})
    return {**found, "behind": behind} if behind else found


def check_commands(sources: Iterable[SecretSource], project: Path) -> None:
    """Raise an error for commands that supply secrets and use a project's files, which no grant can allow.

    Raises:
        UsesProject: There is such a command.
    """
    for source in sources:
        if source.kind == "command":
            with suppress(NotStarted):  # reported when its value is read
                prepared(source.where, "the project's configuration", project)


def started_here(spec: MachineSpec, project: Path) -> list[str]:
    """Return the commands that supply a spec's secrets and credentials, with their programs' paths."""
    sources = chain.from_iterable(_sources(spec).values())
    lines = [_command_line(source, project) for source in sources if source.kind == "command"]
    return list(dict.fromkeys(lines))


def built_here(image: str, project: Path) -> list[str]:
    """Return lines about what builds an image whose kit is the project's own, in a machine."""
    with suppress(KitError):
        if own_image(image, project) is not None and not is_reference(image):
            kit = load_kit(image, project=project)
            work = [*(f"pip install {text}" for text in kit.sdists), *kit.setup]
            network = [", ".join(kit.setup_network)] if kit.setup_network else []
            return [
                *(f"run in a machine while the image is built: {line}" for line in work),
                *(f"reached by that machine: {rules}" for rules in network),
            ]
    return []


def _command_line(source: SecretSource, project: Path) -> str:
    try:
        return shlex.join(prepared(source.where, "", project).argv)
    except NotStarted:
        return source.where


def own_image(image: str, project: Path) -> tuple[str, Sequence[str]] | None:
    """Return a project's image, for display, and its network rules; ``None`` if it needs no trust.

    The project's own kit is shown with a digest of its recipe. A container image is shown by its reference.

    Raises:
        KitError: There is no such kit, or it cannot be used.
    """
    if is_reference(image):
        return image, ()
    if ImageStore(cache_root()).is_pulled(image):
        return None
    if shipped_kits() in find_kit(image, project=project).parents:
        return None
    kit = load_kit(image, project=project)
    recipe = json.dumps(kit.recipe(), sort_keys=True, default=str)
    source = f"from {kit.source}, " if kit.source else ""
    return f"{image} ({source}sha256 {hashlib.sha256(recipe.encode()).hexdigest()[:32]})", kit.network or ()


def _behind(key: str, settings: Settings) -> Iterator[str]:
    """Yield the link targets of a key's paths in the project."""
    project = settings.project.absolute()
    sources = _sources(settings.spec).get(key, [])
    paths = [mount.source for mount in settings.spec.mounts] if key == "mounts" else []
    paths += [absolute(source.where, Path.cwd()) for source in sources if source.kind == "file"]
    for path in paths:
        if _named_in(project, path) and path.resolve() != _without_links(project, path):
            yield f"{path} is {path.resolve()}"


def _sources(spec: MachineSpec) -> dict[str, list[SecretSource]]:
    """Return the sources of secrets and credentials, by the key that names them."""
    return {
        "secrets": [secret.source for secret in spec.secrets],
        "credentials": [credential.source for credential in spec.credentials],
    }


def _named_in(project: Path, path: Path) -> bool:
    """Return True if a path is in the project, by its name or after resolving links."""
    return path.is_relative_to(project) or path.resolve().is_relative_to(project.resolve())


def _without_links(project: Path, path: Path) -> Path:
    """Return a path in the project as it would resolve without links inside the project."""
    below = path.relative_to(project) if path.is_relative_to(project) else path
    return Path(os.path.normpath(project.resolve() / below))
