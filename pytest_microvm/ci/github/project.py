"""Determine what a project needs before its run, kits and prepared templates; runs none of its code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_microvm.ci.definition.job import Job
from pytest_microvm.ci.github.inputs import Inputs
from pytest_microvm.ci.running.run import check_trust, trusted_project
from pytest_microvm.ci.sources.repository import CodeRepository, read_definition
from pytest_microvm.ci.sources.tree import Tree
from pytest_microvm.errors import KitError, UsageError
from pytest_microvm.host.project_grants import asked_by
from pytest_microvm.images.build_keys import kit_key
from pytest_microvm.images.kits import Kit, load_kit, shipped_kits
from pytest_microvm.images.oci.references import is_reference
from pytest_microvm.settings import trust as project_trust
from pytest_microvm.settings.configuration import Settings, load_settings
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.suite.workspace import scan


@dataclass(frozen=True)
class Needs:
    """The kits of a run, and digests of them and of its preparation.

    Args:
        kits: The ``kit.toml`` of every image that can be built before the run; not those of jobs that use the
            project's own kits, which the run takes from the jobs' definition. Of a container image, its
            reference.
        keys: For every image, a digest of its inputs; for a container image, its reference.
        prepared: A digest of everything prepared in the run's machines before the tests are copied in.
    """

    kits: tuple[Path | str, ...]
    keys: tuple[str, ...]
    prepared: str


def needs_of(inputs: Inputs) -> Needs:
    """Return the needs of a run.

    Raises:
        UsageError: The project's configuration or the jobs' definition is invalid, or requests something that
            the user has not allowed.
    """
    return _needs_of_jobs(inputs) if inputs.mode == "ci" else _needs_of_suite(inputs)


@contextmanager
def lock_folder(inputs: Inputs) -> Iterator[Path]:
    """Yield the folder with the lock of images that counts: for jobs that of the branch that defines them."""
    if inputs.mode != "ci":
        yield inputs.project
        return
    repository = CodeRepository(inputs.project, bare=False)
    with trusted_project(repository, inputs.definition_from or None) as (project, _bundles):
        yield project


def _needs_of_suite(inputs: Inputs) -> Needs:
    settings = load_settings(inputs.project, {"image": inputs.image or None})
    if not inputs.trust:
        project_trust.check(settings.project, asked_by(settings))
    prepared = [_shape(settings.spec), settings.prepare, _suite_inputs(settings)]
    if is_reference(settings.spec.image):
        return Needs((settings.spec.image,), (settings.spec.image,), _digest(prepared))
    kit = load_kit(settings.spec.image, project=inputs.project)
    return Needs((kit.path,), (kit_key(kit),), _digest(prepared))


def _suite_inputs(settings: Settings) -> list[object]:
    if not settings.prepare:
        return []
    workspace = scan(settings.project)
    entries = tuple(entry for entry in workspace.entries if _is_named(entry.path, settings.prepare_inputs))
    return [replace(workspace, entries=entries).digest(), settings.prepare_network]


def _is_named(path: str, names: Sequence[str]) -> bool:
    tops = [name.rstrip("/") for name in names]
    return any(path == top or path.startswith(f"{top}/") for top in tops)


def _needs_of_jobs(inputs: Inputs) -> Needs:
    repository = CodeRepository(inputs.project, bare=False)
    _check_default_branch(repository, inputs.default_branch)
    definition = read_definition(repository, inputs.definition_from or None)
    if not inputs.trust:
        check_trust(repository, definition)
    tree = repository.tree(repository.ref("HEAD"))
    prepared = [_prepared(job, tree) for job in definition.jobs]
    with trusted_project(repository, inputs.definition_from or None) as (project, _bundles):
        images = sorted({job.spec.image for job in definition.jobs})
        pulled = tuple(image for image in images if is_reference(image))
        kits = [_kit(image, project) for image in images if image not in pulled]
        shipped = tuple(kit.path for kit in kits if shipped_kits() in kit.path.parents)
        return Needs((*shipped, *pulled), (*map(kit_key, kits), *pulled), _digest(prepared))


def _check_default_branch(repository: CodeRepository, expected: str) -> None:
    """Refuse a checkout in which another branch would be taken for the default one and get its privileges.

    Raises:
        UsageError: The checkout lacks the default branch.
    """
    found = repository.default_branch
    if expected and found != expected:
        raise UsageError(
            f"the default branch {expected!r} is not in this checkout; {found!r} would be taken for it",
            resolution="give actions/checkout fetch-depth: 0",
        )


def _prepared(job: Job, tree: Tree) -> list[object]:
    try:
        digest = tree.digest(job.prepare_inputs) if job.prepare else ""
    except UsageError:  # the checkout lacks these inputs: the job will report that
        digest = "none"
    return [_shape(job.spec), job.prepare, job.prepare_network, job.env, job.matrix, digest]


def _kit(image: str, project: Path) -> Kit:
    try:
        return load_kit(image, project=project)
    except KitError as error:
        raise KitError(f"image {image!r} of the jobs' definition: {error.brief}") from error


def _shape(spec: MachineSpec) -> list[object]:
    return [spec.image, spec.cpus, spec.memory, spec.disk]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
