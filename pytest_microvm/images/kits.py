"""Find, read and flatten kits: the recipes in ``<name>/kit.toml`` that images are built from."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pytest_microvm.errors import KitError, UsageError
from pytest_microvm.images.image import DEFAULT_RESOURCES, NAME, Service
from pytest_microvm.images.kit_errors import bad_value, unknown_key
from pytest_microvm.images.kit_keys import ARCHITECTURES, CHECKS
from pytest_microvm.images.pins import debian_package, merge_pins, requirement
from pytest_microvm.images.resources import parse_resources
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
        suite: Debian suite, such as ``trixie``; empty with ``source``.
        source: Reference of the container image that it is built on; empty with ``suite``.
        source_base: The folder that a path in it is relative to.
        architecture: ``x86_64`` or ``aarch64``.
        mirror: Address of a Debian mirror, or one ``deb ...`` line; empty: this computer's mirrors.
        wheels: Pinned pip requirements.
        sdists: Pinned pip requirements that the machine builds from source before ``setup``.
        setup: Shell commands that run as root in a machine, on the root file system of ``ground``.
        setup_network: Network rules of that machine.
        resources: Default limits of a machine, by the names of
            :class:`pytest_microvm.settings.spec.Limits`.
        network: Default network rules of a machine.
        services: Servers that run in every machine, in the order in which they start.
        replaced: Lines about its parents' pins that are replaced.
        ground: What the root file system is made from, without set-up commands: the kit itself, or the
            ancestor with the same packages and wheels. ``None``: the kit has no set-up, or a ``source``.
    """

    name: str
    path: Path
    description: str
    suite: str
    architecture: str
    source: str = ""
    source_base: Path = field(default=Path("/"), compare=False)
    mirror: str = ""
    packages: tuple[str, ...] = ()
    wheels: tuple[str, ...] = ()
    files: tuple[KitFile, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    sdists: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    setup_network: tuple[str, ...] = ()
    resources: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_RESOURCES), hash=False)
    network: tuple[str, ...] = ()
    services: tuple[Service, ...] = ()
    ground: Kit | None = None
    replaced: tuple[str, ...] = ()

    @property
    def debian_architecture(self) -> str:
        """Debian's name for the architecture."""
        return ARCHITECTURES[self.architecture]

    @property
    def needs_machine(self) -> bool:
        """True if a part of it is built in a machine."""
        return bool(self.setup or self.sdists or (self.source and self.files))

    @property
    def files_in_machine(self) -> tuple[KitFile, ...]:
        """The files that the set-up installs: those that the root file system does not have."""
        if self.source:
            return self.files
        return tuple(file for file in self.files if file not in (self.ground or self).files)

    def services_recipe(self) -> dict[str, Any]:
        """Return the services as JSON, for a manifest or a key; nothing if there are none."""
        return {"services": [asdict(service) for service in self.services]} if self.services else {}

    def recipe(self) -> dict[str, Any]:
        """Return all inputs of the root file system and of the set-up, for the build key."""
        return {
            "suite": self.suite,
            "architecture": self.architecture,
            "mirror": self.mirror,
            "packages": self.packages,
            "wheels": self.wheels,
            "files": [(file.target, file.mode, file.sha256()) for file in self.files],
            "environment": self.environment,
            "setup": self.setup,
            **({"sdists": self.sdists} if self.sdists else {}),
            **({"setup_network": self.setup_network} if self.setup_network else {}),
            **({"from": self.source} if self.source else {}),
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
            another party chose: a kit's packages are installed on this computer when it is built.
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
    given = [key for key in ("parent", "suite", "from") if key in values]
    if len(given) != 1:
        raise KitError(
            f"{path}: invalid kit: expected one of parent, suite and from, got "
            + (" and ".join(given) or "none"),
            resolution='write parent = "base" to build on a kit, suite = "trixie" to start from Debian, or '
            'from = "docker://..." to build on a container image',
        )
    for key in ("mirror", "architecture"):
        if key in values and "suite" not in values:
            raise KitError(
                f"{path}: invalid {key}: only a kit with a suite may have it",
                resolution="remove it, or write it in the file of the kit with the suite",
            )
    return _Layer(name, path, values, _files(path, values.get("files", {})))


def _merge(layers: list[_Layer]) -> Kit:
    """Merge layers, the oldest ancestor first, and determine what its set-up runs on."""
    kit = _flat(layers)
    if kit.source:
        _refuse_packages(layers)
    if kit.source or not kit.needs_machine:
        return kit
    ancestors = (_flat(layers[: number + 1]) for number in range(len(layers)))
    same = (kit.packages, kit.wheels)
    ground = next(each for each in ancestors if (each.packages, each.wheels) == same)
    return replace(kit, ground=replace(ground, sdists=(), setup=(), setup_network=()))


def _refuse_packages(layers: list[_Layer]) -> None:
    for layer in layers:
        for key in ("packages", "wheels"):
            if layer.values.get(key):
                raise KitError(
                    f"{layer.path}: invalid {key}: kit {layers[0].name} is built on a container image",
                    details="a container image has its own package manager, or none, and its own Python",
                    resolution=f"install them with a command in `setup` instead of `{key}`, and write its "
                    'servers in `setup_network`, such as ["apt"] or ["pip"]',
                )


def _flat(layers: list[_Layer]) -> Kit:
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

    def pinned(
        key: str, parse: Callable[[str], tuple[str, str | None]]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return merge_pins(((each.path, each.name, each.values.get(key, [])) for each in layers), key, parse)

    packages, packages_replaced = pinned("packages", debian_package)
    wheels, wheels_replaced = pinned("wheels", requirement)
    sdists, sdists_replaced = pinned("sdists", requirement)
    return Kit(
        name=last.name,
        path=last.path,
        description=last.values.get("description", ""),
        suite=root.values.get("suite", ""),
        source=root.values.get("from", ""),
        source_base=root.path.parent,
        architecture=root.values.get("architecture") or host_architecture(),
        mirror=root.values.get("mirror", ""),
        packages=packages,
        wheels=wheels,
        sdists=sdists,
        replaced=(*packages_replaced, *wheels_replaced, *sdists_replaced),
        files=tuple(files[target] for target in sorted(files)),
        environment=tuple(sorted(environment.items())),
        setup=joined("setup"),
        setup_network=tuple(dict.fromkeys(joined("setup_network"))),
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
