"""The steps of the GitHub Action, each a separate process; results for later steps are saved in a folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_microvm.ci.github.cache import images_key, set_aside, take_in, templates_folder, templates_key
from pytest_microvm.ci.github.commands import fitting
from pytest_microvm.ci.github.files import add_summary, set_outputs
from pytest_microvm.ci.github.inputs import Inputs, read_inputs, saved_inputs
from pytest_microvm.ci.github.project import lock_folder, needs_of
from pytest_microvm.ci.github.report import (
    Ground,
    count,
    heading,
    path_in_repository,
    read_junit,
    remarks,
    suite_summary,
)
from pytest_microvm.ci.github.run import junit_path, run_command, run_guarded
from pytest_microvm.ci.github.upload import make_uploadable
from pytest_microvm.errors import UsageError
from pytest_microvm.host.host import Host
from pytest_microvm.images import Image
from pytest_microvm.images.locked import LockedImages
from pytest_microvm.images.oci.pulling import TIMEOUT
from pytest_microvm.images.store import cache_root

_GROUND = "ground.json"


def plan(folder: Path) -> None:
    """Validate the action's inputs and output the cache keys and paths.

    Raises:
        UsageError: An input, or the project's configuration, is invalid.
    """
    inputs = read_inputs(os.environ, folder)
    needs = needs_of(inputs)
    inputs.save(folder)
    set_outputs(
        {
            "images-key": images_key(needs, inputs.cache_key),
            "images-path": str(cache_root() / "images"),
            "templates-path": str(templates_folder(cache_root())),
            "output": str(inputs.output),
        }
    )


def ready(folder: Path) -> None:
    """Build missing images and test the accelerator.

    Raises:
        UsageError: No image could be chosen.
        HostError: This computer lacks a requirement, or the required accelerator does not work.
        BuildError: An image could not be built.
    """
    inputs = saved_inputs(folder)
    needs = needs_of(inputs)
    host = _host(inputs)
    images = _images(host, needs.kits, inputs)
    if not images:
        raise UsageError("no job names an image that ships", resolution='let one of them say image = "base"')
    accelerator = host.accelerator(images[0])
    _say(f"machines run here with {accelerator.name}: {accelerator.reason}")
    found = tuple((image.name, image.digest) for image in images)
    _save_ground(folder, Ground(accelerator.name, accelerator.reason, found))
    set_outputs(
        {
            "accelerator": accelerator.name,
            "image-digest": " ".join(digest for _name, digest in found),
            "templates-key": templates_key(host, images, accelerator, needs, inputs.cache_key),
        }
    )


def run(folder: Path) -> None:
    """Run the suite or the jobs; a failure only sets the output ``exit-code`` and does not fail this step."""
    inputs = saved_inputs(folder)
    _say(f"{take_in(_host(inputs))} template(s) from the cache")
    inputs.output.mkdir(parents=True, exist_ok=True)
    code = run_guarded(run_command(inputs, os.environ), inputs, sys.stdout)
    ground = _ground(folder)
    _save_ground(folder, Ground(ground.accelerator, ground.reason, ground.images, code))
    set_outputs({"exit-code": str(code)})


def keep(folder: Path) -> None:
    """Place the templates worth caching in the folder that GitHub's cache saves."""
    _say(f"{set_aside(_host(saved_inputs(folder)))} template(s) for the cache")


def report(folder: Path) -> None:
    """Write the job's summary, annotations and outputs."""
    inputs, ground = saved_inputs(folder), _ground(folder)
    junit = junit_path(inputs)
    found = read_junit(junit)
    written = inputs.output / "summary.md"
    if inputs.mode == "ci" and written.is_file():
        add_summary(f"{heading(ground)}\n{written.read_text(encoding='utf-8')}")
    else:
        add_summary(suite_summary(found, ground))
    # Of several branches at most one is checked out: annotations cannot refer to files of the others.
    prefix = None if inputs.branches else path_in_repository(inputs.project, _workspace(os.environ))
    for line in make_uploadable(inputs.output):
        _say(line)
    for remark in fitting(remarks(found, ground, prefix), "the job's summary"):
        _say(remark.command())
    counts = count(found)
    set_outputs(
        {
            "junit-path": str(junit) if found is not None else "",
            "tests": str(counts.total),
            "failures": str(counts.failed + counts.errors),
        }
    )


def _images(host: Host, kits: Sequence[Path | str], inputs: Inputs) -> list[Image]:
    """Return images: kits' are built if missing, container images pulled, as a tag may lead elsewhere today.

    A container image that is locked is pulled at the locked digest.
    """
    project = inputs.project
    with lock_folder(inputs) as folder:
        locked = LockedImages(host.images, project, lock_folder=folder)
        return [
            locked.pull(kit, timeout=TIMEOUT, progress=_say)
            if isinstance(kit, str)
            else host.images.get(kit, project=project, progress=_say)
            for kit in kits
        ]


def _host(inputs: Inputs) -> Host:
    return Host(project=inputs.project, require_accel=inputs.require_accel or None, say=_say)


def _workspace(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("GITHUB_WORKSPACE") or Path.cwd())


def _save_ground(folder: Path, ground: Ground) -> None:
    (folder / _GROUND).write_text(json.dumps(ground.__dict__), encoding="utf-8")


def _ground(folder: Path) -> Ground:
    found = json.loads((folder / _GROUND).read_text(encoding="utf-8"))
    images = tuple((name, digest) for name, digest in found["images"])
    return Ground(found["accelerator"], found["reason"], images, found["exit_code"])


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
