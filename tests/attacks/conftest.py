"""Run a hostile project natively and with machines."""

from support.fixtures import backend, entry, project

__all__ = ["backend", "entry", "project"]
