"""Takes no CPU time, and never ends."""

import time

time.sleep(100_000)
