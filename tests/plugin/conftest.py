"""Run a small project natively and with machines; the same tests run over every backend."""

from support.fixtures import backend, entry, project

__all__ = ["backend", "entry", "project"]
