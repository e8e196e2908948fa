"""Run a small project natively and with machines; the same tests run over every backend."""

from support.fixtures import backend, entry, project
from support.plugin_environment import plugin_python

__all__ = ["backend", "entry", "plugin_python", "project"]
