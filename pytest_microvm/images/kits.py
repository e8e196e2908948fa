"""Find, read and flatten kits: the recipes in ``<name>/kit.toml`` that images are built from."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_microvm.errors import KitError, UsageError
from pytest_microvm.images.image import Service
from pytest_microvm.images.kit_keys import ARCHITECTURES, CHECKS, bad_value, parse_resources, unknown_key
from pytest_microvm.programs.needed import architecture
from pytest_microvm.untrusted.nofollow import OpenTree, read_below

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KIT_FILE = "kit.toml"
_MAX_KIT = 1024 * 1024  # bytes of a kit.toml
_MAX_FILE = 256 * 1024 * 1024  # bytes of a kit's file, which is held in memory
_PROJECT_KITS = Path("microvm") / "kits"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""Names of kits, and of pulled images."""

DEFAULT_RESOURCES = {"cpus": 1, "memory": 512 * 1024**2, "disk": 2 * 1024**3}
"""Resources of machines whose image sets none."""


@dataclass(frozen=True)
class KitFile:
    """A file that a kit puts into the image.

    Args:
        target: Absolute path in the guest.
        source: The file on this computer.
        mode: Permission bits.
    """

    target: str
    source: Path
    mode: int

    def content(self) -> bytes:
        """Return the file's current content.

        Raises:
            KitError: It is gone, or not a regular file; links in its path are not followed.
        """
        below = os.fspath(self.source.relative_to("/"))
        try:
            content = read_below(Path("/"), below, _MAX_FILE)
        except (OSError, UsageError) as error:
            raise KitError(f"{self.source}: cannot be read", details=str(error)) from error
        if content is None:
            raise KitError(f"{self.source}: is not there any more", resolution="put it back")
        return content

    def sha256(self) -> str:
        """Return the hash of the content as it is now."""
        return hashlib.sha256(self.content()).hexdigest()


@dataclass(frozen=True)
class Kit:
    """A kit with its parents merged into it, parents first.

    Args:
        name: Name of the kit's folder.
        path: Its ``kit.toml``.
        suite: Debian suite, such as ``bookworm``.
        architecture: ``x86_64`` or ``aarch64``.
        mirror: Address of a Debian mirror, or one ``deb ...`` line; empty: this computer's mirrors.
        wheels: Pinned pip requirements.
        setup: Shell commands that run as root in the new root file system.
        resources: Default limits of a machine, by the names of
            :class:`pytest_microvm.settings.spec.Limits`.
        network: Default network rules of a machine.
        services: Servers that run in every machine, in the order in which they start.
    """

    name: str
    path: Path
    description: str
    suite: str
    architecture: str
    mirror: str = ""
    packages: tuple[str, ...] = ()
    wheels: tuple[str, ...] = ()
    files: tuple[KitFile, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    setup: tuple[str, ...] = ()
    resources: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_RESOURCES), hash=False)
    network: tuple[str, ...] = ()
    services: tuple[Service, ...] = ()

    @property
    def debian_architecture(self) -> str:
        """Debian's name for the architecture."""
        return ARCHITECTURES[self.architecture]

    def recipe(self) -> dict[str, Any]:
        """Return all inputs of the root file system, for the build key."""
        return {
            "suite": self.suite,
            "architecture": self.architecture,
            "mirror": self.mirror,
            "packages": self.packages,
            "wheels": self.wheels,
            "files": [(file.target, file.mode, file.sha256()) for file in self.files],
            "environment": self.environment,
            "setup": self.setup,
        }


@dataclass(frozen=True)
class _Layer:
    """One ``kit.toml`` as written."""

    name: str
    path: Path
    values: dict[str, Any]
    files: tuple[KitFile, ...] = field(default=())


def host_architecture() -> str:
    """Return this computer's architecture, ``x86_64`` or ``aarch64``.

    Raises:
        UsageError: It is neither.
    """
    name = architecture()
    if name not in ARCHITECTURES:
        raise UsageError(
            f"this computer's architecture, {name}, has no kits",
            resolution="use a computer with " + " or ".join(ARCHITECTURES),
        )
    return name


