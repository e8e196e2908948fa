"""Run widely used pytest plug-ins natively and in machines, in one environment, and compare the runs.

One virtual environment gets all plug-ins of :mod:`plugin_samples` and this package. Each plug-in has a small
project that uses it; ``pytest`` and ``pytest --microvm`` run there with the same arguments, each in a fresh
copy. ``-p no:NAME`` switches off the other plug-ins. The exit status says whether a difference was silent.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath

import platformdirs
from junitparser import JUnitXml, Properties
from plugin_samples import SAMPLES, Sample
from plugin_verdict import DIFFERENT, Result, Verdict, judge, normalised, without_ids
from real_suites import outcome

import pytest_microvm

# record_property reaches only the older form of the JUnit file
FORM = ("-o", "junit_family=xunit1")
OWN = {"microvm", "microvm-guard"}
TIMEOUT_SECONDS = 900
SHOWN = 6  # differences of one plug-in
NOTE = 100  # characters of a difference in the table
_COUNTS = re.compile(
    r"\d+ (?:passed|failed|errors?|skipped|xfailed|xpassed|deselected|rerun|warnings?|subtests \w+)\b"
)
_CACHES = {".git", ".pytest_cache", "__pycache__"}
_TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of the table -->)", re.DOTALL)


class SampleError(Exception):
    """A sample does not show its plug-in, even natively."""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        sample: The plug-in's project.
        version: The plug-in's version.
        verdict: The verdict of the comparison.
    """

    sample: Sample
    version: str
    verdict: Verdict

    def __str__(self) -> str:
        differences = self.verdict.silent or self.verdict.differences
        found = [textwrap.shorten(each.text.replace("|", r"\|"), NOTE) for each in differences]
        note = found[0] if self.verdict.silent else self.sample.note or "".join(found[:1])
        cells = (f"{self.sample.plugin} {self.version}", self.sample.uses, self.verdict.word, note)
        return f"| {' | '.join(cells)} |"


def main() -> int:
    """Compare the plug-ins named, or all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="a plug-in; may be repeated")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the table of this page")
    asked = parser.parse_args()
    names = [sample.plugin for sample in SAMPLES]
    if unknown := set(asked.only or ()) - set(names):
        parser.error(f"unknown plug-in {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    python = environment(platformdirs.user_cache_path("pytest-microvm") / "plugin-table")
    if asked.only and asked.write:
        parser.error("--write needs all plug-ins")
    rows, failed = [], 0
    with tempfile.TemporaryDirectory(prefix="plugin-table-") as folder:
        for sample in SAMPLES:
            if asked.only and sample.plugin not in asked.only:
                continue
            begin = time.monotonic()
            try:
                verdict = compare(sample, Path(folder), python)
            except (SampleError, subprocess.TimeoutExpired) as error:
                print(f"{sample.plugin}: {error}", flush=True)
                failed += 1
                continue
            rows.append(Row(sample, version(python, sample.plugin), verdict))
            print(f"{sample.plugin}: {verdict.word} ({time.monotonic() - begin:.0f} s)", flush=True)
            for each in verdict.differences[:SHOWN]:
                print(f"  {'SILENT ' if each in verdict.silent else ''}{each.text}", flush=True)
            if more := len(verdict.differences[SHOWN:]):
                print(f"  and {more} more", flush=True)
    lines = table(rows, version(python, "pytest"))
    print(lines)
    if asked.write:
        asked.write.write_text(_TABLE.sub(lambda _found: lines, asked.write.read_text()))
    return int(failed > 0 or any(row.verdict.word == DIFFERENT for row in rows))


def table(rows: list[Row], pytest: str) -> str:
    """Return the table in Markdown, below a line that says when it was made."""
    today = dt.datetime.now(dt.timezone.utc).date()
    head = ["| plug-in | the sample uses | verdict | note |", "|---|---|---|---|"]
    counts = {word: sum(row.verdict.word == word for row in rows) for word in ("same", "warned", "refused")}
    told = ", ".join(f"{count} {word}" for word, count in counts.items())
    silent = sum(row.verdict.word == DIFFERENT for row in rows)
    made = f"{len(rows)} plug-ins, {today}, pytest {pytest}: {told}, {silent} silently different."
    return "\n".join([made, "", *head, *map(str, rows), ""])


def environment(folder: Path) -> Path:
    """Make or complete the environment of all plug-ins and this checkout; return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    source = Path(pytest_microvm.__file__).parents[1]
    needs = {name for sample in SAMPLES for name in (sample.plugin, *sample.needs)}
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    done = subprocess.run(
        [*command, "-e", str(source), *sorted(needs)], check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"pip install failed\n{done.stdout}{done.stderr}")
    return python


@cache
def installed(python: Path) -> frozenset[str]:
    """Return the names of the installed plug-ins; pytest loads none that has the name of one of its own."""
    show = """if True:
        from importlib.metadata import entry_points
        from _pytest.config import builtin_plugins
        print(*{each.name for each in entry_points(group="pytest11")} - builtin_plugins)
        """
    return frozenset(subprocess.check_output([str(python), "-c", show], text=True).split())


