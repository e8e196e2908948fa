"""Keys of what is built: digests of all inputs."""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any

from pytest_microvm.images.blobs import canonical_json
from pytest_microvm.images.kits import Kit
from pytest_microvm.images.platform import platform_recipe

BUILDER_VERSION = 2
"""Increase it when a change of the builder changes the content of images."""

_EPOCH = 1735689600  # 2025-01-01: the newest time stamp in an image, unless SOURCE_DATE_EPOCH says otherwise


def source_date_epoch() -> int:
    """Return the newest time stamp in an image, in seconds."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(text) if re.fullmatch(r"\d{1,10}", text) else _EPOCH


def build_key(recipe: dict[str, Any]) -> str:
    """Return a digest of a recipe, of the builder and of the newest time stamp."""
    shaped = {"builder": BUILDER_VERSION, "epoch": source_date_epoch(), "recipe": recipe}
    return hashlib.sha256(canonical_json(shaped)).hexdigest()


def kit_key(kit: Kit) -> str:
    """Return a digest of all inputs of a kit's image, including platform and builder."""
    platform = platform_recipe(kit.suite, kit.architecture, kit.mirror)
    return build_key(
        {
            "kit": kit.recipe(),
            "resources": dict(kit.resources),
            "network": kit.network,
            "platform": platform,
            **kit.services_recipe(),
        }
    )


def platform_name_and_key(kit: Kit) -> tuple[str, str]:
    """Return the name and key of the platform artifact that a kit shares with all kits of its suite."""
    key = build_key(platform_recipe(kit.suite, kit.architecture, kit.mirror))
    return f"platform-{kit.suite}-{kit.architecture}", key
