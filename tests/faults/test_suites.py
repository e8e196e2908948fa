"""``pytest --microvm`` over tests that do their worst: each has its outcome, the next test is unaffected."""

import json
import re
from pathlib import Path

import pytest

from support.projects import new_project

WORST = """
    import ctypes, os, signal, subprocess, sys, time
    from pathlib import Path
    import pytest

    if not Path("/run/microvm").exists():
        pytest.skip("ends the computer it runs on", allow_module_level=True)

    def test_fork_bomb():
        subprocess.run(["sh", "-c", "f() { f | f & }; f; sleep 100"])

    def test_memory_bomb():
        held = []
        while True:
            held.append(bytearray(b"x" * 2**20))

    def test_disk_is_filled():
        with open("/big", "wb") as file:
            while True:
                file.write(bytes(2**20))

    def test_gibibyte_of_output():
        for _ in range(2**30 // 2**20):
            os.write(1, b"x" * 2**20)

    @pytest.mark.microvm(timeout=5)
    def test_endless_loop():
        while True:
            pass

    def test_clock_is_set_back():
        time.clock_settime(time.CLOCK_REALTIME, 10_000)
        assert time.time() < 20_000

    def test_delete_everything():
        subprocess.run(["rm", "-rf", "--no-preserve-root", "/"], stderr=subprocess.DEVNULL)
        assert not Path("/etc").exists()

    def test_runner_is_killed():
        os.kill(os.getpid(), signal.SIGKILL)

    def test_kernel_panics():
        Path("/proc/sysrq-trigger").write_text("c")

    def test_power_off():
        Path("/proc/sysrq-trigger").write_text("o")
        time.sleep(100)

    def test_reboot():
        Path("/proc/sysrq-trigger").write_text("b")
        time.sleep(100)

    def test_crash_of_the_interpreter():
        ctypes.string_at(0)

    def test_that_fails():
        assert not "quietly"
"""
AFTER = """
    def {name}():
        assert time.time() > 1_700_000_000
        assert Path("/etc/passwd").exists()
        assert not Path("/big").exists()
        assert subprocess.run(["true"]).returncode == 0
"""

EXPECTED = {
    "test_fork_bomb": ("quota", "pids"),
    "test_memory_bomb": ("quota", "memory"),
    "test_disk_is_filled": ("quota", "disk"),
    "test_gibibyte_of_output": ("quota", "output"),
    "test_endless_loop": ("quota", "timeout"),
    "test_clock_is_set_back": ("passed", None),
    "test_delete_everything": ("passed", None),
    "test_runner_is_killed": ("crashed", None),
    "test_kernel_panics": ("crashed", None),
    "test_power_off": ("crashed", None),
    "test_reboot": ("crashed", None),
    "test_crash_of_the_interpreter": ("crashed", None),
    "test_that_fails": ("failed", None),
}
MIB = 1024**2
LIMITS = {"pids": "100", "memory": str(512 * MIB), "disk": str(1024 * MIB), "output": str(10 * MIB)}
WORDS = {
    "test_memory_bomb": "memory: limit 512 MiB, observed",
    "test_disk_is_filled": "disk: limit 1 GiB, observed",
    "test_runner_is_killed": "the pytest process in the guest ended",
    "test_kernel_panics": "the guest's kernel panicked",
    "test_power_off": "the guest powered itself off",
    "test_reboot": "the guest rebooted itself",
}


@pytest.fixture(scope="module")
def worst(tmp_path_factory):
    """One run of all of them, and after each a test that looks whether it left anything."""
    project = new_project(tmp_path_factory.mktemp("worst"))
    order = [name for test in EXPECTED for name in (test, f"test_after_{test}")]
    project.write(
        "test_worst.py", WORST + "".join(AFTER.format(name=f"test_after_{test}") for test in EXPECTED)
    )
    output = project.run(
        "--microvm", "-v", "--junitxml=report.xml", "--microvm-artifacts=artifacts", "--microvm-pids=100",
        "--microvm-disk=1G", "--microvm-output=10M", "--microvm-timeout=300",
        *(f"test_worst.py::{name}" for name in order), status=1,
    )  # fmt: skip
    return project, output, project.outcomes()


@pytest.mark.parametrize("name", EXPECTED)
def test_outcome(worst, name):
    _project, output, outcomes = worst
    outcome, quota = EXPECTED[name]
    found = outcomes[name]
    assert (found["microvm.outcome"], found.get("microvm.quota")) == (outcome, quota), output
    if quota in LIMITS:
        assert found["microvm.quota_limit"] == LIMITS[quota]
        assert float(found["microvm.quota_observed"]) >= float(LIMITS[quota])
    assert WORDS.get(name, "") in output
    assert outcomes[f"test_after_{name}"]["microvm.outcome"] == "passed"
    assert int(found["microvm.peak_memory_bytes"]) > 1024**2
    assert float(found["microvm.cpu_seconds"]) > 0