def version(python: Path, name: str) -> str:
    """Return the installed version of a package."""
    show = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    return subprocess.check_output([str(python), "-c", show, name], text=True).strip()


def compare(sample: Sample, folder: Path, python: Path) -> Verdict:
    """Run a sample natively and in machines; of several runs, the first one that differs decides."""
    native = list(results(sample, folder, python, []))
    for result, status in zip(native, sample.statuses, strict=True):
        if result.status != status or result.missing:
            raise SampleError(
                f"native run ended with status {result.status}, expected {status}; "
                f"not printed: {list(result.missing)}"
            )
    remote = results(sample, folder, python, ["--microvm"])
    verdicts = [judge(sample.names, *pair) for pair in zip(native, remote, strict=True)]
    return next((verdict for verdict in verdicts if verdict.differences), verdicts[-1])


def results(sample: Sample, folder: Path, python: Path, extra: list[str]) -> Iterator[Result]:
    """Run pytest once for each of the sample's runs, in one new copy of its project.

    Native runs and those in machines use the same path, which reports may contain.
    """
    project = folder / sample.plugin
    with tempfile.TemporaryDirectory(dir=folder) as reports:
        try:
            sample.write(project)
            subprocess.run(["git", "init", "--quiet", str(project)], check=True)
            for number, arguments in enumerate(sample.runs, 1):
                before = contents(project)
                words = shlex.split(arguments)
                junit = Path(reports) / f"{number}.xml"
                done = run(sample, project, python, [*extra, f"--junitxml={junit}", *words])
                after = contents(project)
                changed = {path: data for path, data in after.items() if before.get(path) != data}
                last = number == len(sample.runs)
                yield Result(
                    status=done.returncode,
                    outcomes=in_order(outcomes(junit), words) if junit.exists() else (),
                    files=texts(without(changed, sample.caches), sample.varies),
                    counts=counts(done.stdout),
                    missing=tuple(each for each in sample.prints if last and each not in done.stdout),
                    announced=announced(done.stdout + done.stderr),
                    internal_error="INTERNALERROR>" in done.stdout,
                )
        finally:
            shutil.rmtree(project)


def run(
    sample: Sample, project: Path, python: Path, arguments: list[str]
) -> subprocess.CompletedProcess[str]:
    """Run pytest with the sample's plug-ins, and no others."""
    left_out = re.compile(r"PYTEST_(?!MICROVM)|PYTHON")
    environ = {name: value for name, value in os.environ.items() if not left_out.match(name)}
    environ["COLUMNS"] = "100"
    others = sorted(installed(python) - OWN - {*sample.load})
    return subprocess.run(
        [str(python), "-m", "pytest", *(f"-pno:{name}" for name in others), *FORM, *arguments],
        cwd=project,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def contents(project: Path) -> dict[str, bytes]:
    """Return the content of each file of a project, except git's and the caches of Python and pytest."""
    found = (path.relative_to(project) for path in project.rglob("*") if path.is_file())
    return {str(path): (project / path).read_bytes() for path in found if not _CACHES & set(path.parts)}


def without(files: dict[str, bytes], caches: tuple[str, ...]) -> dict[str, bytes]:
    """Return the files that match none of the patterns."""
    return {
        path: content
        for path, content in files.items()
        if not any(PurePath(path).match(pattern) for pattern in caches)
    }


def texts(files: dict[str, bytes], varies: tuple[str, ...]) -> dict[str, str]:
    """Return the files' texts; those whose content ``varies`` without what changes from run to run.

    Files with random names are one file with the texts of all.
    """
    found: dict[str, list[str]] = {}
    for path, data in files.items():
        name, text = without_ids(path), data.decode(errors="replace")
        if any(PurePath(path).match(pattern) for pattern in varies):
            name, text = normalised(path), "" if b"\0" in data else normalised(text)
        found.setdefault(name, []).append(text)
    return {path: "\n".join(sorted(each)) for path, each in found.items()}


def outcomes(report: Path) -> Iterator[str]:
    """Yield each test's name, outcome and properties, in the order of a JUnit file."""
    for suite in JUnitXml.fromfile(str(report)):
        for case in suite:
            properties = case.child(Properties) or ()  # type: ignore[no-untyped-call] # of junitparser
            own = [each for each in properties if not each.name.startswith("microvm.")]
            words = [f"{each.name}={each.value}" for each in own]
            yield " ".join([f"{case.classname}::{case.name}", outcome(case), *words])


def in_order(found: Iterable[str], words: list[str]) -> tuple[str, ...]:
    """Return the outcomes in their order, sorted if several workers end in any order."""
    return tuple(sorted(found) if "-n" in words else found)


def counts(output: str) -> str:
    """Return the counts of pytest's closing line."""
    lines = [_COUNTS.findall(line) for line in output.splitlines()]
    return ", ".join(next(filter(None, reversed(lines)), []))


def announced(output: str) -> tuple[str, ...]:
    """Return what this package said, and its usage errors."""
    return tuple(line for line in output.splitlines() if line.startswith(("microvm:", "ERROR:")))


if __name__ == "__main__":
    raise SystemExit(main())
