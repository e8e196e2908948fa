"""The example at work: every plug-in in a machine of its own, the hostile ones too."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from host import SPEC, parse_answer, run_plugin

from pytest_microvm import MicroVM

PLUGINS = Path(__file__).parents[1] / "plugins"


PATIENT = {"timeout": 120, "cpu_seconds": 60, "lifetime": 240}  # this computer may be slow, or busy


def run(name, data=None, *, strict=""):
    """Run a plug-in with the example's quotas; of those on time only ``strict`` is not relaxed."""
    spec = replace(SPEC, **{quota: seconds for quota, seconds in PATIENT.items() if quota != strict})
    return run_plugin(PLUGINS / f"{name}.py", data or {}, lambda _spec: MicroVM.start(spec))


def test_a_good_plugin():
    result = run("count_words", {"text": "to be or not to be"})
    assert result.verdict == "ok"
    assert result.answer == {"words": 6, "most_common": [["to", 2], ["be", 2], ["or", 1]]}


@pytest.mark.parametrize(
    ("name", "quota"),
    [
        ("fork_bomb", "pids"),
        ("memory_bomb", "memory"),
        ("endless_loop", "cpu_seconds"),
        ("sleeper", "timeout"),
        ("output_flood", "output"),
        ("disk_filler", "disk"),
    ],
)
def test_more_than_it_may_use(name, quota):
    result = run(name, strict=quota)
    assert result.verdict == "quota", result
    assert result.quota == quota
    assert result.limit == getattr(SPEC, quota)
    assert result.observed >= result.limit
    assert result.reason.startswith(f"{quota}: limit ")


def test_nothing_of_the_host_is_there(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the host's own")
    with socket.create_server(("127.0.0.1", 0)) as service:
        port = service.getsockname()[1]
        wanted = {
            "files": [str(secret), str(PLUGINS), "/run/microvm"],  # the last one is the machine's
            "processes": [os.getpid(), 1],  # so is its process 1
            "services": [["127.0.0.1", port], ["10.0.2.2", port], ["192.0.2.1", 80]],
        }
        result = run("looks_around", wanted)
    assert result.verdict == "ok", result
    assert result.answer["files"] == ["/run/microvm"]
    assert result.answer["processes"] == [1]
    assert result.answer["services"] == []
    assert sorted(result.answer["devices"]) == ["lo", "nowhere"]  # the second one leads to where it says
    assert result.answer["user"] != 0


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("raises", "KeyError: 'no such key'"),
        ("garbage", "not an answer"),
        ("deep", "nested too deeply"),
        ("huge_number", "too many digits"),
        ("not_a_number", "NaN is not JSON"),
    ],
)
def test_an_answer_that_is_none(name, why):
    result = run(name)
    assert result.verdict == "failed", result
    assert why in result.reason
    assert len(result.reason) < 1000


def test_its_machine_ends():
    """A kernel that panics while the plug-in runs: only root can cause it, so it is caused from outside."""
    machines = []

    def start(spec):
        vm = MicroVM.start(spec)
        vm.popen("until test -e /plugin.py; do sleep 0.1; done; echo c > /proc/sysrq-trigger")
        machines.append(vm)
        return vm

    result = run_plugin(PLUGINS / "sleeper.py", None, start)
    assert result.verdict == "crashed", result
    assert "panicked" in result.reason
    assert machines[0].closed


@pytest.mark.parametrize("depth", [31, 32, 33])
def test_depth(depth):
    raw = b"[" * depth + b"1" + b"]" * depth
    if depth > 32:
        with pytest.raises(ValueError, match="deeply"):
            parse_answer(raw)
    else:
        parse_answer(raw)
