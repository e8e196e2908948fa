"""What all tests share: hypothesis without wall-clock deadlines, on machines of any speed."""

import gc

import pytest
from hypothesis import settings

settings.register_profile("any-speed", deadline=None)
settings.load_profile("any-speed")

pytest_plugins = ["pytester"]


def pytest_collection_finish():
    """Leave what was imported and collected out of garbage collection: it stays, and pytest collects often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def host():
    """This computer, with the cache that its user has: images are built once, not for every test run."""
    from pytest_microvm.host import Host  # noqa: PLC0415 - unit tests do without

    computer = Host(say=print)
    yield computer
    computer.close()


class _Said(list):
    def append(self, line):
        if not line.startswith("waiting: the host budget"):
            super().append(line)


@pytest.fixture
def said():
    """The lines that a host says, but that it waits: other tests' machines use the same budget."""
    return _Said()
