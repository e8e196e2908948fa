"""``pytest-microvm report``: merge, check and convert JUnit files."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from pytest_microvm.errors import HostError, UsageError
from pytest_microvm.reports.checking import MOST_FINDINGS, check_report
from pytest_microvm.reports.merging import merged
from pytest_microvm.reports.profiles import DEFAULT_PROFILE, PROFILES, Profile
from pytest_microvm.reports.reading import read_report
from pytest_microvm.reports.writing import write_report
from pytest_microvm.untrusted.text import sanitize_line

_DESCRIPTION = """\
JUnit has no standard, and each reader takes something else of it. These commands read the files of pytest,
surefire, jest, go-junit-report, googletest and others, and write them for one reader (--profile). The files
may come from anybody: no entity is expanded, sizes are limited, and nothing in them reaches a terminal or a
CI system as a command.
"""
_MERGE_EPILOG = """\
No test is lost: tests of the same name in one suite are told apart, attempts of one test become one flaky or
failed test, and a file that cannot be read becomes a failed test that says so.

exit status: 0, or 1 if a file could not be read to its end (OUT is written all the same), 4 for bad input

examples:
  pytest-microvm report merge junit.xml build/*.xml
  pytest-microvm report merge --profile gitlab report.xml unit.xml integration.xml
"""
_VERIFY_EPILOG = """\
Looked at: XML that is not well-formed, tests without a name or of the same name, lines that count from 0,
times that are no numbers, counts that do not add up, several results of a test, and what the reader has no
place for or is too large for it. Without --profile it is the reader that the file says it was written for.

exit status: 0 if all is well, 1 if not, 4 for bad input

examples:
  pytest-microvm report verify junit.xml
  pytest-microvm report verify --profile jenkins build/*.xml
"""
_CONVERT_EPILOG = """\
Lines of pytest, which count from 0, count from 1 afterwards. Attachments beside or below IN stay.

exit status: 0, or 1 if IN could not be read to its end, 4 for bad input

examples:
  pytest-microvm report convert --profile jenkins out.xml jenkins.xml
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb ``report`` and its own verbs."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = verbs.add_parser(
        "report", help="merge, check and convert JUnit files", description=_DESCRIPTION, formatter_class=raw
    )
    own = parser.add_subparsers(metavar="VERB", required=True)

    merge = own.add_parser(
        "merge", help="make one file of several", formatter_class=raw, epilog=_MERGE_EPILOG,
        description="Make one JUnit file of several.",
    )  # fmt: skip
    merge.add_argument("out", metavar="OUT", type=Path, help="the file to write")
    merge.add_argument("files", metavar="IN", type=Path, nargs="+", help="the files to read")
    merge.set_defaults(run=_merge)

    verify = own.add_parser(
        "verify", help="say what a reader would refuse or misread", formatter_class=raw,
        description="Say what the reader of JUnit files would refuse or misread.", epilog=_VERIFY_EPILOG,
    )  # fmt: skip
    verify.add_argument("files", metavar="FILE", type=Path, nargs="+", help="the files to look at")
    verify.set_defaults(run=_verify)

    convert = own.add_parser(
        "convert", help="write a file for another reader", formatter_class=raw, epilog=_CONVERT_EPILOG,
        description="Write a JUnit file for another reader.",
    )  # fmt: skip
    convert.add_argument("file", metavar="IN", type=Path, help="the file to read")
    convert.add_argument("out", metavar="OUT", type=Path, help="the file to write; may be the same")
    convert.set_defaults(run=_convert)

    for verb, default in ((merge, DEFAULT_PROFILE), (verify, None), (convert, None)):
        verb.add_argument(
            "--profile", choices=tuple(PROFILES), default=default, required=verb is convert,
            help="consumer that it is for" + (f" (default: {default})" if default else ""),
        )  # fmt: skip


def _merge(arguments: argparse.Namespace) -> int:
    return _write(arguments.out, arguments.files, PROFILES[arguments.profile])


def _convert(arguments: argparse.Namespace) -> int:
    return _write(arguments.out, [arguments.file], PROFILES[arguments.profile])


def _write(out: Path, files: list[Path], profile: Profile) -> int:
    for path in files:
        _must_be_there(path)
    reports = [(path, read_report(path, ours=True)) for path in files]
    suites = merged(reports)
    try:
        write_report(out, suites, profile)
    except OSError as error:
        raise HostError(
            f"{out} cannot be written: {error.strerror}",
            resolution="name a file in a folder that you may write",
        ) from error
    outcomes = Counter(case.outcome for suite in suites for case in suite.cases)
    flaky = sum(case.flaky for suite in suites for case in suite.cases)
    told = [f"{outcomes[word]} {word}" for word in ("passed", "failed", "error", "skipped") if outcomes[word]]
    told += [f"{flaky} of them flaky"] if flaky else []
    print(f"{out}: {sum(outcomes.values())} tests ({', '.join(told) or 'none'}), for {profile.name}")
    troubles = [(path, report.trouble) for path, report in reports if report.trouble]
    for path, trouble in troubles:
        print(f"pytest-microvm: {sanitize_line(str(path))} could not be read: {trouble}", file=sys.stderr)
    return 1 if troubles else 0


def _verify(arguments: argparse.Namespace) -> int:
    found = 0
    for path in arguments.files:
        _must_be_there(path)
        findings = check_report(path, arguments.profile and PROFILES[arguments.profile])
        found += len(findings)
        name = sanitize_line(str(path))
        for finding in findings:
            print(f"{name}:{finding.line}: {finding.text}" if finding.line else f"{name}: {finding.text}")
        if len(findings) >= MOST_FINDINGS:
            print(f"{name}: and more; these are the first {MOST_FINDINGS}")
        if not findings:
            print(f"{name}: ok")
    return 1 if found else 0


def _must_be_there(path: Path) -> None:
    if not path.exists():
        raise UsageError(f"there is no file {path}", resolution="name a JUnit file; `ls` shows what is there")
    if not path.is_file():
        raise UsageError(f"{path} is not a file", resolution=f"name the files in it: {path}/*.xml")
