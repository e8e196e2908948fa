"""``pytest-microvm image``: build, list, inspect, remove and prune images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_microvm.images.debian import MODES
from pytest_microvm.images.store import ImageStore, cache_root
from pytest_microvm.settings.options import QUOTAS
from pytest_microvm.settings.spec import format_size
from pytest_microvm.terminal.progress import Progress

if TYPE_CHECKING:
    import argparse

    from pytest_microvm.terminal.progress import Progress
from pytest_microvm.images.store import StoredImage

_SHORT = 12
_EXAMPLES = """examples:
  pytest-microvm image build python           build the default image (once; a minute or two)
  pytest-microvm image build microvm/kits/db  build a kit of this project by its path
  pytest-microvm image list                   what is in the cache
  pytest-microvm image prune                  give disk space back
"""
_BUILD_EXAMPLES = """KIT is a kit's name (this project's microvm/kits/ comes before the kits that ship with
pytest-microvm), or the path of a kit's folder or its kit.toml. A kit that did not change since it was
built is not built again.

examples:
  pytest-microvm image build python
  pytest-microvm image build python --force          again, with the newest packages
  pytest-microvm image build ./kits/web --mode=unshare   without root, in a user namespace
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb ``image`` and its own verbs."""
    from argparse import RawDescriptionHelpFormatter as Raw  # noqa: PLC0415 - argparse is the caller's

    parser = subparsers.add_parser(
        "image", help="build and keep the images machines boot from", epilog=_EXAMPLES, formatter_class=Raw,
        description="Images are kernel, initramfs and root file system, kept by digest in the cache.",
    )  # fmt: skip
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    build = verbs.add_parser(
        "build", help="build a kit's image", description="Build a kit's image if it is missing or damaged.",
        epilog=_BUILD_EXAMPLES, formatter_class=Raw,
    )  # fmt: skip
    build.add_argument("kit", metavar="KIT", help="a kit's name or path")
    build.add_argument("--force", action="store_true", help="build even if nothing changed")
    build.add_argument(
        "--mode",
        choices=MODES,
        help="how mmdebstrap gets its rights (default: root for root, unshare otherwise)",
    )
    build.set_defaults(run=_build)

    listing = verbs.add_parser("list", help="list the images in the cache")
    _add_json(listing)
    listing.set_defaults(run=_list)

    inspect = verbs.add_parser("inspect", help="show everything about one image")
    inspect.add_argument(
        "image", metavar="NAME|DIGEST", help="a kit's name, or a digest (its beginning is enough)"
    )
    _add_json(inspect)
    inspect.set_defaults(run=_inspect)

    remove = verbs.add_parser("remove", help="remove an image and the files only it needs")
    remove.add_argument(
        "image", metavar="NAME|DIGEST", help="a kit's name, or a digest (its beginning is enough)"
    )
    remove.set_defaults(run=_remove)

    prune = verbs.add_parser(
        "prune", help="remove what no kit needs any more",
        description="Remove images whose kit changed or is gone, unused files and broken-off builds.",
    )  # fmt: skip
    _add_json(prune)
    prune.set_defaults(run=_prune)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")


def _build(arguments: argparse.Namespace) -> int:
    store = ImageStore(cache_root(), mode=arguments.mode)
    with Progress(sys.stderr, terminal=sys.stderr.isatty()) as progress:
        image = store.get(arguments.kit, project=Path.cwd(), progress=progress, force=arguments.force)
    print(f"{image.name} {image.digest}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    stored = ImageStore(cache_root()).list()
    if arguments.json:
        _print_json([_as_json(entry) for entry in stored])
        return 0
    if not stored:
        print("no images yet; build one: pytest-microvm image build python", file=sys.stderr)
        return 0
    rows = [("NAME", "DIGEST", "ARCHITECTURE", "SIZE", "KIT")]
    for entry in stored:
        kit = str(entry.kit) if entry.current else f"{entry.kit} (changed since)"
        image = entry.image
        rows.append(
            (image.name, image.digest[:_SHORT], image.architecture, _megabytes(entry.size_bytes), kit)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    entry = ImageStore(cache_root()).inspect(arguments.image)
    if arguments.json:
        _print_json(_as_json(entry))
        return 0
    image = entry.image
    print(f"name          {image.name}")
    print(f"digest        {image.digest}")
    print(f"architecture  {image.architecture}")
    print(f"kit           {entry.kit}{'' if entry.current else ' (changed since)'}")
    print(f"size          {_megabytes(entry.size_bytes)}")
    for quota in (quota for quota in QUOTAS if quota.name in image.resources):
        amount = image.resources[quota.name]
        print(f"{quota.name:<13} {format_size(int(amount)) if quota.kind == 'size' else f'{amount:g}'}")
    for role, path in image.files().items():
        print(f"{role:<13} {path}")
    for name, value in image.environment:
        print(f"environment   {name}={value}")
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    freed = ImageStore(cache_root()).remove(arguments.image)
    print(f"removed {arguments.image}, freed {_megabytes(freed)}")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    freed = ImageStore(cache_root()).prune()
    if arguments.json:
        _print_json({"freed_bytes": freed})
    else:
        print(f"freed {_megabytes(freed)}")
    return 0


def _as_json(entry: StoredImage) -> dict[str, Any]:
    image = entry.image
    return {
        "name": image.name,
        "digest": image.digest,
        "architecture": image.architecture,
        "kit": str(entry.kit),
        "current": entry.current,
        "size_bytes": entry.size_bytes,
        "resources": dict(image.resources),
        "environment": dict(image.environment),
        "files": {role: str(path) for role, path in image.files().items()},
    }


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _megabytes(size: int) -> str:
    return f"{size / 1024**2:.0f} MB"
