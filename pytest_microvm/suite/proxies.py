"""Proxies on the host for pytest nodes in a guest: same ids, names, markers, keywords and locations."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_microvm.suite.collected import Collected, CollectedNode


class _NodeProxy:
    """Base of all proxies: their number in the guest's session, and the guest's ``repr``."""

    number: int
    guest: CollectedNode

    def __repr__(self) -> str:
        return self.guest.representation or f"<{self.guest.class_name} {self.guest.name}>"


class _ProxyParent(_NodeProxy):
    """A proxy with children."""

    def collect(self) -> list[Any]:
        """Raise an error: the children are in the replayed collect report."""
        raise RuntimeError("a proxy has nothing to collect on the host")


class ProxyItem(_NodeProxy, pytest.Item):
    """A test that runs in a guest."""

    def runtest(self) -> None:
        """Raise an error: the test's code is not on the host."""
        raise RuntimeError("this test can only run in its machine")

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Return path, line and name as reported by the guest."""
        return self.path, self.guest.location[1], self.guest.location[2]


class _ProxyDirectory(_ProxyParent, pytest.Directory):
    pass


class _ProxyFile(_ProxyParent, pytest.File):
    pass


class _ProxyCollector(_ProxyParent, pytest.Collector):
    pass


_BASES: dict[str, type[Any]] = {
    "item": ProxyItem,
    "directory": _ProxyDirectory,
    "file": _ProxyFile,
    "collector": _ProxyCollector,
}


@functools.cache
def _class_for(kind: str, name: str) -> type[Any]:
    """Return a class with the name of the guest's node class, which reports and ``--collect-only`` show."""
    return type(name, (_BASES[kind],), {"__module__": __name__})


def build_proxies(collected: Collected, session: pytest.Session) -> list[Any]:
    """Return the proxies for ``collected.nodes`` with the session itself at index 0."""
    built: list[Any] = [session]
    for number, node in enumerate(collected.nodes, 1):
        proxy = _build(node, built[node.parent])
        proxy.number = number
        built.append(proxy)
    return built


def _build(node: CollectedNode, parent: Any) -> Any:
    cls = _class_for(node.kind, node.class_name)
    proxy = cls.from_parent(parent, name=node.name, nodeid=node.nodeid, path=Path(node.path))
    proxy.guest = node
    proxy.extra_keyword_matches.update(node.extra_keywords)
    for mark in node.marks:
        args = () if mark.name == "filterwarnings" else mark.args  # pytest would import its categories
        made = pytest.Mark(mark.name, args, mark.kwargs, _ispytest=True)
        proxy.own_markers.append(made)
        proxy.keywords[mark.name] = made
    if node.doc:
        proxy.obj = SimpleNamespace(__doc__=node.doc)
    if node.kind == "item":
        proxy.location = node.location
        proxy.function = SimpleNamespace(**dict.fromkeys(node.attributes, True))
    return proxy
