"""What all tests share: how many examples hypothesis makes up, and a host."""

import gc
import os
import signal

import pytest
from hypothesis import settings

# No wall-clock deadlines: tests run on machines of any speed. A test that needs more or fewer examples than
# others asks for a multiple of `settings.default.max_examples`, so that it follows the profile.
settings.register_profile("quick", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=100)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

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


def pytest_collection_finish():
    """Keep imported modules and collected tests out of garbage collection: they stay until the end."""
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
