"""``microvm.lock``: the file with everything that makes up a project's images, as JSON.

A project brings this file, so its content is hostile: it is bounded, every value has a fixed form, and no
value is used as a path or an address. Values are compared with those of an image. Digests alone have another
use: to look for a file of the store, and to ask the registry of a reference that comes from elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_microvm.errors import UsageError
from pytest_microvm.images.kit_keys import ARCHITECTURES
from pytest_microvm.untrusted.nofollow import read_below
from pytest_microvm.untrusted.text import sanitize_line

FILE = "microvm.lock"
"""Its name, in the root of a project."""

MAX_SIZE = 8 * 1024**2
"""Bytes that it may have."""

_FORMAT = 1
_MOST_IMAGES = 1000
_MOST_NAME = 2048  # characters; as of a reference
_DEPTH = 4  # of tables and lists in a recipe
_SHOWN = 200  # characters of a value
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

Pins = Mapping[str, Any]
"""What is pinned of an image, by field."""

_Check = Callable[[object], str]  # returns what was expected; empty: the value has the right form


@dataclass(frozen=True)
class PinDifference:
    """A value that is not the pinned one.

    Args:
        field: Its place in the image's entry, such as ``installed.openssl`` or ``diff_ids[1]``.
        locked: The pinned value; ``None``: there is none.
        found: The image's value; ``None``: there is none.
    """

    field: str
    locked: object
    found: object

    def __str__(self) -> str:
        return f"{sanitize_line(self.field, _SHOWN)}: locked {_shown(self.locked)}, now {_shown(self.found)}"


@dataclass(frozen=True)
class ImageLock:
    """The content of a lock file.

    Args:
        images: The pins of each image, by the name that the project uses and by architecture.
    """

    images: Mapping[str, Mapping[str, Pins]]

    def pins(self, name: str, architecture: str) -> Pins | None:
        """Return the pins of an image for an architecture; ``None`` if it is not locked."""
        return self.images.get(name, {}).get(architecture)

    def text(self) -> str:
        """Return the file's text: sorted, one value a line, so that a diff shows what changed."""
        return json.dumps({"format": _FORMAT, "images": self.images}, indent=2, sort_keys=True) + "\n"


def read_lock(project: Path) -> ImageLock | None:
    """Return the lock of a project; ``None`` if it has none.

    Raises:
        UsageError: The file is invalid, too large, or behind a link.
    """
    path = project / FILE
    try:
        data = read_below(project, FILE, MAX_SIZE)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    return None if data is None else parse_lock(data, path)


