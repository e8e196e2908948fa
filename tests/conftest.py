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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With ``--dist loadfile``, let a page of documentation run in any process; other files share machines.

    pytest-xdist's ``loadgroup`` is made for that, but takes no effect with pytest 9.2: ``Item.nodeid`` does
    not follow the attribute that pytest-xdist 3.8 changes.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling  # noqa: PLC0415 - where it is used, it is there

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if "::test_page[" in nodeid else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_collection_finish():
    """Keep imported modules and collected tests out of garbage collection: they stay until the end."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption(
        "--require-kvm", action="store_true", help="fail unless machines run with KVM (tests/kvm/run.py)"
    )


@pytest.fixture(scope="session")
def host(pytestconfig):
    """This computer, with the cache that its user has: images are built once, not for every test run."""
    from pytest_microvm.host.host import Host  # noqa: PLC0415 - unit tests do without

    computer = Host(say=print, require_accel="kvm" if pytestconfig.getoption("require_kvm") else None)
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
