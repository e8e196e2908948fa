"""Transfer templates between computers: files without their holes, verified before use.

A template is usable only under the same key, which includes the hypervisor's build and the CPU (ADR 0003).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pytest_microvm.errors import HostError
from pytest_microvm.templates.files import content_digest, next_data
from pytest_microvm.templates.store import Template, TemplateStore

KIND = "prepared"
"""The kind of template that is worth a transfer: it took commands and perhaps downloads to make."""

PIECE = 8 * 1024**2
_FILES = ("ram", "scratch", "state")

Fetch = Callable[[str, int], tuple[int, bytes]]
"""``fetch(name, place)``: offset and bytes of a file's next data at or after ``place``; none at its end."""


def lent(store: TemplateStore, key: str) -> Template | None:
    """Return a template that another computer may fetch, held open; ``None`` if there is none."""
    template = store.open(key)
    if template is not None and (
        template.meta.get("kind") != KIND or set(template.meta["files"]) != {*_FILES}
    ):
        template.close()
        return None
    return template


def piece(template: Template, name: str, place: int) -> tuple[int, bytes]:
    """Return the next data of a local template's file, as :data:`Fetch` does."""
    if name not in _FILES:
        raise HostError(f"a template has no file {name!r}", resolution="use the same version on all hosts")
    return next_data(template.folder / name, place, PIECE)


def receive(store: TemplateStore, key: str, meta: Mapping[str, Any], fetch: Fetch) -> None:
    """Store a template from another computer.

    Args:
        store: The destination.
        key: Its key.
        meta: Its facts, from the other computer.
        fetch: Fetches its data.

    Raises:
        HostError: Its data does not match ``meta`` (nothing of it is kept), or the disk is full.
    """
    with store.draft() as draft:
        for name in _FILES:
            known = meta["files"][name]
            with (draft / name).open("wb") as file:
                file.truncate(known["size"])
                place = 0
                while True:
                    start, data = fetch(name, place)
                    if not data:
                        break
                    if not place <= start <= known["size"] - len(data):
                        raise _damaged(name)
                    file.seek(start)
                    file.write(data)
                    place = start + len(data)
            if content_digest(draft / name) != known["sha256"]:
                raise _damaged(name)
        facts = {name: str(meta.get(name, "")) for name in ("kind", "image", "parent")}
        store.publish(key, draft, facts)


def _damaged(name: str) -> HostError:
    return HostError(
        f"a template's {name} arrived damaged", resolution="nothing: the template is made here instead"
    )
