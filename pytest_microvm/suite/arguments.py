"""Division of pytest's arguments between the host and the guest (pure functions)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import pytest

# Options that select tests or format results on the host. The guest collects everything, so another -k or -m
# needs no new template. None of these options names a file, a program or a module.
SELECTING_AND_SHOWING = frozenset(
    [
        *("-x", "--exitfirst", "--maxfail", "-k", "-m", "--deselect", "--continue-on-collection-errors"),
        *("--lf", "--last-failed", "--ff", "--failed-first", "--nf", "--new-first", "--lfnf"),
        *("--last-failed-no-failures", "--cache-show", "--cache-clear"),
        *("--sw", "--stepwise", "--sw-skip", "--stepwise-skip", "--sw-reset", "--stepwise-reset"),
        *("--co", "--collect-only", "--collectonly"),
        *("-v", "--verbose", "-q", "--quiet", "--verbosity"),  # the sum goes to the guest
        *("-r", "--report-chars", "--no-header", "--no-summary", "--no-fold-skipped"),
        *("--force-short-summary", "--color", "--code-highlight", "--show-capture", "--durations"),
        *("--durations-min", "--disable-warnings", "--disable-pytest-warnings", "--max-warnings"),
        *("--xfail-tb", "--junit-prefix", "--junitprefix", "-s", "--capture"),
    ]
)
_WORKERS_WITH_VALUE = (
    *("-n", "--numprocesses", "--maxprocesses", "--max-worker-restart", "--dist", "--testrunuid"),
    "--maxschedchunk",
)
WORKERS = frozenset([*_WORKERS_WITH_VALUE, "-d", "--loadscope-reorder", "--no-loadscope-reorder"])
"""Options of pytest-xdist that set the number of workers, and the distribution of tests."""

REPORT_FILES = frozenset(["--junit-xml", "--junitxml"])
"""Options of pytest that name a file for the host to write."""

_ACTING_WITH_VALUE = (
    *("--tx", "--px", "--rsyncdir", "--rsyncignore"),  # of pytest-xdist: programs, folders
    *("--report-log", "--html", "--css", "--json-report-file", "--pastebin"),
)
ACTING = frozenset(
    [
        *_ACTING_WITH_VALUE,
        *("-f", "--looponfail", "--self-contained-html", "--json-report"),
        *("--debug", "--trace-config", "--traceconfig", "-h", "--help", "-V", "--version"),
    ]
)
"""Host-only options that start a program, write a file, or send data away."""

INLINE_SNAPSHOT = "--inline-snapshot"
"""The option of inline-snapshot that says what the plug-in does with wrong snapshots."""

OF_THE_MACHINE = dict.fromkeys(
    ["--alluredir", "--benchmark-json", "--benchmark-storage", "--cov-report", INLINE_SNAPSHOT], "1"
)
"""The arity of options whose plug-ins are never loaded on the host."""

ARITY_ELSEWHERE = {
    **OF_THE_MACHINE,
    **dict.fromkeys((*_WORKERS_WITH_VALUE, *_ACTING_WITH_VALUE), "1"),
    **dict.fromkeys(("-d", "-f", "--looponfail"), "0"),
}
"""The arity of plug-ins' options, for a pytest that has not loaded the plug-ins."""

HOST_ONLY = SELECTING_AND_SHOWING | WORKERS | REPORT_FILES | ACTING | {"--forked"}
# The guest does not get --forked: a test has a machine of its own, and pytest-forked cannot name all phases.
_TESTMON = (
    "pytest-testmon records in one process what each test executes; leave it out, or select tests with --lf"
)
_ASKING = "inline-snapshot asks at a terminal, which machines do not have; use report, create or fix"

SHOWING_ALONE = frozenset(["--fixtures", "--funcargs", "--fixtures-per-test", "--markers"])
"""Options with which pytest only shows something of the project, and runs no test."""
# Options that would act, on the host, on modules that only the guest has.
GUEST_ONLY = SHOWING_ALONE | {"-W", "--pythonwarnings", *OF_THE_MACHINE}
DEBUGGING = frozenset(["--pdb", "--trace"])
"""Options with which a user lends the terminal to a debugger in the machine."""


@dataclass(frozen=True)
class Token:
    """One option with its value, or one file argument.

    Args:
        words: The words as written.
        option: The option's name, empty for a file argument.
        value: Its value, ``None`` for a flag.
        known: Whether the host's pytest knows the option.
    """

    words: tuple[str, ...]
    option: str = ""
    value: str | None = None
    known: bool = True


