"""Ctrl-C while a test runs: the run ends as pytest's do, and nothing is left running."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import guards
from support.comparison import only_locally


@only_locally
@pytest.mark.parametrize("options", [[], ["--microvm-isolation=session"], ["-n", "1"]], ids=" ".join)
def test_ctrl_c(project, options):
    pids = project.path.parent / f"{project.path.name}-pids"
    project.write(
        test_it=f"""
            import os, time
            def test_waits():
                with open({str(pids)!r}, "w") as file:
                    file.write(str(os.getpid()) + " " + str(os.getppid()) + "\\n")
                time.sleep(3600)
        """
    )
    os.mkfifo(pids)
    command = [sys.executable, "-m", "pytest", "--microvm", *project._arguments, *options]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    guests = [int(pid) for pid in pids.read_text().split()]  # returns once the test is running
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    output, _ = run.communicate(timeout=guards.MACHINE)
    assert run.returncode == 2, output
    assert "KeyboardInterrupt" in output
    assert not [pid for pid in guests if Path(f"/proc/{pid}/exe").exists()]
