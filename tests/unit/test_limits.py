"""Whose word counts about a machine's limits: the spec's, then the kit's, then the host's default."""

from types import SimpleNamespace

from pytest_microvm.host import _limits
from pytest_microvm.spec import Limits, MachineSpec

KIT = {"cpus": 1, "memory": 2**28, "disk": 2**30, "pids": 64, "timeout": 30.0}


def limits(spec, kit, timeout=None):
    return _limits(spec, SimpleNamespace(resources=kit), timeout)


def test_the_spec_comes_before_the_kit_key_by_key():
    spec = MachineSpec(cpus=0.5, timeout=5.0, output=1000)
    assert limits(spec, KIT) == Limits(0.5, 2**28, 2**30, pids=64, timeout=5.0, output=1000)


def test_the_kit_comes_before_the_default():
    assert limits(MachineSpec(), KIT, timeout=300.0).timeout == 30.0


def test_the_default_fills_what_nobody_says():
    kit = {"cpus": 1, "memory": 2**28, "disk": 2**30}
    assert limits(MachineSpec(), kit, timeout=300.0) == Limits(1, 2**28, 2**30, timeout=300.0)
    assert limits(MachineSpec(), kit).timeout is None
