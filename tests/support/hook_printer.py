"""A plug-in that prints what our hooks tell it, at the end (``-p support.hook_printer``)."""

microvm_host_only = True
told = []


def pytest_microvm_started(facts, nodeid):
    told.append(f"started {facts.id} {nodeid}")


def pytest_microvm_stopped(facts, usage):
    assert usage.cpu_seconds
    told.append(f"stopped {facts.id}")


def pytest_microvm_outcome(facts, outcome):
    told.append(f"{outcome} {facts.id}")


def pytest_terminal_summary(terminalreporter):
    for line in told:
        terminalreporter.write_line(f"told: {line}")
