"""``pytest-microvm image``: build, pull, push, list, inspect, remove and prune images."""

from __future__ import annotations

import contextlib
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_microvm.errors import PullError, PullFailure
from pytest_microvm.host.host import Host
from pytest_microvm.images.debian import MODES
from pytest_microvm.images.image import Image
from pytest_microvm.images.locked import LockedImages
from pytest_microvm.images.oci.pulling import TIMEOUT
from pytest_microvm.images.store import ImageStore, cache_root
from pytest_microvm.settings.options import QUOTAS
from pytest_microvm.settings.spec import format_size, parse_seconds
from pytest_microvm.terminal.progress import Progress
from pytest_microvm.untrusted.text import safe_json, sanitize, sanitize_line

if TYPE_CHECKING:
    import argparse

    from pytest_microvm.terminal.progress import Progress
from pytest_microvm.images.store import StoredImage

_SHORT = 12
_EXAMPLES = """examples:
  pytest-microvm image build python           build the default image (once; a minute or two)
  pytest-microvm image build microvm/kits/db  build a kit of this project by its path
  pytest-microvm image pull docker://registry.example/team/app:1.2   a container image
  pytest-microvm image push python registry.example/team/python:1   for other computers
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


_PULL_EXAMPLES = """REF is a reference to a container image, as skopeo(1) writes it:
  docker://REGISTRY/NAME[:TAG][@sha256:DIGEST]   on a registry
  oci:FOLDER[:TAG], oci-archive:FILE[:TAG]       a folder or an archive in the OCI image layout
  docker-daemon:NAME:TAG                         in Docker's daemon

A tag is looked up each time you pull. Machines use what was pulled last, without a look at the registry; a
machine with an image that was never pulled pulls it first. Layers are stored once, for all images. Logins,
mirrors, certificates and registries without TLS: skopeo's configuration, such as ~/.config/containers.
Images that need a signature: [signatures] of your config.toml; see the guide for container images.

exit status: 4 bad input; 65 no accepted signature; 66 no such image; 75 the registry does not answer;
             77 no permission; 1 other errors

examples:
  pytest-microvm image pull docker://registry.example/team/app:1.2 --as app
  pytest-microvm run --image app -- /usr/bin/app --version
  pytest-microvm image pull oci:build/image
"""
_PUSH_EXAMPLES = """KIT is a kit's name or path, built first if it is missing; also the name, reference or
digest of a stored image. Kernel, initramfs, the agent's Python and the root file system are pushed as one OCI
artifact, which `image pull` stores as it is: nothing is built or converted there, and the image's digest is
the same. The printed reference names exactly this image. A kit with `network` cannot be pushed.

Logins, certificates and registries without TLS: skopeo's configuration, as for `image pull`.

exit status: 4 bad input; 77 no permission; 75 the registry does not answer; 1 other errors

examples:
  skopeo login registry.example
  pytest-microvm image push microvm/kits/db registry.example/team/db:1.2
  pytest-microvm image pull docker://registry.example/team/db:1.2 --as db     on another computer
