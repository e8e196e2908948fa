"""Run tox environments in machines."""
