"""Preload the modules of installed plug-ins before the workspace arrives, hidden until code imports them.

Under emulation the plug-ins of an image cost seconds in every collection. They are the same for every
project, so the runner imports them while it starts. A session must not notice. So a preloaded module is not
in ``sys.modules`` until code imports it, and it is served only if the import would find the same file now.
Options (``-p no:NAME``, PYTEST_DISABLE_PLUGIN_AUTOLOAD), the order of imports, and a project's own modules of
the same name keep their meaning.

1. A forked child runs a session with all installed plug-ins and reports the modules that it loaded. All other
   effects of the plug-ins' hooks end with the child.
2. The runner imports those modules, with pytest's assertion rewriting, and removes them from ``sys.modules``.
3. :class:`HeldModules`, the first finder of ``sys.meta_path``, serves them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import _pytest.assertion
import pytest
from _pytest.assertion.rewrite import AssertionRewritingHook

from pytest_microvm.guest.runner_warm_up import run_session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import ModuleType

_CHILD_TIMEOUT = 60.0  # seconds; plug-ins that take longer to load are loaded in the session
_MAX_ANSWER = 4 * 1024 * 1024  # bytes
_STANDARD_LIBRARY: frozenset[str] = getattr(sys, "stdlib_module_names", frozenset())  # Python 3.10


def preload() -> HeldModules:
    """Import the modules of the installed plug-ins; none if plug-in autoload is disabled."""
    if os.environ.get("PYTEST_DISABLE_PLUGIN_AUTOLOAD"):
        return HeldModules([])
    loader = _Loader(_modules_of_a_session())
    run_session([loader], autoload=False)
    return HeldModules(loader.groups)


@dataclass(frozen=True)
class _ModuleGroup:
    """The modules that one import loaded.

    Args:
        modules: By name, in the order in which they were loaded.
        specs: Their specs, where they have one.
        files: Modification and change time and size of each file, by path.
        rewritten: Names registered for assertion rewriting during the import.
        places: Global variables with a path in the folder of the import: module, name and relative path.
    """

    modules: dict[str, ModuleType]
    specs: dict[str, ModuleSpec]
    files: dict[str, tuple[int, int, int] | None]
    rewritten: tuple[str, ...]
    places: tuple[tuple[str, str, str], ...]

    def move(self) -> None:
        """Let paths in the folder of the import lead to the current folder, as if it were imported now."""
        for module, name, below in self.places:
            values = vars(self.modules[module])
            values[name] = type(values[name])(os.path.normpath(os.path.join(os.getcwd(), below)))

    @property
    def of_python(self) -> bool:
        """True if all modules belong to the standard library."""
        return all(name.partition(".")[0] in _STANDARD_LIBRARY for name in self.modules)


class HeldModules:
    """Preloaded modules: a finder and loader for ``sys.meta_path``.

    Groups are released in the order in which they were loaded, each with all before it, since later groups
    may refer to earlier ones. If a group cannot be released, neither are those after it: they are imported
    again, as without this class.

    Attributes:
        is_measured: Returns whether coverage measures a module of a name and file; it is loaded again then.
    """

    def __init__(self, groups: Sequence[_ModuleGroup]) -> None:
        self._groups = list(groups)
        self._places = {name: place for place, group in enumerate(groups) for name in group.modules}
        self._released = 0  # number of groups in sys.modules
        self._hook: AssertionRewritingHook | None = None
        self._lock = threading.RLock()
        self.is_measured: Callable[[str, str], bool] = lambda _name, _file: False

    def get(self, name: str) -> ModuleType | None:
        """Return a loaded module, from ``sys.modules`` or held; ``None`` if it is neither."""
        place = self._places.get(name)
        return sys.modules.get(name) or (None if place is None else self._groups[place].modules[name])

    def install(self) -> None:
        """Start serving imports, ahead of the rewriting hook that the next session installs."""
        if not self._groups:
            return
        sys.meta_path.insert(0, self)
        original = _pytest.assertion.install_importhook

        def install_importhook(config: pytest.Config) -> AssertionRewritingHook:
            _pytest.assertion.install_importhook = original
            self._hook = original(config)
            self._mark(self._groups[: self._released])
            with contextlib.suppress(ValueError):  # no module is held any more
                sys.meta_path.remove(self)
                sys.meta_path.insert(0, self)
            return self._hook

        _pytest.assertion.install_importhook = install_importhook

    # Called by importlib

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        """Release a held module's group and those before it, and return its spec; ``None`` if not held."""
        with self._lock:
            place = self._places.get(name, -1)
            if place < self._released or not self._release(place, name):
                return None
        return ModuleSpec(name, self, origin="held")  # type: ignore[arg-type] # a loader by its methods

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the held module."""
        return self._groups[self._places[spec.name]].modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec; its code has already run."""
        spec = module.__spec__
        assert spec is not None
        module.__spec__ = self._groups[self._places[spec.name]].specs.get(spec.name)

    # How groups are released

    def _release(self, place: int, wanted: str) -> bool:
        groups = self._groups[self._released : place + 1]
        if not all(self._as_before(group) for group in groups):
            self._places = {name: at for name, at in self._places.items() if at < self._released}
            self._leave()
            return False
        self._mark(groups)
        for group in groups:
            group.move()
            sys.modules.update({name: module for name, module in group.modules.items() if name != wanted})
        self._released = place + 1
        if self._released == len(self._groups):
            self._leave()
        return True

    def _mark(self, groups: Iterable[_ModuleGroup]) -> None:
        for group in groups:
            if self._hook is not None:
                self._hook.mark_rewrite(*group.rewritten)

    def _leave(self) -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]

    def _as_before(self, group: _ModuleGroup) -> bool:
        """Return True if importing the group now would load the same files in the same way."""
        if self._hook is None and not group.of_python:  # --assert=plain: nothing is rewritten
            return False
        if any(name in sys.modules for name in group.modules):  # a project's own stand-in
            return False
        if any(_stamp(path) != stamp for path, stamp in group.files.items()):
            return False
        if any(self.is_measured(name, spec.origin or "") for name, spec in group.specs.items()):
            return False
        tops = (name for name in group.specs if "." not in name)
        return all(_places(self._found(name)) == _places(group.specs[name]) for name in tops)

    def _found(self, name: str) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is self or isinstance(finder, AssertionRewritingHook):
                continue
            spec = finder.find_spec(name, None)
            if spec is not None:
                return spec
        return None


