"""tox environments that are machines."""