def load_kit(name_or_path: str | Path, *, project: Path | None = None) -> Kit:
    """Find a kit, read it and its parents, and merge them.

    Args:
        name_or_path: A kit's name, its folder, or its ``kit.toml``.
        project: Root of the user's project, whose ``microvm/kits/`` comes before the shipped kits.

    Raises:
        KitError: There is no such kit, or it (or a parent) cannot be used.
    """
    layers = [_read(find_kit(name_or_path, project=project))]
    while (parent := layers[-1].values.get("parent")) is not None:
        path = find_kit(parent, project=project, asked_by=layers[-1].path)
        if any(layer.path == path for layer in layers):
            ring = " -> ".join([*(layer.name for layer in layers), parent])
            raise KitError(
                f"{layers[-1].path}: parent: kits {ring} form a ring",
                resolution="let one of them name a suite in place of a parent",
            )
        layers.append(_read(path))
    return _merge(layers[::-1])


def find_kit(name_or_path: str | Path, *, project: Path | None = None, asked_by: Path | None = None) -> Path:
    """Return the path of the ``kit.toml`` for a kit's name or path.

    Raises:
        KitError: There is none.
    """
    text = str(name_or_path)
    looks_like_path = isinstance(name_or_path, Path) or "/" in text or text.endswith(".toml") or text == "."
    if looks_like_path:
        base = asked_by.parent if asked_by else (project or Path.cwd())
        named = base / Path(text).expanduser()
        _refuse_links(base, named, upwards=asked_by is not None)
        path = named.resolve()
        path = path / _KIT_FILE if path.is_dir() else path
        if path.is_file():
            return path
        raise KitError(f"no kit at {path}", resolution=f"name a folder that holds a {_KIT_FILE}")
    known = _kits(project)
    if text in known:
        return known[text]
    where = f"{asked_by}: parent: " if asked_by else ""
    raise KitError(
        f"{where}there is no kit {text!r}",
        details="kits here: " + (", ".join(sorted(known)) or "none"),
        resolution=f"use one of them, give a kit's path, or write {_PROJECT_KITS / text / _KIT_FILE}",
    )


def _refuse_links(base: Path, named: Path, *, upwards: bool) -> None:
    """Raise an error if a project reaches a kit through a link; a user's own path may contain links.

    Args:
        base: The folder of the project, or of the kit that names its parent.
        named: The path below it.
        upwards: Whether a path that leads upwards also belongs to the project.

    Raises:
        KitError: It is reached through a link.
    """
    below = os.path.relpath(os.path.normpath(named.absolute()), base.absolute())
    if below.startswith("..") and not upwards:
        return
    if named.resolve() != Path(os.path.normpath(base.resolve() / below)):
        raise KitError(
            f"{named} is reached through a link, and links of a project are not followed",
            resolution="put the kit itself there, or name the place where it is",
        )


