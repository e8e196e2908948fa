"""Live mounts: a directory of the host, served to a machine's kernel over FUSE."""
