"""``pytest-microvm template``: list, remove and prune templates."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from pytest_microvm.host.host import CACHE_SIZE_VARIABLE, Host
from pytest_microvm.settings.spec import format_size

_SHORT = 12
_DESCRIPTION = """Templates are machines frozen on disk; every machine is a copy of one. They are made when
needed, and the least recently used go when all are larger than the cap: nothing has to be done here."""
_EXAMPLES = f"""examples:
  pytest-microvm template list               what there is, the most recently used first
  pytest-microvm template list --json        for scripts: sizes in bytes, times in seconds since 1970
  pytest-microvm template remove 3f9a        the ones whose key begins with 3f9a
  pytest-microvm template prune              every one that no run uses now; the next run makes its own again

The cap is 10G; {CACHE_SIZE_VARIABLE}=20G sets another.
Kind "kept" is a machine that --microvm-keep kept: see `pytest-microvm ps`.
Kind "unusable" is what is damaged, or of another version of pytest-microvm: nothing uses it.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb ``template`` and its own verbs."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "template", help="list and remove the frozen machines that others are copied from",
        description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw,
    )  # fmt: skip
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    listing = verbs.add_parser(
        "list", help="list the templates", description="List the templates, the most recently used first."
    )
    listing.add_argument("--json", action="store_true", help="print JSON for scripts")
    listing.set_defaults(run=_list)

    remove = verbs.add_parser(
        "remove", help="remove templates", formatter_class=raw,
        description="Remove templates. The next run that needs one makes it again.",
        epilog="example:\n  pytest-microvm template remove 3f9a 77c1",
    )  # fmt: skip
    remove.add_argument("keys", nargs="+", metavar="KEY", help="a template's key, or the beginning of keys")
    remove.set_defaults(run=_remove)

    prune = verbs.add_parser(
        "prune", help="remove every template that is not in use", formatter_class=raw,
        description="Remove every template that no run uses now; kept machines stay (`pytest-microvm rm`).",
        epilog="example:\n  pytest-microvm template prune --json",
    )  # fmt: skip
    prune.add_argument("--json", action="store_true", help="print JSON for scripts")
    prune.set_defaults(run=_prune)


def _list(arguments: argparse.Namespace) -> int:
    templates = Host().templates.list()
    if arguments.json:
        _print_json([asdict(entry) for entry in templates])
        return 0
    if not templates:
        print("no templates yet; the first run makes them", file=sys.stderr)
        return 0
    now = time.time()
    rows = [("KEY", "KIND", "IMAGE", "SIZE", "USED", "")]
    for entry in templates:
        used = "in use" if entry.in_use else ""
        rows.append(
            (
                entry.key[:_SHORT],
                entry.kind,
                entry.image,
                _megabytes(entry.size),
                _ago(now - entry.used),
                used,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    total = sum(entry.size for entry in templates)
    print(f"{len(templates)} templates, {_megabytes(total)} of at most {format_size(Host().templates.cap)}")
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    store = Host().templates
    for prefix in arguments.keys:
        for key in store.remove(prefix):
            print(f"removed {key[:_SHORT]}")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    freed = Host().templates.prune()
    if arguments.json:
        _print_json({"freed_bytes": freed})
    else:
        print(f"freed {_megabytes(freed)}")
    return 0


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _megabytes(size: int) -> str:
    return f"{size / 1024**2:.0f} MB"


def _ago(seconds: float) -> str:
    """Return an age in readable form, in the largest unit that fits."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return "just now"