def test_words_in_the_terminal(worst):
    _project, output, _outcomes = worst
    assert "test_worst.py::test_memory_bomb QUOTA" in output
    assert "test_worst.py::test_kernel_panics CRASHED" in output
    assert "test_worst.py::test_that_fails FAILED" in output
    assert ", 5 crashed, 5 quota" in output


@pytest.mark.parametrize(
    "name", [name for name, expected in EXPECTED.items() if expected[0] in {"quota", "crashed"}]
)
def test_what_is_saved(worst, name):
    """Of each crash and excess: why, the console, what was used and what happened; JUnit says where."""
    _project, _output, outcomes = worst
    folder = Path(outcomes[name]["microvm.artifacts"])
    assert folder.is_relative_to(worst[0].folder / "artifacts")
    known = json.loads((folder / "machine.json").read_text())
    assert known["outcome"] == EXPECTED[name][0]
    assert known["about"].endswith(name)
    assert known["usage"]["cpu_seconds"] > 0
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events[0]["kind"] == "started"
    assert EXPECTED[name][0] in [event["kind"] for event in events]
    assert (folder / "report.txt").read_text().strip()
    console = (folder / "console.txt").read_text()
    if name == "test_kernel_panics":
        assert "Kernel panic - not syncing: sysrq triggered crash" in console
        assert ("panic", "guest") in {(event["data"].get("finding"), event["seen_by"]) for event in events}


def test_nothing_is_saved_of_tests_that_only_fail(worst):
    project, _output, outcomes = worst
    assert "microvm.artifacts" not in outcomes["test_that_fails"]
    saved = {path.name for path in (project.folder / "artifacts").iterdir()}
    assert len(saved) == 10


VICTIM = """
    import time

    def test_first():
        pass

    def test_second():
        time.sleep(2)

    def test_third():
        pass
"""
KILLER = """
    import os, signal, threading
    import pytest
    from pytest_microvm.templates.budget import HostBudget
    from pytest_microvm.templates.runtime_folder import runtime_folder

    microvm_host_only = True
    kills = []

    def kill(facts):
        (pid,) = [r.pid for r in HostBudget(runtime_folder(), 1, 1).records() if r.id == facts.id]
        os.kill(pid, signal.SIGKILL)
"""
BETWEEN = """
    def pytest_microvm_outcome(config, facts, nodeid, outcome):
        if nodeid.endswith("test_first") and not kills:
            kills.append(1)
            kill(facts)
"""
INSIDE = """
    def pytest_microvm_started(config, facts, nodeid):
        if nodeid.endswith("test_second"):
            threading.Timer(1.0, kill, [facts]).start()
"""


def test_killed_between_tests(project):
    """The machine that the module's tests share is gone before the second: a fresh one, and it shows."""
    project.write("test_victim.py", VICTIM)
    output = project.run(
        "--microvm", "-p", "killer", "--microvm-isolation=module", "--junitxml=report.xml", "-v",
        env=project.plug_in("killer", KILLER + BETWEEN),
    )  # fmt: skip
    outcomes = project.outcomes()
    assert {name: found["microvm.outcome"] for name, found in outcomes.items()} == dict.fromkeys(
        ["test_first", "test_second", "test_third"], "passed"
    )
    assert outcomes["test_second"]["microvm.retries"] == "1"
    assert "microvm.retries" not in outcomes["test_first"]
    assert "test_victim.py::test_second: infra: " in output
    assert "trying a fresh machine (1 of 2)" in output
    assert "3 tests in 2 machines" in output
    assert ", 1 retried" in output


def test_killed_inside_a_test(project):
    """That is a crash, and never tried again."""
    project.write("test_victim.py", VICTIM)
    output = project.run(
        "--microvm", "-p", "killer", "--microvm-pool=0", "--junitxml=report.xml", "-v",
        env=project.plug_in("killer", KILLER + INSIDE), status=1,
    )  # fmt: skip
    outcomes = {name: found["microvm.outcome"] for name, found in project.outcomes().items()}
    assert outcomes == {"test_first": "passed", "test_second": "crashed", "test_third": "passed"}
    assert "QEMU was killed by signal 9" in output
    assert "retried" not in output