def why_impossible(token: Token) -> str | None:
    """Return why an option of a plug-in cannot work with machines, and what to do; ``None`` if it can."""
    if token.option == INLINE_SNAPSHOT and "review" in (token.value or "").split(","):
        return _ASKING
    return _TESTMON if token.option == "--testmon" else None


@dataclass(frozen=True)
class Split:
    """The arguments of the host's pytest and of the guest's."""

    host: tuple[str, ...]
    guest: tuple[str, ...]


def option_arity(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the arity of each option of ``parser``: ``0``, ``1`` or ``?`` (optional value)."""
    actions = parser._option_string_actions  # noqa: SLF001 - argparse has no public list
    return {name: _arity(action) for name, action in actions.items()}


def parser_arity(parser: pytest.Parser) -> dict[str, str]:
    """Return :func:`option_arity` of a pytest parser, with the plug-ins' options registered so far."""
    make = getattr(parser, "_getparser", None)  # pytest before 9 makes its parser on demand
    return option_arity(make() if make else parser.optparser)


def _arity(action: argparse.Action) -> str:
    if action.nargs is None:
        return "1"
    return "?" if action.nargs == "?" else "0" if action.nargs == 0 else "1"


def tokens(arguments: Sequence[str], arity: Mapping[str, str]) -> Iterator[Token]:
    """Split ``arguments`` into tokens as argparse would, given the known options.

    An unknown option is one word; a value written after it (``--opt value``) stays a separate word in its
    place, so that a parser that knows the option can still join them.
    """
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            yield Token((word,))
            for name in rest:
                yield Token((name,))
            return
        if not word.startswith("-") or word == "-":
            yield Token((word,))
        elif word in arity:
            yield _with_value(word, arity[word], rest)
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            yield Token((word,), name, value if equals else None, known=name in arity)
        else:
            yield from _short(word, arity, rest)


def with_values(arguments: Sequence[str], arity: Mapping[str, str]) -> Iterator[Token]:
    """Yield :func:`tokens`; an unknown option without ``=`` has the file argument behind it as its value.

    Only the machine's pytest knows whether that is the value or a file.
    """
    found = list(tokens(arguments, arity))
    for token, following in zip_longest(found, found[1:]):
        if token.option and not token.known and token.value is None and following and not following.option:
            yield replace(token, value=following.words[0])
        else:
            yield token


def _with_value(word: str, arity: str, rest: list[str]) -> Token:
    takes = arity == "1" or (arity == "?" and bool(rest) and not rest[0].startswith("-"))
    if not takes or not rest:
        return Token((word,), word)
    value = rest.pop(0)
    return Token((word, value), word, value)


def _short(word: str, arity: Mapping[str, str], rest: list[str]) -> Iterator[Token]:
    """Split ``-xvs`` into its flags and ``-kname`` into option and value."""
    cluster = word[1:]
    found: list[Token] = []
    while cluster:
        name = "-" + cluster[0]
        takes = arity.get(name)
        if takes is None:
            yield Token((word,), word.partition("=")[0], known=False)
            return
        cluster = cluster[1:]
        if takes == "0":
            found.append(Token((name,), name))
        elif cluster:
            found.append(Token((name + cluster,), name, cluster.removeprefix("=")))
            cluster = ""
        else:
            found.append(_with_value(name, takes, rest))
    yield from found


def split_arguments(
    arguments: Sequence[str],
    arity: Mapping[str, str],
    is_host_plugin: Callable[[str], bool] = lambda _name: False,
) -> Split:
    """Divide ``arguments`` between the host's and the guest's pytest.

    Args:
        arguments: pytest's arguments, including the configuration's ``addopts``.
        arity: From :func:`option_arity`.
        is_host_plugin: Whether the plug-in of ``-p NAME`` concerns the host alone.
    """
    host: list[str] = []
    guest: list[str] = []
    for token in tokens(arguments, arity):
        if token.option.startswith("--microvm") or token.option in HOST_ONLY:
            host += token.words
        elif not token.known or token.option in GUEST_ONLY:
            guest += token.words
        elif token.option == "-p" and is_host_plugin((token.value or "").strip()):
            host += token.words
        else:
            host += token.words
            guest += token.words
    return Split(tuple(host), tuple(guest))
