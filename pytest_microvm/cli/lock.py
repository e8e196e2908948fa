"""``pytest-microvm lock``: write down exactly which images a project uses, or check it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from pytest_microvm.errors import LockError, UsageError
from pytest_microvm.host.project_grants import asked_by
from pytest_microvm.images.image import Image
from pytest_microvm.images.lock_file import FILE, ImageLock, Pins, read_lock, write_lock
from pytest_microvm.images.locked import LockedImages
from pytest_microvm.images.store import ImageStore, cache_root
from pytest_microvm.settings import trust as project_trust
from pytest_microvm.settings.configuration import load_settings
from pytest_microvm.terminal.progress import Progress
from pytest_microvm.untrusted.text import sanitize, sanitize_line

_SHORT = 12

_DESCRIPTION = f"""\
Write {FILE} in this folder: everything that makes up each image which the project's configuration and CI jobs
use, or which you name. For a container image: reference, platform, digests of index, manifest, configuration
and layers. For a kit: its recipe, and the versions of all installed packages. For both: digests of kernel,
initramfs, the agent's runtime, the file systems, and the image. Other images are left out. Missing images are
built or pulled; stored ones are locked as they are.

Commit the file. A container image that is missing is then pulled at the locked digest, not by its tag. With
--locked, commands that start machines fail unless their images are exactly the locked ones.
"""
_EPILOG = """\
exit status: 0 as locked; 1 --check found differences; 4 bad input, or no lock file; others as of image pull

examples:
  pytest-microvm lock                      lock what the project uses
  pytest-microvm lock base app             lock these as well, for example images of single tests
  pytest-microvm lock --check              tell what differs from the lock
  pytest --microvm --microvm-locked        run with the locked images, or fail
  pytest-microvm image pull REF && pytest-microvm lock   move to what a tag leads to now
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "lock",
        help="write down exactly which images a project uses",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="more images: kits, references or names")
    parser.add_argument("--check", action="store_true", help="write nothing, and tell what differs")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    project = Path.cwd()
    store = ImageStore(cache_root())
    names = _used(project, arguments.images)
    return _check(store, project, names) if arguments.check else _write(store, project, names)


def _write(store: ImageStore, project: Path, names: list[str]) -> int:
    before = read_lock(project) or ImageLock({})
    locked = LockedImages(store, project)
    images: dict[str, Mapping[str, Pins]] = {}
    for name in names:
        image = _got(locked, name)
        images[name] = {**before.images.get(name, {}), image.architecture: locked.pins(name, image)}
        print(f"{sanitize_line(name)} {image.digest[:_SHORT]}")
    path = write_lock(project, ImageLock(images))
    left_out = sorted(before.images.keys() - images.keys())
    for name in left_out:
        print(f"left out, as the project does not use it: {sanitize_line(name)}", file=sys.stderr)
    print(f"{path.name}: {len(images)} image{'s' * (len(images) != 1)}")
    return 0


def _check(store: ImageStore, project: Path, names: list[str]) -> int:
    lock = read_lock(project)
    if lock is None:
        raise UsageError(f"{project / FILE} does not exist", resolution="write it: pytest-microvm lock")
    locked = LockedImages(store, project, "require")
    failed = 0
    for name in names:
        try:
            _got(locked, name)
        except LockError as error:
            failed += 1
            print(f"pytest-microvm: {sanitize(str(error))}", file=sys.stderr)
    for name in sorted(lock.images.keys() - set(names)):
        print(f"not checked, as the project does not use it: {sanitize_line(name)}", file=sys.stderr)
    print(f"{FILE}: {len(names) - failed} of {len(names)} images as locked")
    return 1 if failed else 0


def _got(locked: LockedImages, name: str) -> Image:
    with Progress(sys.stderr, terminal=sys.stderr.isatty()) as progress:
        return locked.get(name, progress=progress)


def _used(project: Path, given: list[str]) -> list[str]:
    """Return the images that a project uses and those that the user names, without repetition.

    Raises:
        UsageError: The user has not allowed an image of the project.
    """
    settings = load_settings(project, {})
    asked = {key: value for key, value in asked_by(settings).items() if key == "image"}
    project_trust.check(project, asked)
    return sorted({settings.spec.image, *_used_by_jobs(project), *given})


def _used_by_jobs(project: Path) -> set[str]:
    """Return the images of the CI jobs that a work tree defines, if it defines any.

    Raises:
        UsageError: The definition is invalid, or the user has not allowed its requests.
    """
    from pytest_microvm.ci.definition.parsing import NoJobs  # noqa: PLC0415 - imports a lot
    from pytest_microvm.ci.definition.task import WORKTREE  # noqa: PLC0415
    from pytest_microvm.ci.running.run import check_trust  # noqa: PLC0415
    from pytest_microvm.ci.sources.repository import CodeRepository, read_definition  # noqa: PLC0415

    if not (project / ".git").exists():
        return set()
    repository = CodeRepository(project, bare=False)
    try:
        definition = read_definition(repository, WORKTREE)
    except NoJobs:
        return set()
    check_trust(repository, definition)
    return {job.spec.image for job in definition.jobs}
