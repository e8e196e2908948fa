"""Temporary folders of failed tests: they come back from the machines to where pytest has its own."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from pytest_microvm.errors import MicroVMError, TransferError, UsageError
from pytest_microvm.mounts.copying import remove
from pytest_microvm.suite import checks
from pytest_microvm.suite.backend import RunnerMachine
from pytest_microvm.suite.summary import machine_outcome
from pytest_microvm.untrusted.extraction import MAX_BYTES, ExtractionLimits
from pytest_microvm.untrusted.manifest import MAX_PATHS, is_git, walk
from pytest_microvm.untrusted.nofollow import open_folder
from pytest_microvm.untrusted.text import sanitize_line

_MAX_FOLDERS = 1000  # of one test
_MAX_NAME = 200  # bytes of a folder's name, to which pytest may add a number
_MAX_TOLD = 1000
_SHOWN = 5
_GIT = "git's own"
_KEY = "microvm_kept_folders"


@dataclass(frozen=True)
class GuestFolders:
    """The temporary folders of a test in its machine; not safe to show.

    Args:
        base: The folder that holds them.
        names: Their names.
    """

    base: PurePosixPath
    names: tuple[str, ...]


def parse_folders(value: object) -> GuestFolders | None:
    """Return the folders that a guest named; ``None`` if it named none.

    Raises:
        ProtocolViolation: They are malformed.
    """
    if value is None:
        return None
    found = checks.mapping(value, "list of temporary folders")
    base = found.get("base")
    if not isinstance(base, str) or not base.startswith("/") or "\0" in base:
        raise checks.violation("a temporary folder that is no path")
    return GuestFolders(PurePosixPath(base), checks.paths(found.get("names")))


class KeptFolders:
    """The plug-in that brings temporary folders of failed tests back, each while its machine still runs.

    pytest's own factory on this computer says where they go: to the user's ``--basetemp``, or to a new
    numbered folder, of which it keeps as many as ``tmp_path_retention_count`` says.

    Args:
        config: pytest's configuration.

    Raises:
        UsageError: pytest has no temporary folders.
    """

    def __init__(self, config: pytest.Config) -> None:
        factory = getattr(config, "_tmp_path_factory", None)
        if factory is None:
            raise UsageError(
                "--microvm-keep-tmp needs pytest's plug-in tmpdir, which is switched off",
                resolution="leave out -p no:tmpdir",
            )
        self._config = config
        self._factory: Any = factory
        self._is_worker = hasattr(config, "workerinput")
        self._refused = self._why_nothing_is_kept()
        self._room: int | None = None  # bytes that may still come, once a machine's limits are known
        self._entries = MAX_PATHS
        self._known: set[tuple[str, str]] = set()  # machines and names of folders that have come
        self._tests: dict[str, int] = {}  # failed tests by the folder of this computer that has theirs
        self._told: list[str] = []
        self._left_out: list[str] = []
        self._failed = False

    def begin(self) -> None:
        """Empty the user's ``--basetemp``, as pytest does before its first temporary folder.

        Raises:
            UsageError: It cannot be emptied or made.
        """
        folder = self._config.option.basetemp
        if folder is None or self._refused:
            return
        try:
            self._factory.getbasetemp()
        except OSError as error:
            raise UsageError(
                f"--basetemp={folder} cannot be used: {error.strerror or error}",
                resolution="name a folder that this user may empty, in one that exists",
            ) from error

    def take(self, machine: RunnerMachine, nodeid: str, folders: GuestFolders | None) -> list[str]:
        """Bring the folders of a failed test back.

        What fails is told at the end of the run.

        Args:
            machine: The test's machine; it still runs.
            nodeid: The test.
            folders: Its folders in the machine.

        Returns:
            Their places on this computer, safe to show.
        """
        self._failed = True
        if folders is None or self._refused:
            return []
        places = []
        for name in folders.names[:_MAX_FOLDERS]:
            if (machine.facts.id, name) in self._known:  # of a fixture that an earlier failed test used, too
                continue
            try:
                places.append(self._bring(machine, folders.base, name))
            except (MicroVMError, OSError) as error:
                why = error.brief if isinstance(error, MicroVMError) else error.strerror or error
                self._tell(f"{nodeid}: {name}: {why}")
                continue
            self._known.add((machine.facts.id, name))
        if len(folders.names) > _MAX_FOLDERS:
            self._tell(f"{nodeid}: more than {_MAX_FOLDERS} folders")
        if places:
            base = str(self._factory.getbasetemp())
            self._tests[base] = self._tests.get(base, 0) + 1
        return [sanitize_line(str(place)) for place in places]

    def _bring(self, machine: RunnerMachine, base: PurePosixPath, name: str) -> Path:
        if not _is_usable(name):
            raise TransferError("its name cannot be one of this computer")
        top = self._factory.getbasetemp()
        with tempfile.TemporaryDirectory(dir=top, prefix=".microvm-") as staging:
            content = Path(staging, "content")
            content.mkdir(mode=0o700)
            left_out: dict[str, str] = {}
            machine.pull_folder(base / name, content, self._limits(machine, left_out))
            self._count(content, left_out)
            place = self._place(top, name)
            content.rename(place)  # over the empty folder
        for path, why in left_out.items():
            if len(self._left_out) < _MAX_TOLD:
                self._left_out.append(sanitize_line(f"{place.name}/{path}: {why}"))
        return place

    def _limits(self, machine: RunnerMachine, left_out: dict[str, str]) -> ExtractionLimits:
        """Return the limits of one folder: those of a run are what one machine can hold."""
        if self._room is None:
            limits = machine.facts.limits
            self._room = min(MAX_BYTES, limits.disk + limits.memory)
        return ExtractionLimits(self._room, self._entries, {}, left_out)

    def _count(self, content: Path, left_out: dict[str, str]) -> None:
        """Count what has come, and remove what git would obey if a user entered the folder."""
        assert self._room is not None
        gits = []
        root = open_folder(content.resolve())
        try:
            for found in walk(root):
                self._entries -= 1
                if stat.S_ISREG(found.status.st_mode):
                    self._room -= found.status.st_size
                if is_git(found.path) and not is_git(found.path.rpartition("/")[0]):
                    gits.append(found.path)
        finally:
            os.close(root)
        for path in gits:
            left_out[path] = _GIT
            remove(content / path)

    def _place(self, top: Path, name: str) -> Path:
        """Make the folder for what has come: of the same name, or with another number as by pytest."""
        place = top / name
        try:
            place.mkdir(mode=0o700)
        except FileExistsError:
            made: Path = self._factory.mktemp(re.sub(r"[0-9]+$", "", name) or "tmp")
            return made
        return place

    def _why_nothing_is_kept(self) -> str:
        """Return the setting with which pytest keeps no temporary folder; "": none."""
        given = getattr(self._config, "workerinput", {}).get(_KEY)
        if given is not None:
            return str(given)
        if self._config.getini("tmp_path_retention_policy") == "none":
            return "tmp_path_retention_policy is none"
        if self._config.option.basetemp is None and not int(self._config.getini("tmp_path_retention_count")):
            return "tmp_path_retention_count is 0"
        return ""

    def _tell(self, line: str) -> None:
        if len(self._told) < _MAX_TOLD:
            self._told.append(sanitize_line(line))

    # Hooks of pytest: workers tell their controller

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker of pytest-xdist, which has a ``--basetemp`` of its own, whether to keep any."""
        node.workerinput[_KEY] = self._refused

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notice tests whose machines ended with their folders."""
        outcome = machine_outcome(report)
        if outcome in {"crashed", "quota"} and not self._is_worker and not self._refused:
            self._tell(f"{report.nodeid}: its machine has ended ({outcome})")

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """As a worker of pytest-xdist, send what there is to say to the controller."""
        try:
            return (yield)
        finally:
            if self._is_worker and hasattr(self._config, "workeroutput"):
                said = (self._failed, self._tests, self._told, self._left_out)
                self._config.workeroutput[_KEY] = said

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """As the controller, take what a worker says."""
        said = getattr(node, "workeroutput", {}).get(_KEY)
        if said is None:
            return
        failed, tests, told, left_out = said
        self._failed = self._failed or failed
        own = self._factory.getbasetemp()
        for folder, count in tests.items():
            base = str(own) if Path(folder).is_relative_to(own) else folder
            self._tests[base] = self._tests.get(base, 0) + count
        self._told += told
        self._left_out += left_out

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Show where the folders are, and what did not come back."""
        for folder, count in self._tests.items():
            tests = "1 failed test" if count == 1 else f"{count} failed tests"
            terminalreporter.write_line(f"microvm: kept tmp_path of {tests} in {sanitize_line(folder)}")
        if self._failed and self._refused:
            terminalreporter.write_line(f"microvm: no tmp_path was kept: {self._refused}")
        if self._left_out:
            terminalreporter.write_line(f"microvm: left out of what was kept: {_some(self._left_out)}")
        if self._told:
            terminalreporter.write_line(
                f"microvm: tmp_path not kept: {_some(self._told)}; --microvm-keep=failed keeps the machines "
                "of failed tests",
                yellow=True,
            )


def _is_usable(name: str) -> bool:
    """Return True if a guest's name of a folder may be one of this computer."""
    return (
        name.isprintable()
        and not name.startswith(".")
        and "/" not in name
        and 0 < len(name.encode(errors="surrogatepass")) <= _MAX_NAME
    )


def _some(lines: list[str]) -> str:
    """Return the first lines, and how many more there are."""
    more = len(lines) - _SHOWN
    return "; ".join([*lines[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])
