"""Writes until the disk is full."""

from pathlib import Path

with Path("/var/tmp/big").open("wb") as file:
    while True:
        file.write(b"x" * 1024**2)
