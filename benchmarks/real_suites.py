"""Run published packages' suites natively and in machines, in one environment, and compare outcomes.

The packages are source distributions from pip's configured index. One new virtual environment gets all of
them, with what their tests need and pytest-microvm; ``pytest`` and ``pytest --microvm`` run in it, without
any configuration.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase

import pytest_microvm

# pytest-asyncio, which other suites here need, warns unless it is configured; these suites forbid warnings
NO_ASYNCIO = ("-p", "no:asyncio")

# packaging has 62,000 tests; without these two files 5,600, which is enough to wait for under emulation
SMALL_PART = ("tests", "--ignore=tests/test_version.py", "--ignore=tests/test_requirements.py", *NO_ASYNCIO)


@dataclass(frozen=True)
class Suite:
    """A package whose suite is run.

    Args:
        package: Its name in the index.
        needs: What its tests need besides pytest.
        arguments: For pytest.
        isolation: How often a machine is new; suites of many hundred tests share one in a module.
    """

    package: str
    needs: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    isolation: str = "module"


SUITES = (
    Suite("iniconfig", isolation="test"),
    Suite("pluggy", ("pytest-benchmark",), ("testing", "--benchmark-disable", *NO_ASYNCIO)),
    Suite("itsdangerous", ("freezegun",), ("tests", *NO_ASYNCIO)),
    Suite("markupsafe", (), ("tests", *NO_ASYNCIO)),
    Suite("click", (), ("tests", *NO_ASYNCIO)),
    Suite("jinja2", ("trio",), ("tests", *NO_ASYNCIO)),
    Suite(
        "werkzeug",
        ("ephemeral-port-reserve", "pytest-timeout", "watchdog", "cryptography"),
        ("tests", "-k", "not reloader", *NO_ASYNCIO),  # the reloader watches all that changes in /tmp
    ),
    # test_cli imports a private name that pytest 9.2 does not have
    Suite(
        "flask",
        ("blinker", "asgiref", "python-dotenv"),
        ("tests", "--ignore=tests/test_cli.py", *NO_ASYNCIO),
    ),
    Suite("structlog", ("freezegun", "pretend", "pytest-asyncio", "time-machine"), ("tests",)),
    Suite("tomlkit", ("pyyaml",), ("tests",)),
    Suite("tenacity", ("tornado", "typeguard"), ("tests",)),
    Suite("pytest-mock", ("pytest-asyncio",), ("tests",)),
    Suite("attrs", ("cloudpickle", "hypothesis", "pympler"), ("tests",)),
    Suite("h11", (), ("h11",)),
    Suite("idna", (), ("tests",)),
    Suite("packaging", ("pretend", "hypothesis", "tomli_w"), SMALL_PART),
)


class SuiteError(Exception):
    """A suite cannot be compared."""


def main() -> int:
    """Run the suites named, or all; the exit status says whether all came out the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "packages", nargs="*", help="which (default: all): " + ", ".join(s.package for s in SUITES)
    )
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="make the environment from this interpreter (default: %(default)s)",
    )
    parser.add_argument(
        "--coverage", action="store_true", help="compare the packages' coverage, too, to the line and branch"
    )
    asked = parser.parse_args()
    suites = [suite for suite in SUITES if not asked.packages or suite.package in asked.packages]
    different = 0
    with tempfile.TemporaryDirectory(prefix="real-suites-") as folder:
        python = environment(Path(folder) / "env", asked.python, suites, coverage=asked.coverage)
        for suite in suites:
            try:
                different += compare(suite, Path(folder) / suite.package, python, coverage=asked.coverage)
            except SuiteError as error:
                print(error, flush=True)
                different += 1
    return min(different, 1)


def environment(folder: Path, base: str, suites: list[Suite], *, coverage: bool) -> Path:
    """Make an environment of ``base`` with this package, the suites and their needs; return its Python."""
    subprocess.run([base, "-m", "venv", str(folder)], check=True)
    source = Path(pytest_microvm.__file__).parents[1]
    own = [f"pytest-microvm=={version('pytest-microvm')}"]
    if (source / "pyproject.toml").exists():  # an editable installation
        own = ["-e", str(source)]
    needs = {name for suite in suites for name in (suite.package, *suite.needs)}
    python = folder / "bin" / "python"
    pip(python, ["install", *own, *sorted(needs), *(["pytest-cov"] if coverage else [])])
    return python


