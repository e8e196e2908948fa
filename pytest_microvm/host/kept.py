"""Kept machines: frozen on disk when their user is done with them, and entered later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_microvm.errors import UsageError
from pytest_microvm.templates.store import KEPT

if TYPE_CHECKING:
    from pytest_microvm.templates.store import Template, TemplateStore


@dataclass(frozen=True)
class KeptMachine:
    """A machine frozen on disk: ``pytest-microvm shell ID`` enters it.

    Args:
        id: Its id.
        image: Its image's name.
        about: What it was used for.
        since: When it was frozen, in seconds since 1970.
    """

    id: str
    image: str
    about: str
    since: float


def kept_machines(store: TemplateStore) -> list[KeptMachine]:
    """Return the kept machines, the newest first."""
    found = [entry for entry in store.list() if entry.kind == KEPT]
    found.sort(key=lambda entry: -entry.created)
    return [KeptMachine(entry.key, entry.image, entry.about, entry.created) for entry in found]


def open_kept(store: TemplateStore, name: str) -> Template:
    """Return a kept machine as an open template.

    Raises:
        UsageError: There is no kept machine with that id.
    """
    template = store.open(name)
    if template is None or template.meta.get("kind") != KEPT:
        raise UsageError(f"no machine {name!r} was kept", resolution="see `pytest-microvm ps`")
    return template
