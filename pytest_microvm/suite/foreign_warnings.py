"""Warning categories that exist only in a guest: generated classes of the same name, never imports.

pytest-xdist's controller looks a category up as an attribute of its module, so this module generates a class
for any identifier.
"""

from __future__ import annotations

import builtins
import warnings
from collections.abc import Sequence

import pytest

from pytest_microvm.suite.collected import GuestWarning

_MAX_CLASSES = 1000
_made: dict[tuple[str, type[Warning]], type[Warning]] = {}


def category(names: Sequence[str]) -> type[Warning]:
    """Return the class for a category given by its class names, the most specific first.

    Python's and pytest's own categories are used as they are; any other becomes a generated class of the same
    name, derived from its nearest known base.
    """
    for name in names:
        known = _known(name)
        if known is not None:
            break
    else:
        known = UserWarning
    if not names or _known(names[0]) is not None:
        return known
    short = names[0].rpartition(".")[2]
    if not short.isidentifier() or short.startswith("_") or len(_made) >= _MAX_CLASSES:
        return known
    return _foreign(short, known)


def _known(name: str) -> type[Warning] | None:
    module, _, short = name.rpartition(".")
    found = None
    if not module:
        found = vars(builtins).get(short)
    elif module in {"pytest", "_pytest.warning_types"}:
        found = vars(pytest).get(short)  # not getattr: access to a deprecated name would warn
    return found if isinstance(found, type) and issubclass(found, Warning) else None


def _foreign(name: str, base: type[Warning]) -> type[Warning]:
    return _made.setdefault((name, base), type(name, (base,), {"__module__": __name__}))


def __getattr__(name: str) -> type[Warning]:
    if name.startswith("_") or not name.isidentifier():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _foreign(name, UserWarning)


def warning_message(warning: GuestWarning) -> warnings.WarningMessage:
    """Return ``warning`` as Python's own ``WarningMessage``."""
    kind = category(warning.category)
    try:
        message: Warning | str = kind(warning.message)
    except TypeError:  # the standard categories take a text; a plug-in's may not
        message = warning.message
    return warnings.WarningMessage(
        message=message,
        category=kind,
        filename=warning.filename,
        lineno=warning.lineno,
        line=warning.line if warning.line is not None else "",
    )
