"""What a project needs before its run: kits, and what is prepared; read, never run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from pytest_microvm import project_trust
from pytest_microvm.ci.github_inputs import Inputs
from pytest_microvm.config import Settings, load_settings
from pytest_microvm.errors import KitError, UsageError
from pytest_microvm.images.kits import Kit, load_kit
from pytest_microvm.project_grants import asked_by
from pytest_microvm.remote.workspace import scan
from pytest_microvm.spec import MachineSpec

_KITS = "microvm/kits"


@dataclass(frozen=True)
class Needs:
    """What a run needs.

    Args:
        kits: Of all images, by name.
        prepared: A digest of what is prepared in its machines before its tests come in.
    """

    kits: tuple[Kit, ...]
    prepared: str


def needs_of(inputs: Inputs) -> Needs:
    """Return what a run needs.

    Raises:
        UsageError: The project's configuration or the jobs' definition cannot be used, or asks for what
            nobody has allowed.
    """
    return _needs_of_jobs(inputs) if inputs.mode == "ci" else _needs_of_suite(inputs)


def _needs_of_suite(inputs: Inputs) -> Needs:
    settings = load_settings(inputs.project, {"image": inputs.image or None})
    if not inputs.trust:
        project_trust.check(settings.project, asked_by(settings))
    kit = load_kit(settings.spec.image, project=inputs.project)
    return Needs((kit,), _digest([_shape(settings.spec), settings.prepare, _suite_inputs(settings)]))


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
    from pytest_microvm.ci.sources import CodeRepository, read_definition  # noqa: PLC0415 - git is needed

    repository = CodeRepository(inputs.project)
    definition = read_definition(repository, inputs.definition_from or None)
    trusted = inputs.definition_from or repository.default_branch
    tree = repository.tree(repository.ref("HEAD"))
    prepared: list[object] = []
    for job in definition.jobs:
        inputs_digest = ""
        if job.prepare:
            try:
                inputs_digest = tree.digest(job.prepare_inputs)
            except UsageError:  # this branch does not have them; the job will say so
                inputs_digest = "none"
        prepared.append([_shape(job.spec), job.prepare, job.prepare_network, job.env, inputs_digest])
    with TemporaryDirectory() as folder:
        repository.export(trusted, _KITS, Path(folder) / _KITS)
        kits = [_kit(image, Path(folder)) for image in sorted({job.spec.image for job in definition.jobs})]
        # Their files are read here: the keys need their content.
        return Needs(tuple(kits), _digest([*prepared, *(kit.recipe() for kit in kits)]))


def _kit(image: str, project: Path) -> Kit:
    try:
        return load_kit(image, project=project)
    except KitError as error:
        raise KitError(f"image {image!r} of the jobs' definition: {error.brief}") from error


def _shape(spec: MachineSpec) -> list[object]:
    return [spec.image, spec.cpus, spec.memory, spec.disk]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
