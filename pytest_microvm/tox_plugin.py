"""What tox loads: the runner ``microvm`` is registered, nothing else is imported."""
