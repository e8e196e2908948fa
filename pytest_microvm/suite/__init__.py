"""``pytest --microvm``: a test suite that runs inside machines, shown by the host's own pytest."""
