"""``[signatures]`` of the user's own ``config.toml``: which images need a signature, and by whom."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import platformdirs

from pytest_microvm.errors import UsageError
from pytest_microvm.images.oci.references import NAMED_PREFIX, Reference, host_of, is_host, repository_of
from pytest_microvm.images.oci.signatures import SigningKey, read_key

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "config.toml"
ANY = "*"
"""In place of a name: every image of a registry that no other rule is about."""


@dataclass(frozen=True)
class SignatureRules:
    """The user's rules.

    Args:
        keys: The files of the keys that are accepted, by the beginning of images' names; none: no image is.
        file: The file that has the rules, for errors.
    """

    keys: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    file: Path = field(default=Path(FILE))

    def required(self, reference: Reference) -> Sequence[SigningKey] | None:
        """Return the keys of which one must have signed an image; ``None`` if it needs no signature.

        Only images on registries can have signatures; rules are about these alone. The longest name counts.

        Raises:
            UsageError: A key cannot be used, or the reference leaves the choice of the registry to skopeo, so
                that no rule but :data:`ANY` can be about it.
        """
        if reference.transport != "docker" or not self.keys:
            return None
        host, slash, path = repository_of(reference.name).partition("/")
        if not (slash and is_host(host)):
            if ANY not in self.keys:
                raise self._no_registry(reference)
            return [self._read[path] for path in self.keys[ANY]]
        names = [f"{host}/{path}/", *([] if "/" in path else [f"{host}/library/{path}/"])]
        matching = [rule for rule in self.keys if any(name.startswith(f"{rule}/") for name in names)]
        rule = max(matching, key=len, default=ANY)
        return [self._read[path] for path in self.keys[rule]] if rule in self.keys else None

    def accepts(self, reference: Reference, signed_by: str) -> bool:
        """Return True if an image that was pulled earlier may be used.

        Args:
            reference: Its reference.
            signed_by: The fingerprint of the key whose signature was verified then; empty: there was none.

        Raises:
            UsageError: A key cannot be used.
        """
        keys = self.required(reference)
        return keys is None or signed_by in {key.fingerprint for key in keys}

    def _no_registry(self, reference: Reference) -> UsageError:
        return UsageError(
            f"{reference} names no registry, and {self.file} demands signatures by the names of registries",
            resolution=f"write it like docker://REGISTRY/{reference.name}, or add a rule for {ANY!r}",
        )

    @cached_property
    def _read(self) -> dict[Path, SigningKey]:
        return {path: read_key(path) for paths in self.keys.values() for path in paths}


def user_rules() -> SignatureRules:
    """Return the rules of this user.

    Raises:
        UsageError: The file is invalid.
    """
    return read_rules(platformdirs.user_config_path("pytest-microvm") / FILE)


def read_rules(file: Path) -> SignatureRules:
    """Return the rules in a file; a missing file has none.

    Raises:
        UsageError: It is invalid.
    """
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("signatures", {})
    except FileNotFoundError:
        return SignatureRules({}, file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: {error}", resolution="correct it") from error
    if not isinstance(table, dict):
        raise _invalid(file, "signatures", "a table", table)
    found = {}
    for name, paths in table.items():
        if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
            raise _invalid(file, f"signatures.{name}", "a list of files", paths)
        found[_prefix(file, name)] = [file.parent / Path(path).expanduser() for path in paths]
    return SignatureRules(found, file)


def _prefix(file: Path, name: str) -> str:
    """Return the beginning of images' names in the form in which names are compared."""
    if name == ANY:
        return ANY
    host, slash, rest = name.partition("/")
    if not is_host(host) or not NAMED_PREFIX.fullmatch(name):
        raise _invalid(
            file, "signatures", "names that begin with a registry, such as registry.example/team", name
        )
    return f"{host_of(host)}{slash}{rest}"


def _invalid(file: Path, key: str, expected: str, value: object) -> UsageError:
    return UsageError(
        f"{file}: invalid {key}: expected {expected}, got {value!r}",
        resolution='write it like [signatures] and "registry.example/team" = ["team.pub"]',
    )