def write_lock(project: Path, lock: ImageLock) -> Path:
    """Write a project's lock file; return its path. A link in its place is replaced, not followed.

    Raises:
        UsageError: It cannot be written.
    """
    path = project / FILE
    try:
        descriptor, draft = tempfile.mkstemp(dir=project, prefix=f".{FILE}-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(lock.text())
            mask = os.umask(0)
            os.umask(mask)
            Path(draft).chmod(0o666 & ~mask)
            Path(draft).replace(path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    return path


def parse_lock(data: bytes, path: Path) -> ImageLock:
    """Parse a lock file.

    Args:
        data: Its content.
        path: Its path, for errors.

    Raises:
        UsageError: It is not a lock file of this version, or a value has the wrong form.
    """
    try:
        content = json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _invalid(path, f"expected JSON, got {sanitize_line(str(error), _SHOWN)}") from None
    if not isinstance(content, dict) or content.keys() != {"format", "images"}:
        raise _invalid(path, "expected an object with format and images")
    if content["format"] != _FORMAT:
        raise _invalid(path, f"expected format {_FORMAT}, got {_shown(content['format'])}")
    images = content["images"]
    if not isinstance(images, dict) or len(images) > _MOST_IMAGES:
        raise _invalid(path, f"images: expected an object with at most {_MOST_IMAGES} images")
    for name, architectures in images.items():
        if _text(name) or not 0 < len(name) <= _MOST_NAME or not name.isprintable():
            raise _invalid(path, f"images: expected the name of an image, got {_shown(name)}")
        if not isinstance(architectures, dict) or not architectures.keys() <= ARCHITECTURES.keys():
            known = " and ".join(ARCHITECTURES)
            raise _invalid(path, f"images: {_shown(name)}: expected an object with the keys {known}")
        for architecture, pins in architectures.items():
            if wrong := _wrong(pins):
                raise _invalid(path, f"image {_shown(name)} for {architecture}: {wrong}")
    return ImageLock(images)


def differences(locked: Pins, found: Pins) -> list[PinDifference]:
    """Return the values in which an image differs from its pins; all fields are compared."""
    if locked["kind"] != found["kind"]:
        return [PinDifference("kind", locked["kind"], found["kind"])]
    order = list(_FIELDS[found["kind"]])
    return sorted(_compared("", locked, found), key=lambda one: order.index(re.split(r"[.\[]", one.field)[0]))


def _compared(field: str, locked: object, found: object) -> list[PinDifference]:
    if isinstance(locked, Mapping) and isinstance(found, Mapping):
        keys = sorted({*locked, *found})
        prefix = f"{field}." if field else ""
        pairs = [(f"{prefix}{key}", locked.get(key), found.get(key)) for key in keys]
    elif isinstance(locked, (list, tuple)) and isinstance(found, (list, tuple)):
        most = max(len(locked), len(found))
        pairs = [(f"{field}[{n}]", _item(locked, n), _item(found, n)) for n in range(most)]
    else:
        same = locked == found and type(locked) is type(found)
        return [] if same else [PinDifference(field, locked, found)]
    return [difference for pair in pairs for difference in _compared(*pair)]


def _item(values: list[Any] | tuple[Any, ...], number: int) -> object:
    return values[number] if number < len(values) else None


def _wrong(pins: object) -> str:
    """Return what is wrong about the form of an image's pins; empty: nothing."""
    if not isinstance(pins, dict):
        return f"expected an object, got {_shown(pins)}"
    kind = pins.get("kind")
    if not isinstance(kind, str) or kind not in _FIELDS:
        return f"kind: expected {' or '.join(_FIELDS)}, got {_shown(kind)}"
    fields = _FIELDS[kind]
    for field in sorted({*fields, *pins}):
        if field not in fields:
            return f"{_shown(field)}: unknown field"
        if field not in pins:
            return f"{field}: missing"
        if expected := fields[field](pins[field]):
            return f"{field}: expected {expected}, got {_shown(pins[field])}"
    return ""


def _text(value: object) -> str:
    """Check for text that can be encoded; JSON can express half a character."""
    if not isinstance(value, str):
        return "text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "text"
    return ""


def _integer(value: object) -> str:
    return "" if isinstance(value, int) and not isinstance(value, bool) else "an integer"


def _number(value: object) -> str:
    return "" if isinstance(value, (int, float)) and not isinstance(value, bool) else "a number"


def _digest(value: object) -> str:
    return "" if isinstance(value, str) and _DIGEST.fullmatch(value) else "a SHA-256 digest"


def _digest_or_none(value: object) -> str:
    return "" if value == "" else _digest(value)


def _list_of(check: _Check) -> _Check:
    def check_all(value: object) -> str:
        sound = isinstance(value, list) and not any(check(item) for item in value)
        return "" if sound else f"a list, and in it each time {check(None)}"

    return check_all


def _table_of(check: _Check) -> _Check:
    def check_all(value: object) -> str:
        sound = isinstance(value, dict) and not any(_text(key) or check(item) for key, item in value.items())
        return "" if sound else f"an object, and in it each time {check(None)}"

    return check_all


def _recipe(value: object) -> str:
    """Check for a kit's recipe, whose keys are those of kits: texts, numbers, lists and tables of them."""
    return "" if isinstance(value, dict) and _is_plain(value, _DEPTH) else "an object of texts and numbers"


def _is_plain(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        return depth > 0 and not any(map(_text, value)) and _all_plain(value.values(), depth)
    if isinstance(value, list):
        return depth > 0 and _all_plain(value, depth)
    return not _text(value) or not _number(value)


def _all_plain(values: Iterable[object], depth: int) -> bool:
    return all(_is_plain(value, depth - 1) for value in values)


_FILES: dict[str, _Check] = {
    "kernel": _digest,
    "initramfs": _digest,
    "runtime": _digest,
    "file_systems": _list_of(_digest),
    "digest": _digest,
}
_FIELDS: dict[str, dict[str, _Check]] = {
    # in the order in which differences are reported: causes first
    "container": {
        "kind": _text,
        "reference": _text,
        "platform": _text,
        "index": _digest_or_none,
        "manifest": _digest,
        "configuration": _digest,
        "diff_ids": _list_of(_digest),
        "converter": _integer,
        **_FILES,
    },
    "kit": {
        "kind": _text,
        "recipe": _recipe,
        "builder": _integer,
        "key": _digest,
        "installed": _table_of(_text),
        **_FILES,
    },
}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's content; a key that comes twice would show readers another value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice in an object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _shown(value: object) -> str:
    """Return a value for an error."""
    return "nothing" if value is None else sanitize_line(json.dumps(value), _SHOWN)


def _invalid(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{path}: invalid lock file: {what}",
        resolution="restore it, or write it again: pytest-microvm lock",
    )
