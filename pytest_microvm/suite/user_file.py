"""Read ``config.toml`` of the user's configuration folder: host plug-ins for `pytest-microvm test`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.configuration import parse_strings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAME = "config.toml"
_KEYS = ("plugins", "plugin_path")
_TABLES = ("test", "signatures")  # signatures: pytest_microvm.images.oci.signature_rules reads it


@dataclass(frozen=True)
class UserFile:
    """The user's own settings.

    Args:
        plugins: pytest plug-ins for the host, as ``-p`` names them.
        plugin_path: Folders to search for them, besides the installed packages.
    """

    plugins: tuple[str, ...] = ()
    plugin_path: tuple[Path, ...] = ()


def read_user_file(folder: Path) -> UserFile:
    """Parse ``config.toml`` in ``folder``; a missing file means defaults.

    Raises:
        UsageError: The file is unreadable or invalid.
    """
    file = folder / NAME
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return UserFile()
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: {error}") from error
    table = data.get("test", {})
    unknown = [key for key in data if key not in _TABLES]
    unknown += [key for key in table if key not in _KEYS] if isinstance(table, dict) else ["test"]
    if unknown:
        raise UsageError(
            f"{file}: {' '.join(unknown)} is not known there",
            resolution=f"it may have a table [test] with {' and '.join(_KEYS)}, and a table [signatures]",
        )
    folders = [Path(each).expanduser() for each in parse_strings(table.get("plugin_path", []), "plugin_path")]
    for each in folders:
        if not each.is_absolute():
            raise UsageError(
                f"{file}: invalid plugin_path: expected absolute paths, got {each}",
                resolution="write its whole path",
            )
    return UserFile(parse_strings(table.get("plugins", []), "plugins"), tuple(folders))
