"""Find the jobs' images that need trust: the project's own kits, and container images by reference."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pytest_microvm.ci.definition.job import Job
from pytest_microvm.errors import KitError
from pytest_microvm.host.project_grants import own_image
from pytest_microvm.images.kits import shipped_kits

KITS = "microvm/kits"
"""The folder of a project's own kits."""


def own_images(jobs: Iterable[Job]) -> set[str]:
    """Return the images that do not ship with this package."""
    images = {job.spec.image for job in jobs}
    return {image for image in images if "/" in image or not (shipped_kits() / image / "kit.toml").is_file()}


def asked_by_kits(jobs: Iterable[Job], project: Path) -> dict[str, Any]:
    """Return the requests of a project's own kits: for each a digest of its content, and its network rules.

    A container image is requested by its reference.

    A missing or unusable kit requests nothing: no machine will be made from it.

    Args:
        jobs: The jobs.
        project: The project's folder, which contains the kits.
    """
    jobs = list(jobs)
    asked: dict[str, Any] = {}
    for image in sorted(own_images(jobs)):
        try:
            own = own_image(image, project)
        except KitError:
            continue
        if own is None:
            continue
        asked[f"ci.image.{image}"], network = own
        for job in jobs:
            if job.spec.image == image and job.spec.network is None and network:
                asked[f"ci.jobs.{job.key}.network"] = [*network]
    return asked