"""
_STATUS: dict[PullFailure, int] = {
    "absent": 66,
    "denied": 77,
    "unreachable": 75,
    "refused": 1,
    "unverified": 65,
}
"""Exit statuses of failed pulls and pushes, of sysexits.h: EX_NOINPUT, EX_NOPERM, EX_TEMPFAIL, EX_DATAERR."""


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

    pull = verbs.add_parser(
        "pull", help="pull a container image", epilog=_PULL_EXAMPLES, formatter_class=Raw,
        description="Fetch a container image and convert its layers; stored ones are not fetched again.",
    )  # fmt: skip
    pull.add_argument(
        "reference", metavar="REF", help="docker://..., oci:..., oci-archive:... or docker-daemon:..."
    )
    pull.add_argument(
        "--as", dest="name", default="", metavar="NAME", help="a name for it, to use like a kit's"
    )
    pull.add_argument(
        "--platform",
        default="",
        metavar="OS/ARCH",
        help="linux/amd64 or linux/arm64 (default: this computer's)",
    )
    _add_timeout(pull)
    pull.add_argument("--locked", action="store_true", help="pull exactly what microvm.lock pins, or fail")
    pull.set_defaults(run=_pull)

    push = verbs.add_parser(
        "push", help="push a built image to a registry", epilog=_PUSH_EXAMPLES, formatter_class=Raw,
        description="Push a kit's image to a registry; files that the registry has are not sent again.",
    )  # fmt: skip
    push.add_argument("kit", metavar="KIT", help="a kit's name or path, or a stored image")
    push.add_argument("target", metavar="REGISTRY/NAME[:TAG]", help="its name there")
    _add_timeout(push)
    push.set_defaults(run=_push)

    listing = verbs.add_parser("list", help="list the images in the cache")
    _add_json(listing)
    listing.set_defaults(run=_list)

    inspect = verbs.add_parser("inspect", help="show everything about one image")
    inspect.add_argument(
        "image", metavar="NAME|DIGEST", help="a name, a reference, or a digest (its beginning is enough)"
    )
    _add_json(inspect)
    inspect.set_defaults(run=_inspect)

    remove = verbs.add_parser("remove", help="remove an image and the files only it needs")
    remove.add_argument(
        "image", metavar="NAME|DIGEST", help="a name, a reference, or a digest (its beginning is enough)"
    )
    remove.set_defaults(run=_remove)

    prune = verbs.add_parser(
        "prune", help="remove what no kit needs any more",
        description="Remove images whose kit changed or is gone, unused files, broken-off builds and "
        "downloads. Pulled images stay.",
    )  # fmt: skip
    _add_json(prune)
    prune.set_defaults(run=_prune)


def _add_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT, metavar="SECONDS",
        help=f"time without a byte after which the registry counts as hanging (default: {TIMEOUT:g})",
    )  # fmt: skip


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")


def _build(arguments: argparse.Namespace) -> int:
    with (
        Progress(sys.stderr, terminal=sys.stderr.isatty()) as progress,
        contextlib.closing(Host(project=Path.cwd(), say=progress, mode=arguments.mode)) as host,
    ):
        image = host.images.get(arguments.kit, project=Path.cwd(), progress=progress, force=arguments.force)
    print(f"{image.name} {image.digest}")
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    store = ImageStore(cache_root())
    try:
        with Progress(sys.stderr, terminal=sys.stderr.isatty()) as progress:
            locked = LockedImages(store, Path.cwd(), "require" if arguments.locked else "ignore")
            image = locked.pull(
                arguments.reference,
                platform=arguments.platform,
                name=arguments.name,
                timeout=parse_seconds(arguments.timeout, "--timeout"),
                progress=progress,
            )
    except PullError as error:
        print(f"pytest-microvm: {sanitize(str(error))}", file=sys.stderr)
        return _STATUS[error.reason]
    print(f"{arguments.name or sanitize_line(image.name)} {image.digest}")
    return 0


def _push(arguments: argparse.Namespace) -> int:
    store = ImageStore(cache_root())
    try:
        with Progress(sys.stderr, terminal=sys.stderr.isatty()) as progress:
            timeout = parse_seconds(arguments.timeout, "--timeout")
            image = store.get(arguments.kit, project=Path.cwd(), progress=progress)
            reference = store.push(image, arguments.target, timeout=timeout, progress=progress)
    except PullError as error:
        print(f"pytest-microvm: {sanitize(str(error))}", file=sys.stderr)
        return _STATUS[error.reason]
    print(f"{reference} {image.digest}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    stored = ImageStore(cache_root()).list()
    if arguments.json:
        _print_json([_as_json(entry) for entry in stored])
        return 0
    if not stored:
        print("no images yet; build one: pytest-microvm image build python", file=sys.stderr)
        return 0
    rows = [("NAME", "DIGEST", "ARCHITECTURE", "SIZE", "ORIGIN")]
    for entry in stored:
        image = entry.image
        size = _megabytes(entry.size_bytes)
        name, origin = sanitize_line(image.name), sanitize_line(entry.origin)
        rows.append((name, image.digest[:_SHORT], image.architecture, size, origin))
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
    print(f"name          {sanitize_line(image.name)}")
    print(f"digest        {image.digest}")
    print(f"architecture  {image.architecture}")
    print(f"{'reference' if entry.reference else 'kit':<13} {sanitize_line(entry.origin)}")
    if entry.manifest:
        print(f"manifest      {entry.manifest}")
    print(f"size          {_megabytes(entry.size_bytes)}")
    for quota in (quota for quota in QUOTAS if quota.name in image.resources):
        amount = image.resources[quota.name]
        print(f"{quota.name:<13} {format_size(int(amount)) if quota.kind == 'size' else f'{amount:g}'}")
    for role, path in image.files().items():
        print(f"{role:<13} {path}")
    for name, value in image.environment:
        print(f"environment   {name}={sanitize_line(value)}")
    for service in image.services:
        print(f"service       {service.name}")
    for name, text in _start(image).items():
        print(f"{name:<13} {sanitize_line(text if isinstance(text, str) else shlex.join(text))}")
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    freed = ImageStore(cache_root()).remove(arguments.image)
    print(f"removed {sanitize_line(arguments.image)}, freed {_megabytes(freed)}")
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
        "kit": "" if entry.reference else str(entry.kit),
        "reference": entry.reference,
        "manifest": entry.manifest,
        "current": entry.current,
        "size_bytes": entry.size_bytes,
        "resources": dict(image.resources),
        "environment": dict(image.environment),
        "services": [service.name for service in image.services],
        "start": _start(image),
        "files": {role: str(path) for role, path in image.files().items()},
    }


def _start(image: Image) -> dict[str, Any]:
    """Return what a container image says about its command."""
    return {name: value for name, value in asdict(image.start).items() if value}


def _print_json(value: Any) -> None:
    print(safe_json(value, indent=2))


def _megabytes(size: int) -> str:
    return f"{size / 1024**2:.0f} MB"
