"""List the Pythons of an image: queried once, and cached by the image's digest."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tox.tox_env.python.api import PythonInfo, VersionInfo
from virtualenv.discovery.py_spec import PythonSpec

from pytest_microvm.errors import MachineError

if TYPE_CHECKING:
    from pytest_microvm.machine.microvm import MicroVM

_TIMEOUT = 600.0

_ASK = r"""
for name in python3 python3.7 python3.8 python3.9 python3.10 python3.11 python3.12 python3.13 python3.14 \
    python3.15 pypy3 graalpy; do
  found=$(command -v "$name") && "$found" -I -c '
import json, os, platform, sys, sysconfig
info = sys.version_info
form = "{0.major}.{0.minor}.{0.micro}".format
print(json.dumps({
    "executable": os.path.realpath(sys.executable),
    "called": sys.argv[1],
    "implementation": platform.python_implementation(),
    "version_info": list(info),
    "version": sys.version,
    "is_64": sys.maxsize > 2**32,
    "platform": sys.platform,
    "machine": platform.machine(),
    "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "debug": bool(sysconfig.get_config_var("Py_DEBUG")),
    "markers": {
        "implementation_name": sys.implementation.name,
        "implementation_version": form(sys.implementation.version),
        "os_name": os.name,
        "platform_machine": platform.machine(),
        "platform_python_implementation": platform.python_implementation(),
        "platform_release": platform.release(),
        "platform_system": platform.system(),
        "platform_version": platform.version(),
        "python_full_version": platform.python_version(),
        "python_version": ".".join(platform.python_version_tuple()[:2]),
        "sys_platform": sys.platform,
    },
}))' "$found"
done
true
"""


def interpreters(cache: Path, digest: str, start: Callable[[], MicroVM]) -> list[PythonInfo]:
    """Return the Pythons of an image, ``python3`` first.

    Args:
        cache: The cache folder.
        digest: The image's digest.
        start: Starts a machine of the image, if the list is not cached.

    Raises:
        MachineError: The image has no Python.
    """
    known = cache / "tox" / f"pythons-{digest}.json"
    try:
        return [_info(one) for one in json.loads(known.read_text(encoding="utf-8"))]
    except (OSError, ValueError, LookupError, TypeError):
        pass
    with start() as machine:
        done = machine.run(_ASK, timeout=_TIMEOUT)
    try:
        told = [json.loads(line) for line in done.stdout.splitlines()]
        unique = list({one["executable"]: one for one in reversed(told)}.values())[::-1]
        found = [_info(one) for one in unique]
    except (ValueError, LookupError, TypeError) as error:
        raise MachineError(
            f"the image's Pythons tell nothing: {error}", details=done.stderr[-2000:]
        ) from error
    if not found:
        raise MachineError(
            "the image has no python3",
            details=done.stderr[-2000:],
            resolution="choose an image with a Python: microvm_image = python",
        )
    draft = known.with_suffix(f".{os.getpid()}")
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(unique), encoding="utf-8")
        draft.replace(known)
    except OSError:  # the cache is not writable: the image is queried again next time
        pass
    return found


def chosen(specs: Sequence[str], found: Sequence[PythonInfo]) -> PythonInfo | None:
    """Return the first Python that satisfies one of ``specs``, ``None`` if there is none.

    Args:
        specs: Values of ``base_python``: ``py311``, ``python3.11``, or a path, of which only the name counts;
            the path of tox's own Python, tox's default, accepts any.
        found: The image's Pythons.
    """
    for text in specs:
        if text == sys.executable:
            return found[0]
        spec = PythonSpec.from_string_spec(Path(text).name if "/" in text else text)
        for python in found:
            if _satisfies(python, spec):
                return python
    return None


def _satisfies(python: PythonInfo, spec: PythonSpec) -> bool:
    if spec.path is not None:  # a program's name, not a version
        return Path(spec.path).name == Path(str(python.extra["called"])).name
    name = (spec.implementation or "").lower()
    if name not in ("", "py", "python", python.implementation.lower()):
        return False
    info = python.version_info
    wanted = (spec.major, spec.minor, spec.micro)
    if any(want is not None and want != has for want, has in zip(wanted, info[:3], strict=True)):
        return False
    threaded = getattr(spec, "free_threaded", None)
    if threaded is not None and bool(threaded) != python.free_threaded:
        return False
    return spec.architecture is None or (spec.architecture == 64) == python.is_64  # noqa: PLR2004 - bits


def _info(told: dict[str, Any]) -> PythonInfo:
    return python_info(
        implementation=str(told["implementation"]),
        version_info=told["version_info"],
        version=str(told["version"]),
        is_64=bool(told["is_64"]),
        platform=str(told["platform"]),
        extra={"executable": Path(str(told["executable"])), "called": str(told["called"])},
        free_threaded=bool(told["free_threaded"]),
        debug=bool(told["debug"]),
        machine=str(told["machine"]),
        marker_environment={str(key): str(value) for key, value in told["markers"].items()},
    )


def python_info(*, version_info: Sequence[Any], **known: Any) -> PythonInfo:
    """Return tox's description of a Python, with the fields that this version of tox has."""
    major, minor, micro, level, serial = version_info
    version = VersionInfo(int(major), int(minor), int(micro), str(level), int(serial))
    fields = {field.name for field in dataclasses.fields(PythonInfo)}  # tox 4.60 has no marker_environment
    given = {name: value for name, value in known.items() if name in fields}
    return PythonInfo(version_info=version, **given)
