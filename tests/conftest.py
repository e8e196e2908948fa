"""What all tests share: hypothesis without wall-clock deadlines, on machines of any speed."""

import signal

import pytest
from hypothesis import settings

settings.register_profile("any-speed", deadline=None)
settings.load_profile("any-speed")

# A shell starts its background jobs with Ctrl-C ignored, and every process started here would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["pytester"]
pytest.register_assert_rewrite("support")  # its asserts explain themselves, as those of tests do


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Let a file's tests run in one process: they share machines. Those with a group of their own do not."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}/{item.path.stem}"))


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
