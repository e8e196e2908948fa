"""A plug-in that prints what our hooks tell it, at the end (``-p support.hook_printer``)."""

microvm_host_only = True
told = []


def pytest_microvm_started(facts, nodeid):
    """Note the start of a machine."""
    told.append(f"started {facts.id} {nodeid}")


def pytest_microvm_stopped(facts, usage):
    """Note the end of a machine; it must have used CPU time."""
    assert usage.cpu_seconds
    told.append(f"stopped {facts.id}")


def pytest_microvm_outcome(facts, outcome):
    """Note the outcome of a test."""
    told.append(f"{outcome} {facts.id}")


def pytest_terminal_summary(terminalreporter):
    """Print what was noted, one line for each call."""
    for line in told:
        terminalreporter.write_line(f"told: {line}")
