"""Guest images: kits, builds and the store."""

from __future__ import annotations

from pytest_microvm.images.image import Image

__all__ = ["Image"]