def test_only_infra_has_an_exit_status_of_its_own(project):
    """No machine ever wakes up: every test is an error, tried three times, and the run says "again"."""
    project.write("test_victim.py", "def test_first(): pass\n")
    project.run("--microvm", "--collect-only", "-q")
    variables = project.plug_in(
        "broken",
        """
        import os, signal
        from pytest_microvm.hypervisors.qemu.process import QemuProcess

        microvm_host_only = True
        original = QemuProcess.load

        def killed(self, state):
            os.kill(self.pid, signal.SIGKILL)
            return original(self, state)

        QemuProcess.load = killed
        """,
    )
    output = project.run(
        "--microvm", "-p", "broken", "--microvm-pool=0", "--microvm-retries=1", "--junitxml=report.xml",
        env=variables, status=75,
    )  # fmt: skip
    assert project.outcomes()["test_first"]["microvm.outcome"] == "infra"
    assert output.count("trying a fresh machine (1 of 1)") == 1
    assert "infra: QEMU did not start" in output
    assert "1 infra, 1 retried" in output
    assert re.search(r"^(test_victim.py )?I +\[100%\]", output, re.MULTILINE)


MARKED = """
    import os, subprocess, time
    import pytest

    @pytest.mark.microvm(timeout=2)
    def test_slow():
        time.sleep(100)

    @pytest.mark.microvm(timeout=10_000)
    def test_no_marker_widens():
        time.sleep(100)

    @pytest.mark.microvm(pids=20)
    def test_pids():
        for _ in range(100):
            subprocess.Popen(["sleep", "100"])

    @pytest.mark.microvm(lifetime=3)
    def test_lifetime():
        time.sleep(100)

    @pytest.mark.microvm(cpu_seconds=4)
    def test_cpu():
        while True:
            pass

    @pytest.mark.microvm(output="1K")
    def test_output():
        print("x" * 2000)

    def test_without():
        assert subprocess.run(["true"]).returncode == 0
"""


def test_a_marker_tightens_and_never_widens(project):
    project.write("test_marked.py", MARKED)
    project.run("--microvm", "--strict-markers", "--microvm-timeout=12", "--junitxml=report.xml", status=1)
    found = {
        name: (case["microvm.outcome"], case.get("microvm.quota"), case.get("microvm.quota_limit"))
        for name, case in project.outcomes().items()
    }
    assert found == {
        "test_slow": ("quota", "timeout", "2"),
        "test_no_marker_widens": ("quota", "timeout", "12"),
        "test_pids": ("quota", "pids", "20"),
        "test_lifetime": ("quota", "lifetime", "3"),
        "test_cpu": ("quota", "cpu_seconds", "4"),
        "test_output": ("quota", "output", "1024"),
        "test_without": ("passed", None, None),
    }
    project.write("test_nonsense.py", MARKED.replace("timeout=2", "timeout='soon'"))
    refused = project.run("--microvm", "test_nonsense.py", status=4)
    assert (
        "@pytest.mark.microvm: timeout: invalid time: expected a number of seconds above 0, got 'soon'"
        in refused
    )


FIXTURES = """
    import pytest
    from pytest_microvm import QuotaExceeded

    pytestmark = pytest.mark.microvm(image="base", disk="64M")

    def test_too_much(microvm):
        microvm.run("cat /dev/zero > /big")

    def test_expected(microvm):
        with pytest.raises(QuotaExceeded):
            microvm.run("cat /dev/zero > /big")

    def test_crash(microvm):
        microvm.run("echo c > /proc/sysrq-trigger; sleep 100")

    def test_two(microvm, microvm_factory):
        other = microvm_factory()
        microvm.run("echo c > /proc/sysrq-trigger; sleep 100")

    def test_fine(microvm):
        assert microvm.run("echo fine").stdout == "fine\\n"
"""


def test_fixtures_have_the_same_outcomes(project):
    project.write("test_fixtures.py", FIXTURES)
    project.run("--junitxml=report.xml", "--microvm-artifacts=saved", status=1)
    cases = project.outcomes()
    found = {name: (case["microvm.outcome"], case.get("microvm.quota")) for name, case in cases.items()}
    assert found == {
        "test_too_much": ("quota", "disk"),
        "test_expected": ("passed", None),
        "test_crash": ("crashed", None),
        "test_two": ("crashed", None),
        "test_fine": ("passed", None),
    }
    saved = {name for name, case in cases.items() if "microvm.artifacts" in case}
    assert saved == {"test_too_much", "test_crash", "test_two"}
    folder = Path(cases["test_crash"]["microvm.artifacts"])
    commands = [json.loads(line)["about"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert "echo c > /proc/sysrq-trigger; sleep 100" in commands
    assert "Kernel panic" in (folder / "console.txt").read_text()