def _places(spec: ModuleSpec | None) -> tuple[str | None, list[str]] | None:
    return None if spec is None else (spec.origin, list(spec.submodule_search_locations or ()))


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size


class _Loader:
    """A plug-in that imports modules, group by group, once its session's rewriting hook is installed.

    Args:
        names: The modules to import, in order.
    """

    def __init__(self, names: _Names) -> None:
        self.groups: list[_ModuleGroup] = []
        self._names = names

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> int:
        """Import the modules, and end the session before any test runs."""
        hook = config.pluginmanager.rewrite_hook
        if isinstance(hook, AssertionRewritingHook):
            hook.mark_rewrite(*self._names.rewritten)
            before = set(sys.modules)
            self._load_all(hook)
            for name in set(sys.modules) - before:
                del sys.modules[name]
        return 0

    def _load_all(self, hook: AssertionRewritingHook) -> None:
        marked: list[str] = []
        mark = hook.mark_rewrite

        def marking(*names: str) -> None:
            marked.extend(names)
            mark(*names)

        hook.mark_rewrite = marking  # type: ignore[method-assign]
        for name in self._names.imported:
            if name not in sys.modules:
                marked.clear()
                group = _load(name, marked)
                if group is None:  # later modules may depend on it
                    return
                self.groups.append(group)


