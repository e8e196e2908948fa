"""Starting machines: places in the host budget, replacements, and what is left when a start fails."""

import os
from types import SimpleNamespace

import pytest

from pytest_microvm.errors import BootError
from pytest_microvm.events import EventLog
from pytest_microvm.host.starting import MachineStarter
from pytest_microvm.hypervisors import Accelerator
from pytest_microvm.machine.grants import NO_GRANTS, NOTHING
from pytest_microvm.settings.spec import Limits, Resources
from pytest_microvm.templates.budget import HostBudget
from pytest_microvm.templates.chain import Base
from pytest_microvm.templates.pool import Pool
from pytest_microvm.templates.store import TemplateStore

GIB = 1024**3
TEMPLATE = SimpleNamespace(key="key")
HOLDS_SECRETS = SimpleNamespace(secrets=("TOKEN",), for_machine=lambda _name: NOTHING)


class Machine:
    """A running VM that wakes up, or does not."""

    def __init__(self, error):
        self.vmm = SimpleNamespace(pid=os.getpid(), not_enforced=("no throttle",))
        self.events = EventLog()
        self.error = error
        self.closed = False

    def give(self, given):
        self.given = given

    def adopt(self, port, identity, given):
        if self.error:
            raise self.error
        self.adopted = (port, identity)

    def close(self):
        self.closed = True


class Host:
    """What a starter uses: a budget for two machines, a store, and a chain whose copies may fail."""

    def __init__(self, folder):
        self.budget = HostBudget(folder / "run", cpus=2, memory=2 * GIB)
        self.store = TemplateStore(folder / "cache", GIB, print)
        self.errors = []
        self.machines = []
        self.owns = []
        self.said = []
        self.warned = []
        self.starter = MachineStarter(
            lambda: self.budget, lambda: self.store, lambda _base: self, lambda template, _base: template,
            say=self.said.append, warn=self.warned.extend, retries=1,
        )  # fmt: skip

    def copy(self, _template, _base, _name, *, own):
        self.owns.append(own)
        self.machines.append(Machine(self.errors.pop(0) if self.errors else None))
        return self.machines[-1]

    def keep(self, instance, _base, key, own, facts):
        self.kept = (instance, key, own.is_dir(), facts["about"])

    @property
    def held(self):
        return {record.id for record in self.budget.records()}


def base_with(grants=NO_GRANTS):
    image = SimpleNamespace(name="base", digest="sha256:0")
    limits = Limits(1, GIB, GIB, pids=64)
    return Base(image, Resources(1, GIB, GIB, ()), Accelerator("tcg", "", "q35"), limits, grants)


BASE = base_with()


@pytest.fixture
def host(tmp_path):
    made = Host(tmp_path)
    yield made
    made.starter.close()
    assert made.held == set()


def test_copy_holds_a_place_until_it_is_released(host):
    copied = host.starter.copy(TEMPLATE, BASE, "runner")
    port, identity = copied.instance.adopted
    assert port == "runner"
    assert (identity["hostname"], identity["pids"]) == (copied.facts.id, 64)
    assert [(record.id, record.pid) for record in host.budget.records()] == [(copied.facts.id, os.getpid())]
    assert host.warned == ["no throttle"]
    host.starter.release(copied)
    assert host.held == set()


def test_try_copy_returns_none_when_the_budget_is_used_up(host):
    held = [host.starter.try_copy(TEMPLATE, BASE, "agent") for _ in range(2)]
    assert host.starter.try_copy(TEMPLATE, BASE, "agent") is None
    assert host.held == {copied.facts.id for copied in held}


def test_copy_takes_the_place_of_a_pooled_machine(host):
    starter = host.starter

    def new():
        return Pool(2, lambda: starter.try_copy(TEMPLATE, BASE, "agent"), starter.release)

    assert starter.pool(("agent", ""), new) is starter.pool(("agent", ""), new)
    starter.wait_ready()
    pooled = host.held
    assert len(pooled) == 2
    copied = starter.copy(TEMPLATE, BASE, "agent")
    assert copied.facts.id in host.held - pooled


def test_machine_that_does_not_wake_up_is_replaced(host):
    host.errors = [BootError("no answer")]
    copied = host.starter.copy(TEMPLATE, BASE, "agent")
    assert [machine.closed for machine in host.machines] == [True, False]
    assert copied.instance is host.machines[1]
    assert host.said == ["infra: no answer; starting another machine (1 of 1)"]


@pytest.mark.parametrize(
    ("errors", "starts"), [([BootError("first"), BootError("last")], 2), ([KeyboardInterrupt("last")], 1)]
)
def test_failed_start_leaves_neither_place_nor_folder(host, errors, starts):
    host.errors = errors
    with pytest.raises((BootError, KeyboardInterrupt), match="last"):
        host.starter.copy(TEMPLATE, BASE, "agent", keepable=True)
    assert [machine.closed for machine in host.machines] == [True] * starts
    assert host.held == set()
    assert not host.owns[-1].exists()


def test_interrupt_after_the_start_ends_the_machine(host, monkeypatch):
    def interrupted(_name, _pid):
        raise KeyboardInterrupt

    monkeypatch.setattr(host.budget, "started", interrupted)
    with pytest.raises(KeyboardInterrupt):
        host.starter.copy(TEMPLATE, BASE, "agent")
    assert host.machines[0].closed
    assert host.held == set()


def test_close_ends_machines_that_were_not_released(host):
    copied = host.starter.copy(TEMPLATE, BASE, "agent")
    host.starter.close()
    assert copied.instance.closed
    assert host.held == set()


def test_room_is_held_while_a_template_is_made(host):
    with host.starter.room(BASE):
        (name,) = host.held
        assert name.startswith("template-")
    assert host.held == set()
    with pytest.raises(ZeroDivisionError), host.starter.room(BASE):
        raise ZeroDivisionError
    assert host.held == set()


def test_keepable_copy_has_a_folder_until_it_is_released(host):
    copied = host.starter.copy(TEMPLATE, BASE, "agent", keepable=True)
    assert copied.own.is_dir()
    assert host.owns == [copied.own]
    host.starter.release(copied)
    assert not copied.own.exists()


def test_kept_machine_is_frozen_and_released(host):
    copied = host.starter.copy(TEMPLATE, BASE, "agent", keepable=True)
    kept = host.starter.keep(copied, "a test")
    assert (kept.id, kept.image, kept.about) == (copied.facts.id, "base", "a test")
    assert host.kept == (copied.instance, copied.facts.id, True, "a test")
    assert host.held == set()
    assert not copied.own.exists()


def test_machine_that_holds_secrets_is_not_kept(host):
    machine = host.starter.machine(TEMPLATE, base_with(HOLDS_SECRETS), keepable=True)
    assert host.owns == [None]
    assert any("secrets are not kept" in line for line in host.warned)
    assert not machine.keep("a test")
    assert not machine.instance.closed
