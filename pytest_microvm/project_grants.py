"""What a project's configuration asks for that needs its user's trust, its own kits included."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_microvm.config import Settings
from pytest_microvm.images.kits import find_kit, load_kit, shipped_kits


def asked_by(settings: Settings) -> dict[str, Any]:
    """Return what a project asks for, by key: its grants, and a kit of its own with a digest of all it says.

    A kit's commands run on this computer when its image is built; one that ships is nobody's request. What
    the command line says is not the project's.

    Args:
        settings: The project's.

    Raises:
        KitError: The image's kit cannot be used.
    """
    found = {key: value for key, value in settings.asked.items() if key != "image" and value}
    own = own_kit(settings.spec.image, settings.project)
    if own is not None:
        shown, network = own
        if "image" in settings.asked:
            found["image"] = shown
        if settings.spec.network is None and network:
            found["network"] = [*network]
    return found


def own_kit(image: str, project: Path) -> tuple[str, Sequence[str]] | None:
    """Return a kit of the project's own with a digest of all it says, and its network; ``None``: it ships.

    Raises:
        KitError: There is no such kit, or it cannot be used.
    """
    if shipped_kits() in find_kit(image, project=project).parents:
        return None
    kit = load_kit(image, project=project)
    recipe = json.dumps(kit.recipe(), sort_keys=True, default=str)
    return f"{image} (sha256 {hashlib.sha256(recipe.encode()).hexdigest()[:32]})", kit.network or ()
