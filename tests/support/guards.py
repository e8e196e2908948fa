"""Timeouts that no test reaches: they end one that hangs, on the slowest machine that runs the tests.

None of them is about speed. A test that depends on how long something takes states a time of its own.
"""

PROCESS = 60
"""Seconds for what happens between threads, sockets and processes of this computer."""

MACHINE = 600
"""Seconds for one step with machines: a boot, a command, an image that is built, one way or another."""

SUITE = 1800
"""Seconds for a run of many steps: a test suite, the jobs of several branches, a page of documentation."""
