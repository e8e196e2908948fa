"""The templates that this process uses: held open, so that none is removed, and replaced when damaged."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pytest_microvm.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_microvm.templates.chain import Base, Chain, TemplateStep
    from pytest_microvm.templates.store import Template, TemplateStore


class HeldTemplates:
    """Templates by key, each opened once.

    Args:
        store: Returns the store, which is made at first use.
        chain: Returns what makes the templates of a base.
        fetch: Gets a template that is missing into the store, if possible; returns whether it did.
    """

    def __init__(
        self, store: Callable[[], TemplateStore], chain: Callable[[Base], Chain], fetch: Callable[[str], bool]
    ) -> None:
        self._store = store
        self._chain = chain
        self._fetch = fetch
        self._held: dict[str, Template] = {}
        self._steps: dict[str, Sequence[TemplateStep]] = {}
        self._lock = threading.RLock()

    def make(self, base: Base, steps: Sequence[TemplateStep]) -> Template:
        """Return the template that ``steps`` lead to, made if it is missing."""
        chain = self._chain(base)
        held = self._known(chain.key(base, steps), steps)
        if held is not None:
            return held
        return self.hold(chain.ensure(base, steps))  # without the lock: it can take minutes

    def find(self, base: Base, steps: Sequence[TemplateStep]) -> Template | None:
        """Return the template that ``steps`` lead to, if it is here or can be fetched."""
        key = self._chain(base).key(base, steps)
        held = self._known(key, steps)
        if held is not None:
            return held
        found = self._store().open(key)
        if found is None and self._fetch(key):
            found = self._store().open(key)
        return None if found is None else self.hold(found)

    def hold(self, template: Template) -> Template:
        """Hold an open template; of two with the same key, the first one."""
        with self._lock:
            held = self._held.setdefault(template.key, template)
        if held is not template:
            template.close()
        return held

    def intact(self, template: Template, base: Base) -> Template:
        """Return ``template``, or its replacement if it was changed or removed.

        Raises:
            HostError: It cannot be made again.
        """
        if template.intact():
            return template
        with self._lock:
            held = self._held.get(template.key)
            if held is None or not held.intact():
                if held is not None:
                    held.close()
                    del self._held[template.key]
                self._held[template.key] = self._made_again(template.key, base)
            return self._held[template.key]

    def close(self) -> None:
        """Let templates be removed again."""
        with self._lock:
            held, self._held = list(self._held.values()), {}
        for template in held:
            template.close()

    def _known(self, key: str, steps: Sequence[TemplateStep]) -> Template | None:
        with self._lock:
            if key not in self._held:
                self._steps[key] = steps
            return self._held.get(key)

    def _made_again(self, key: str, base: Base) -> Template:
        if key in self._steps:
            return self._chain(base).ensure(base, self._steps[key])
        kept = self._store().open(key)
        if kept is None:
            raise HostError(f"machine {key} is not kept any more", resolution="see `pytest-microvm ps`")
        return kept