def shipped_kits() -> Path:
    """Return the folder of the kits that come with this package."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_kits"
    return inside if inside.is_dir() else package.parent / "images"


def kit_names(project: Path | None) -> set[str]:
    """Return the names of the kits that ship, and of the project's own.

    Raises:
        KitError: A kit of the project has the name of a shipped one.
    """
    return set(_kits(project))


def _kits(project: Path | None) -> dict[str, Path]:
    """Return the kits that can be referred to by name: the project's and the shipped ones.

    Raises:
        KitError: A kit of the project has the name of a shipped one. A branch must not redefine a name that
            another party chose: a kit's commands run on this computer when it is built.
    """
    shipped = _kits_in(shipped_kits())
    own = _projects_kits(project) if project else {}
    for name in own:
        if name in shipped and own[name] != shipped[name]:
            raise KitError(
                f"{own[name]}: a kit that ships is called {name!r}, too", resolution="give it another name"
            )
    return {**shipped, **own}


def _kits_in(folder: Path) -> dict[str, Path]:
    return {path.parent.name: path.resolve() for path in folder.glob(f"*/{_KIT_FILE}")}


def _projects_kits(project: Path) -> dict[str, Path]:
    """Return the kits of a project: real folders with a ``kit.toml``, not links."""
    top, below = project.resolve(), os.fspath(_PROJECT_KITS)
    try:
        tree = OpenTree(top)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    with tree:
        found = {name: tree.status(f"{below}/{name}/{_KIT_FILE}") for name in tree.names(below)}
    return {
        name: top / _PROJECT_KITS / name / _KIT_FILE
        for name, status in found.items()
        if status is not None and stat.S_ISREG(status.st_mode)
    }


def _read(path: Path) -> _Layer:
    try:
        values = tomllib.loads((read_below(path.parent, path.name, _MAX_KIT) or b"").decode())
    except (OSError, UsageError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise KitError(
            f"{path}: cannot be read", details=str(error), resolution="correct the file"
        ) from error
    name = path.parent.name
    if not NAME.fullmatch(name):
        raise KitError(
            f"{path}: invalid name of a kit: expected small letters, digits, dots, dashes and underscores, "
            f"got {name!r}",
            resolution="rename the kit's folder",
        )
    for key in values:
        if key not in CHECKS:
            raise unknown_key(path, key, CHECKS)
    for key, value in values.items():
        CHECKS[key](path, key, value)
    if ("parent" in values) == ("suite" in values):
        raise KitError(
            f"{path}: invalid kit: expected either a parent or a suite, got "
            + ("both" if "parent" in values else "neither"),
            resolution='write parent = "base" to build on a kit, or suite = "bookworm" to start from Debian',
        )
    for key in ("mirror", "architecture"):
        if key in values and "parent" in values:
            raise KitError(
                f"{path}: invalid {key}: only a kit with a suite may have it",
                resolution="remove it, or write it in the parent's file",
            )
    return _Layer(name, path, values, _files(path, values.get("files", {})))


def _merge(layers: list[_Layer]) -> Kit:
    """Merge layers, the oldest ancestor first; a later value replaces an earlier one."""
    root, last = layers[0], layers[-1]
    environment: dict[str, str] = {}
    files: dict[str, KitFile] = {}
    resources: dict[str, float] = dict(DEFAULT_RESOURCES)
    services: dict[str, Service] = {}
    for layer in layers:
        environment |= layer.values.get("environment", {})
        files |= {file.target: file for file in layer.files}
        resources |= parse_resources(layer.path, "resources", layer.values.get("resources", {}))
        services |= {name: Service(name, **one) for name, one in layer.values.get("services", {}).items()}

    def joined(key: str) -> tuple[str, ...]:
        return tuple(item for layer in layers for item in layer.values.get(key, []))

    return Kit(
        name=last.name,
        path=last.path,
        description=last.values.get("description", ""),
        suite=root.values["suite"],
        architecture=root.values.get("architecture") or host_architecture(),
        mirror=root.values.get("mirror", ""),
        packages=tuple(dict.fromkeys(joined("packages"))),
        wheels=tuple(dict.fromkeys(joined("wheels"))),
        files=tuple(files[target] for target in sorted(files)),
        environment=tuple(sorted(environment.items())),
        setup=joined("setup"),
        resources=resources,
        network=next(
            (tuple(layer.values["network"]) for layer in layers[::-1] if "network" in layer.values), ()
        ),
        services=tuple(services.values()),
    )


def _files(path: Path, table: dict[str, Any]) -> tuple[KitFile, ...]:
    found = []
    for target, value in table.items():
        entry = {"source": value} if isinstance(value, str) else value
        key = f"files.{target}"
        below = os.path.normpath(entry["source"])
        if below.startswith(("/", "../")) or below in (".", ".."):
            raise bad_value(
                path, key, "a file in the kit's folder", entry["source"], "copy it into the folder"
            )
        source = path.parent / below
        with OpenTree(path.parent) as tree:
            status = tree.status(below)
        if status is None or not stat.S_ISREG(status.st_mode):
            raise bad_value(
                path, key, "a file, not behind a link", str(source), "name a file of the kit's folder"
            )
        executable = status.st_mode & stat.S_IXUSR
        mode = int(entry["mode"], 8) if "mode" in entry else (0o755 if executable else 0o644)
        found.append(KitFile(target, source, mode))
    return tuple(found)
