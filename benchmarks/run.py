"""Run every benchmark and say which promises are kept; ``--json FILE`` keeps the figures."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from pathlib import Path

NAMES = (
    "per_test",
    "coverage",
    "forks",
    "edit",
    "environment",
    "fixture",
    "lifecycle",
    "mounts",
    "network",
    "ci",
    "autoload",
    "redaction",
    "pull",
)


def main() -> int:
    """Run those named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", choices=[*NAMES, []], help=f"which (default: all): {', '.join(NAMES)}"
    )
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    arguments = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    results = []
    for name in arguments.names or NAMES:
        print(f"\n## {name}", flush=True)
        results += importlib.import_module(f"bench_{name}").main()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    missed = [str(result["what"]) for result in results if not result["kept"]]
    print(
        f"\n{len(results) - len(missed)} of {len(results)} promises kept"
        + "".join(f"\nMISS {w}" for w in missed)
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
