"""Live mounts: a directory of the host that a machine works in, served to its kernel as FUSE."""