def _load(name: str, marked: list[str]) -> _ModuleGroup | None:
    """Import a module; ``None`` if that fails, warns, or changes more than ``sys.modules``."""
    before, state = set(sys.modules), _ProcessState()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            filters = list(warnings.filters)
            __import__(name)
            harmless = not warned and filters == warnings.filters
    except BaseException:  # noqa: BLE001 - a plug-in may raise anything; the session will report it
        harmless = False
    modules = {new: module for new, module in sys.modules.items() if new not in before}
    if not (state.restore() and harmless):
        for new in modules:
            del sys.modules[new]
        return None
    specs = {new: spec for new, module in modules.items() if (spec := _spec(module)) is not None}
    files = {spec.origin: _stamp(spec.origin) for spec in specs.values() if spec.has_location and spec.origin}
    return _ModuleGroup(modules, specs, files, tuple(marked), tuple(_noted_paths(modules)))


def _noted_paths(modules: dict[str, ModuleType]) -> Iterator[tuple[str, str, str]]:
    """Yield the global variables that hold a path in the current folder."""
    here = os.getcwd()
    for module, loaded in modules.items():
        for name, value in list(getattr(loaded, "__dict__", {}).items()):
            if isinstance(value, (str, PurePath)):
                path = str(value)
                if path == here or path.startswith(here + os.sep):
                    yield module, name, os.path.relpath(path, here)


def _spec(module: object) -> Any:
    return getattr(module, "__spec__", None)


class _ProcessState:
    """A snapshot of process state, besides ``sys.modules``, that an import may change."""

    def __init__(self) -> None:
        lists: tuple[list[Any], ...] = (sys.path, sys.meta_path, sys.path_hooks)
        self._lists = [(each, list(each)) for each in lists]
        self._environ = dict(os.environ)
        self._others = self._now()

    def restore(self) -> bool:
        """Undo changes where possible; return True if nothing had changed."""
        same = self._others == self._now() and self._environ == dict(os.environ)
        for each, before in self._lists:
            same = same and each == before
            each[:] = before
        if self._environ != dict(os.environ):
            os.environ.clear()
            os.environ.update(self._environ)
        return same

    @staticmethod
    def _now() -> tuple[object, ...]:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
        return (os.getcwd(), threading.active_count(), sys.excepthook, sys.stdout, sys.stderr, *handlers)


# The child


@dataclass(frozen=True)
class _Names:
    """The modules of a session with all plug-ins.

    Args:
        imported: Modules that it loaded, those of the standard library first.
        rewritten: Names of the modules whose assertions pytest rewrites.
    """

    imported: list[str]
    rewritten: list[str]


def _modules_of_a_session() -> _Names:
    """Run a session in a child process and return its modules; none if it fails or times out."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with _ending():
            os.close(reading)
            os.setsid()
            _answer(writing)
    os.close(writing)
    try:
        text = _read(reading, time.monotonic() + _CHILD_TIMEOUT)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)  # its own child processes
    try:
        return _Names(**json.loads(text))
    except (ValueError, TypeError):
        return _Names([], [])


@contextlib.contextmanager
def _ending() -> Any:
    """End the process after the block, even if it raised."""
    try:
        yield
    finally:
        os._exit(0)


def _answer(pipe: int) -> None:
    quiet = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(quiet, standard)
    before, marks = set(sys.modules), _Marks()
    run_session([marks], autoload=True)
    names = [
        name
        for name, module in list(sys.modules.items())
        if name not in before and getattr(_spec(module), "name", None) == name
    ]
    names.sort(key=lambda name: name.partition(".")[0] not in _STANDARD_LIBRARY)
    with os.fdopen(pipe, "w") as stream:
        json.dump({"imported": names, "rewritten": sorted(marks.names)}, stream)


class _Marks:
    """A plug-in that records the modules registered for assertion rewriting in its session."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def pytest_configure(self, config: pytest.Config) -> None:
        self.names = set(getattr(config.pluginmanager.rewrite_hook, "_must_rewrite", ()))


def _read(pipe: int, deadline: float) -> bytes:
    """Read a pipe to its end; return b"" if the end does not come before the deadline or the size limit."""
    data = b""
    while len(data) < _MAX_ANSWER:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return b""
        piece = os.read(pipe, 65536)
        if not piece:
            return data
        data += piece
    return b""