def compare(suite: Suite, folder: Path, python: Path, *, coverage: bool) -> int:
    """Run one suite both ways, print what differs, and return how many tests and files do."""
    project = fetch(suite, folder, python)
    both = [f"--cov={suite.package}", "--cov-branch", "--cov-report=json"] if coverage else []
    native, native_seconds = run(suite, project, python, "native", both)
    covered = [take_coverage(project)] if coverage else []
    remote, remote_seconds = run(
        suite, project, python, "microvm", [*both, "--microvm", f"--microvm-isolation={suite.isolation}"]
    )
    covered += [take_coverage(project)] if coverage else []
    if not native:
        raise SuiteError(f"{project.name}: its source distribution has no tests")
    differing = sorted(name for name in native.keys() | remote.keys() if native.get(name) != remote.get(name))
    counts = ", ".join(f"{list(native.values()).count(kind)} {kind}" for kind in sorted(set(native.values())))
    print(
        f"{project.name}: {len(native)} tests natively ({counts}) in {native_seconds:.0f} s, "
        f"{len(remote)} in machines in {remote_seconds:.0f} s; {len(differing)} differ",
        flush=True,
    )
    for name in differing:
        print(f"  {name}: natively {native.get(name)}, in a machine {remote.get(name)}", flush=True)
    return len(differing) + (differing_files(*covered) if coverage else 0)


def take_coverage(project: Path) -> dict[str, object]:
    """Return what coverage measured in each file, and remove its report."""
    path = project / "coverage.json"
    files: dict[str, object] = json.loads(path.read_text())["files"]
    path.unlink()
    return files


def differing_files(native: dict[str, object], remote: dict[str, object]) -> int:
    """Print how many files have the same coverage, and which have another; return how many these are."""
    differing = [name for name in native.keys() | remote.keys() if native.get(name) != remote.get(name)]
    print(f"  coverage of {len(native)} files: {len(differing)} differ", flush=True)
    for name in sorted(differing):
        print(f"  {name}", flush=True)
    return len(differing)


def fetch(suite: Suite, folder: Path, python: Path) -> Path:
    """Fetch the source distribution of the installed version, and unpack it."""
    show = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    installed = subprocess.check_output([str(python), "-c", show, suite.package], text=True).strip()
    wanted = f"{suite.package}=={installed}"
    pip(python, ["download", "--no-deps", "--no-binary", suite.package, "-d", str(folder), wanted])
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    (project,) = (path for path in folder.iterdir() if path.is_dir())
    return project


def pip(python: Path, arguments: list[str]) -> None:
    """Run pip, silently unless it fails."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"pip {' '.join(arguments)} failed\n{done.stdout}{done.stderr}")


def run(
    suite: Suite, project: Path, python: Path, name: str, extra: list[str]
) -> tuple[dict[str, str], float]:
    """Run the suite and return each test's outcome, and the seconds it took."""
    report = project.parent / f"{name}.xml"
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, *extra, *suite.arguments], cwd=project, check=False, capture_output=True, text=True
    )
    seconds = time.monotonic() - begin
    if not report.exists():
        raise SuiteError(
            f"{suite.package}: {name} run ended with status {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return outcomes(report), seconds


def outcomes(report: Path) -> dict[str, str]:
    """Return every test's outcome by its class name and name."""
    found: dict[str, str] = {}
    for suite in JUnitXml.fromfile(str(report)):
        for case in suite:
            found[f"{case.classname}::{case.name}"] = outcome(case)
    return found


def outcome(case: TestCase) -> str:
    """Return one test's outcome."""
    for result in case.result:
        for kind, word in ((Failure, "failed"), (Error, "error"), (Skipped, "skipped")):
            if isinstance(result, kind):
                return word
    return "passed"


if __name__ == "__main__":
    raise SystemExit(main())
