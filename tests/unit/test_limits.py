"""Whose word counts about a machine's limits: the spec's, then the kit's, then the host's default."""

from types import SimpleNamespace

import pytest

from pytest_microvm.host.host import _limits
from pytest_microvm.settings.spec import Limits, MachineSpec
from pytest_microvm.suite.backend import RunOptions
from pytest_microvm.suite.limits import limits_of

KIT = {"cpus": 1, "memory": 2**28, "disk": 2**30, "pids": 64, "timeout": 30.0}


def limits(spec, kit, timeout=None):
    return _limits(spec, SimpleNamespace(resources=kit), timeout)


def test_the_spec_comes_before_the_kit_key_by_key():
    spec = MachineSpec(cpus=0.5, timeout=5.0, output=1000)
    assert limits(spec, KIT) == Limits(0.5, 2**28, 2**30, pids=64, timeout=5.0, output=1000)


def test_the_kit_comes_before_the_default():
    assert limits(MachineSpec(), KIT, timeout=300.0).timeout == 30.0


def test_kit_and_default_timeout_fill_unset_limits():
    kit = {"cpus": 1, "memory": 2**28, "disk": 2**30}
    assert limits(MachineSpec(), kit, timeout=300.0) == Limits(1, 2**28, 2**30, timeout=300.0)
    assert limits(MachineSpec(), kit).timeout is None


def limits_with(options, *markers):
    return limits_of(
        SimpleNamespace(iter_markers=lambda _name: [SimpleNamespace(kwargs=m) for m in markers]), options
    )


@pytest.mark.parametrize(
    ("marked", "left"),
    [
        ([], ("deny:b.example",)),
        (["a.example"], ("a.example", "deny:b.example")),
        (["a.example", "evil.example", "all", "deny:c.example"], ("a.example", "deny:b.example")),
        ("pip", ("pip", "deny:b.example")),
    ],
)
def test_marker_narrows_network_rules_and_keeps_denials(marked, left):
    options = RunOptions(network=("a.example", "pip", "deny:b.example"))
    assert limits_with(options, {"network": marked}).network == left
    assert limits_with(options, {}).network is None


def test_markers_only_narrow_each_other():
    options = RunOptions(network=("a.example", "b.example"))
    assert limits_with(options, {"network": ["a.example"]}, {"network": ["b.example"]}).network == ()


def test_a_machine_that_tests_share_has_the_runs_network():
    options = RunOptions(isolation="module", network=("a.example",))
    assert limits_with(options, {"network": []}).network is None
