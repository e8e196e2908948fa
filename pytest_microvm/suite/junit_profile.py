"""``--microvm-junit-profile``: rewrite pytest's JUnit file for its consumer, such as a CI system."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.reports.profiles import Profile, profile_named
from pytest_microvm.reports.reading import read_report
from pytest_microvm.reports.values import Case
from pytest_microvm.reports.writing import write_report

_FOLDER = "microvm.artifacts"
_EVIDENCE = ("console.txt", "report.txt", "events.jsonl", "network.jsonl", "machine.json")


def shape_junit(config: pytest.Config, name: str) -> None:
    """Register a plug-in that rewrites this run's JUnit file at its end, if one is written.

    Args:
        config: pytest's configuration; of pytest-xdist's processes only the controller writes the file.
        name: The profile's name.

    Raises:
        UsageError: The command line asks for a profile, but for no file.
    """
    from _pytest.junitxml import xml_key  # noqa: PLC0415 - only runs with a profile

    if hasattr(config, "workerinput"):
        return
    profile = profile_named(name, "--microvm-junit-profile")
    xml: Any = config.stash.get(xml_key, None)
    if xml is not None:
        xml.family = "xunit1"  # xunit2 has neither file nor line
        config.pluginmanager.register(_Shaping(config, Path(xml.logfile), profile))
    elif config.getoption("microvm_junit_profile") is not None:
        raise UsageError(
            "--microvm-junit-profile says for whom a JUnit file is, but none is written",
            resolution="add --junitxml=FILE",
        )


class _Shaping:
    """A plug-in that rewrites the file after pytest has written it."""

    def __init__(self, config: pytest.Config, path: Path, profile: Profile) -> None:
        self._config = config
        self._path = path
        self._profile = profile

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """Rewrite the file after pytest's own plug-in has written it."""
        result = yield
        report = read_report(self._path, ours=True)
        suites = [replace(suite, cases=tuple(map(_with_evidence, suite.cases))) for suite in report.suites]
        try:
            if not report.trouble:
                write_report(self._path, suites, self._profile, project=self._config.invocation_params.dir)
        except OSError as error:
            self._tell(str(error))
        else:
            self._tell(report.trouble)
        return result

    def _tell(self, trouble: str) -> None:
        reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        if trouble and reporter is not None:
            line = f"microvm: {self._path} is as pytest wrote it, not for {self._profile.name}: {trouble}"
            reporter.write_line(line, red=True)


def _with_evidence(case: Case) -> Case:
    """Return the case with its machine's saved files as attachments."""
    folder = next((Path(value) for name, value in case.properties if name == _FOLDER), None)
    if folder is None:
        return case
    return replace(case, attachments=tuple(path for name in _EVIDENCE if (path := folder / name).is_file()))
