"""Templates of real machines: made once, made anew when damaged, kept where they should be."""

import os
import subprocess
import sys
import textwrap
import uuid

import pytest

from pytest_microvm.host.host import Host
from pytest_microvm.machine.grants import Given
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.templates.chain import TemplateStep

SPEC = MachineSpec(image="base", timeout=120)


@pytest.fixture
def empty_cache(host, tmp_path, monkeypatch):
    """A cache without templates; images and the accelerator's verdict are those of the real one."""
    host.base(SPEC)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "images").symlink_to(host.cache / "images")
    if (host.cache / "accelerator.json").exists():
        (cache / "accelerator.json").write_bytes((host.cache / "accelerator.json").read_bytes())
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(cache))
    return cache


def test_made_once_used_again_and_anew_when_damaged(empty_cache, said):
    def start():
        host = Host(say=said.append)
        with host.start(SPEC) as machine:
            assert machine.run(["echo", "up"]).stdout == "up\n"
        host.close()

    start()
    start()
    assert said == ["booting base"]
    (template,) = [path for path in (empty_cache / "templates").iterdir() if not path.name.startswith(".")]
    state = template / "state"
    state.write_bytes(state.read_bytes()[::-1])
    start()
    start()
    damaged = f"a template in the cache is damaged ({template.name[:12]}: state has other content)"
    assert said == ["booting base", f"{damaged}: making it again", "booting base"]


SCRIPT = textwrap.dedent("""
    import sys
    from pytest_microvm.host.host import Host
    host = Host(say=lambda line: print(line, flush=True))
    with host.start(image="base", timeout=120) as machine:
        print(machine.run(["echo", "up"]).stdout, end="")
    host.close()
""")


def test_two_runs_on_an_empty_cache_make_it_once(empty_cache):
    runs = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [run.communicate()[0].splitlines() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert [output[-1] for output in outputs] == ["up", "up"]
    assert sum(output.count("booting base") for output in outputs) == 1
    assert len([path for path in (empty_cache / "templates").iterdir() if not path.name.startswith(".")]) == 1


def test_two_runs_share_the_budget(host, tmp_path):
    environment = {
        **os.environ, "PYTEST_MICROVM_BUDGET": "cpus=1", "XDG_RUNTIME_DIR": str(tmp_path),
        "PYTEST_MICROVM_CACHE": str(host.cache),
    }  # fmt: skip
    host.start(SPEC).close()
    script = textwrap.dedent("""
        import os, sys, time
        from pytest_microvm.host.host import Host
        host = Host()
        for _ in range(4):
            with host.start(image="base", timeout=120) as machine:
                print(f"{time.monotonic()} begin {os.getpid()}", flush=True)
                machine.run(["true"])
                print(f"{time.monotonic()} end {os.getpid()}", flush=True)
        host.close()
    """)
    runs = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    lines = [line.split() for run in runs for line in run.communicate()[0].splitlines()]
    assert [run.returncode for run in runs] == [0, 0]
    happened = [(what, who) for _when, what, who in sorted(lines, key=lambda line: float(line[0]))]
    assert len(happened) == 16
    for (begin, first), (end, second) in zip(happened[::2], happened[1::2], strict=True):
        assert (begin, end, first) == ("begin", "end", second)  # never two at once


@pytest.mark.parametrize("granted", [False, True])
def test_machine_that_was_granted_something_makes_no_other_link(host, granted):
    """Its proxy serves it by what it was given: the next link, which runs the project's code, has another."""
    used = []

    def first(instance):
        if granted:
            instance.give(Given())
            instance.take_away()
        used.append(instance)
        return {}

    def second(instance):
        used.append(instance)
        return {}

    unique = f"{os.getpid()} {granted}"
    base = host.base(SPEC)
    with host._chain(base).ensure(
        base, [TemplateStep("prepared", (unique,), first), TemplateStep("made", (), second)]
    ) as made:
        keys = made.key, made.meta["parent"]
    for key in keys:
        host.templates.remove(key)
    assert (used[0] is not used[1]) == granted


def test_a_chain_of_steps(host):
    """Each link works on what the one before left; a copy of the last has it all."""

    def write(word):
        def work(instance):
            link = instance.link("agent")
            link.call("path", do="mkdir", path=f"/srv/{word}")
            names = link.call("path", do="list", path="/srv")["names"]
            return {"listing": ",".join(names).encode()}

        return work

    unique = str(os.getpid())
    steps = [
        TemplateStep("prepared", (unique, "a"), write("a")),
        TemplateStep("workspace", (unique, "b"), write("b")),
    ]
    base = host.base(SPEC)
    with host._chain(base).ensure(base, steps) as template:
        assert template.attachment("listing") == b"a,b"
        assert template.meta["kind"] == "workspace"
        copied = host.copy(template, base, "agent")
        try:
            names = copied.instance.link("agent").call("path", do="list", path="/srv")["names"]
            assert names == ["a", "b"]
        finally:
            copied.instance.close()
            host.release(copied)
        key = template.key
        parent = template.meta["parent"]
    for used in (key, parent):
        host.templates.remove(used)


def test_a_machine_in_the_making_counts_for_the_budget(host):
    seen = []

    def in_the_making():
        mine = [record for record in host.budget.records() if record.owner == os.getpid()]
        return [record for record in mine if record.id.startswith("template-")]

    def work(_instance):
        seen.extend(in_the_making())
        return {}

    base = host.base(MachineSpec(image="base"))
    with host._chain(base).ensure(base, [TemplateStep("counted", (uuid.uuid4().hex,), work)]) as template:
        key = template.key
    host.templates.remove(key)
    assert [(record.cpus, record.memory) for record in seen] == [(base.resources.cpus, base.resources.memory)]
    assert in_the_making() == []
