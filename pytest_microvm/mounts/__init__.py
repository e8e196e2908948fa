"""Directories of the host in a machine: copied, cloned with git, or live."""
