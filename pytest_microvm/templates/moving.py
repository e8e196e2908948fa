"""A template goes from one computer to another: its files without their holes, verified before it is used.

It is of use there only under the same key, which the hypervisor's build and the CPU are part of (ADR 0003).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pytest_microvm.errors import HostError
from pytest_microvm.templates.files import content_digest, next_data
from pytest_microvm.templates.store import Template, TemplateStore

KIND = "prepared"
"""What is worth its way: what took commands and perhaps downloads to make."""

PIECE = 8 * 1024**2
_FILES = ("ram", "scratch", "state")

Fetch = Callable[[str, int], tuple[int, bytes]]
"""``fetch(name, place)``: a file's next data from ``place`` on, and where it begins; none: at its end."""


def lent(store: TemplateStore, key: str) -> Template | None:
    """Return a template that another computer may have, held; ``None`` if there is none."""
    template = store.open(key)
    if template is not None and (
        template.meta.get("kind") != KIND or set(template.meta["files"]) != {*_FILES}
    ):
        template.close()
        return None
    return template


def piece(template: Template, name: str, place: int) -> tuple[int, bytes]:
    """Return what :data:`Fetch` does, of a template that is here."""
    if name not in _FILES:
        raise HostError(f"a template has no file {name!r}", resolution="use the same version on all hosts")
    return next_data(template.folder / name, place, PIECE)


def receive(store: TemplateStore, key: str, meta: Mapping[str, Any], fetch: Fetch) -> None:
    """Put another computer's template into the store.

    Args:
        store: Where to.
        key: Its key.
        meta: Its facts.
        fetch: Gets its data.

    Raises:
        HostError: It is not what its facts say; nothing of it stays. Or the disk is full.
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
