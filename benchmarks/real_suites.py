"""Run published packages' own suites natively and in machines, and compare every test's outcome.

The packages are source distributions from the package index that pip is configured for. Each gets what
docs/how-to/dependencies.md shows: wheels fetched on the host, installed in the machine by ``prepare``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase

PYTEST = "pytest==9.*"
# packaging has 62,000 tests; without these two files 5,600, which is enough to wait for under emulation
SMALL_PART = ("tests", "--ignore=tests/test_version.py", "--ignore=tests/test_requirements.py")


@dataclass(frozen=True)
class Suite:
    """A package whose suite is run.

    Args:
        package: Its name in the index.
        needs: What its tests need besides pytest.
        arguments: For pytest.
        isolation: How often a machine is new; suites of many thousand tests share one in a module.
    """

    package: str
    needs: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    isolation: str = "test"


SUITES = (
    Suite("iniconfig"),
    Suite("pluggy", ("pytest-benchmark",), ("testing", "--benchmark-disable")),
    Suite("packaging", ("pretend", "hypothesis", "tomli_w"), SMALL_PART, "module"),
    Suite("itsdangerous", ("freezegun",), ("tests",)),
)


def main() -> int:
    """Run the suites named, or all; the exit status says whether all came out the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "packages", nargs="*", help="which (default: all): " + ", ".join(s.package for s in SUITES)
    )
    wanted = parser.parse_args().packages
    different = 0
    for suite in SUITES:
        if not wanted or suite.package in wanted:
            with tempfile.TemporaryDirectory(prefix="real-suite-") as folder:
                different += compare(suite, Path(folder))
    return min(different, 1)


def compare(suite: Suite, folder: Path) -> int:
    """Run one suite both ways, print what differs, and return how many tests do."""
    project = fetch(suite, folder)
    native, native_seconds = run(suite, project, folder, "native", [])
    remote, remote_seconds = run(
        suite, project, folder, "microvm", ["--microvm", f"--microvm-isolation={suite.isolation}"]
    )
    if not native:
        raise SystemExit(f"{project.name}: its source distribution has no tests")
    differing = sorted(name for name in native.keys() | remote.keys() if native.get(name) != remote.get(name))
    counts = ", ".join(f"{list(native.values()).count(kind)} {kind}" for kind in sorted(set(native.values())))
    print(
        f"{project.name}: {len(native)} tests natively ({counts}) in {native_seconds:.0f} s, "
        f"{len(remote)} in machines in {remote_seconds:.0f} s; {len(differing)} differ",
        flush=True,
    )
    for name in differing:
        print(f"  {name}: natively {native.get(name)}, in a machine {remote.get(name)}")
    return len(differing)


def fetch(suite: Suite, folder: Path) -> Path:
    """Fetch the package and what its tests need; return the unpacked source distribution."""
    pip(["download", "--no-deps", "--no-binary", suite.package, "-d", str(folder), suite.package])
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    (project,) = (path for path in folder.iterdir() if path.is_dir())
    wheels = project / "wheels"
    pip(["wheel", "--no-deps", "-w", str(wheels), str(project)])
    pip(["download", "--only-binary", ":all:", "-d", str(wheels), PYTEST, *suite.needs])
    names = " ".join(sorted(str(path.relative_to(project)) for path in wheels.iterdir()))
    with (project / "pyproject.toml").open("a") as file:
        file.write(
            f'\n[tool.pytest-microvm]\nprepare_inputs = ["wheels"]\n'
            f'prepare = ["pip install -q --no-index --no-deps --force-reinstall {names}"]\n'
        )
    return project


def pip(arguments: list[str]) -> None:
    """Run pip, silently unless it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"pip {' '.join(arguments)} failed\n{done.stdout}{done.stderr}")


def run(
    suite: Suite, project: Path, folder: Path, name: str, extra: list[str]
) -> tuple[dict[str, str], float]:
    """Run the suite and return each test's outcome, and the seconds it took."""
    python = sys.executable
    if not extra:
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        python = str(folder / "venv/bin/python")
        install = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*install, *map(str, (project / "wheels").iterdir())], check=True)
    report = folder / f"{name}.xml"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, *extra, *suite.arguments], cwd=project, check=False, capture_output=True, text=True
    )
    seconds = time.monotonic() - begin
    if not report.exists():
        raise SystemExit(
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
