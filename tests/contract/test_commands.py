"""Commands in a machine behave as subprocess's do."""

import signal
import subprocess
import threading
import time

import pytest

from pytest_microvm.errors import MachineCrashed, MachineError, UsageError
from support import guards

BIG = 3_000_000  # bytes, many times a stream's window


def test_run_a_list(vm):
    done = vm.run(["printf", "%s|", "a b", "$HOME", "*"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "a b|$HOME|*|", "")
    assert done.args == ["printf", "%s|", "a b", "$HOME", "*"]


def test_run_a_string_in_the_shell(vm):
    done = vm.run("echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_check(vm):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        vm.run("echo why >&2; exit 7", check=True)
    assert (caught.value.returncode, caught.value.stderr) == (7, "why\n")
    assert vm.run(["true"], check=True).returncode == 0


def test_bytes(vm):
    assert vm.run(["printf", r"\377\000\r\n"], text=False).stdout == b"\xff\x00\r\n"
    assert vm.run(["printf", r"\377"]).stdout == "\N{REPLACEMENT CHARACTER}"


def test_text_beyond_ascii(vm):
    assert vm.run(["printf", "%s", "Grüße 漢字"]).stdout == "Grüße 漢字"
    assert vm.run(["cat"], input="Grüße 漢字").stdout == "Grüße 漢字"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_a_signal_is_a_negative_exit_status(vm, number):
    assert vm.run(f"kill -{number.value} $$").returncode == -number


@pytest.mark.parametrize("argv", [["no-such-program"], ["/no/such/program"]])
def test_a_missing_program(vm, argv):
    with pytest.raises(FileNotFoundError, match="in the machine"):
        vm.run(argv)


def test_a_program_that_may_not_be_run(vm):
    with pytest.raises(PermissionError, match="in the machine"):
        vm.run(["/etc/passwd"])


def test_a_missing_folder(vm):
    with pytest.raises(FileNotFoundError, match="in the machine"):
        vm.run(["true"], cwd="/no/such/folder")


@pytest.mark.parametrize("args", [[], "", [""], ["a\0b"]])
def test_impossible_commands(vm, args):
    with pytest.raises(UsageError):
        vm.run(args)


def test_environment(vm):
    done = vm.run('echo "$A|$HOME|$PATH"', env={"A": "x y"})
    variable, home, path = done.stdout.strip().split("|")
    assert variable == "x y"
    assert home == "/root"
    assert "/usr/bin" in path.split(":")
    assert vm.run("echo $A").stdout == "\n"
    assert vm.run("echo $HOME", env={"HOME": "/elsewhere"}).stdout == "/elsewhere\n"


def test_the_program_is_looked_up_in_the_commands_own_path(vm, place):
    (place / "greet").write_text("#!/bin/sh\necho hello\n")
    (place / "greet").chmod(0o755)
    assert vm.run(["greet"], env={"PATH": str(place)}).stdout == "hello\n"


def test_working_directory(vm, place):
    assert vm.run(["pwd"]).stdout == "/\n"
    assert vm.run(["pwd"], cwd=place.pure).stdout == f"{place}\n"


@pytest.mark.parametrize("user", ["nobody", 65534])
def test_user(vm, user):
    done = vm.run("id -un; id -u; echo $HOME $USER", user=user)
    assert done.stdout.splitlines()[:2] == ["nobody", "65534"]
    assert done.stdout.splitlines()[2].endswith(" nobody")
    assert vm.run(["id", "-u"]).stdout == "0\n"


def test_an_unknown_user(vm):
    with pytest.raises(MachineError, match="no user 'mallory'"):
        vm.run(["true"], user="mallory")


def test_input(vm):
    assert vm.run(["cat"], input="text").stdout == "text"
    assert vm.run(["cat"], input="").stdout == ""
    assert vm.run(["wc", "-c"]).stdout.strip() == "0"  # no input is an empty one, not the terminal's


def test_input_and_output_larger_than_the_window(vm):
    data = bytes(range(256)) * (BIG // 256)
    done = vm.run(["cat"], input=data, text=False)
    assert done.stdout == data


def test_input_that_is_not_read(vm):
    assert vm.run(["true"], input=b"x" * BIG, text=False).returncode == 0
    assert vm.run("head -c 5", input=b"y" * BIG, text=False).stdout == b"yyyyy"


def test_stdout_and_stderr_at_once(vm):
    script = "i=0; while [ $i -lt 500 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done"
    done = vm.run(script)
    assert done.stdout.splitlines() == [f"out {i}" for i in range(500)]
    assert done.stderr.splitlines() == [f"err {i}" for i in range(500)]
    done = vm.run(f"head -c {BIG} /dev/zero >&2; head -c {BIG} /dev/zero", text=False)
    assert (len(done.stdout), len(done.stderr)) == (BIG, BIG)


def test_a_timeout_kills_the_whole_process_group(vm, place):
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        vm.run(f"echo begun; sleep 600 & echo $! > {place}/child; echo $$ > {place}/self; wait", timeout=3)
    assert caught.value.stdout == "begun\n"
    for name in ("child", "self"):
        pid = (place / name).read_text().strip()
        vm.wait_until_succeeds(
            f"! kill -0 {pid} 2>/dev/null || grep -q '^State:.Z' /proc/{pid}/status", timeout=60
        )


def test_the_machine_is_usable_after_a_timeout(vm):
    for _ in range(3):
        with pytest.raises(subprocess.TimeoutExpired):
            vm.run(["sleep", "600"], timeout=0.2)
    assert vm.run(["echo", "still here"]).stdout == "still here\n"


def test_popen_line_by_line(vm):
    with vm.popen("while read line; do echo got $line; done", stdin=True) as process:
        for word in ("one", "two"):
            process.stdin.write(word + "\n")
            assert process.stdout.readline() == f"got {word}\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.stdout.read() == ""
        assert process.wait(60) == 0
        assert process.poll() == 0


def test_popen_bytes(vm):
    with vm.popen(["cat"], stdin=True, text=False) as process:
        process.stdin.write(b"\x00\xff")
        process.stdin.close()
        assert process.stdout.read() == b"\x00\xff"


def test_waiting_with_a_timeout(vm):
    with vm.popen(["sleep", "600"]) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM
        process.kill()  # it has ended: nothing happens


def test_leaving_the_block_ends_the_command(vm):
    with vm.popen(["sleep", "600"]) as process:
        assert vm.path(f"/proc/{process.pid}").exists()
    vm.wait_until_succeeds(["test", "!", "-e", f"/proc/{process.pid}"], timeout=60)


def test_leaving_the_block_while_output_pours(vm):
    for _ in range(5):
        with vm.popen("cat /dev/zero & cat /dev/zero >&2") as process:
            process.stdout.read(10)
    assert vm.run(["echo", "fine"]).stdout == "fine\n"


def test_communicate(vm):
    with vm.popen("cat; echo err >&2", stdin=True) as process:
        assert process.communicate("in", timeout=60) == ("in", "err\n")
        assert process.returncode == 0


def test_signals(vm):
    with vm.popen("trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.1; done") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "caught\n"
        assert process.wait(60) == 5


def test_what_a_command_leaves_running_does_not_hold_it_up(vm, place):
    """It goes on, and may print: nobody reads that, but the pipe stays open."""
    late = f"(while [ ! -e {place}/go ]; do sleep 0.1; done; echo late && echo alive >{place}/alive) &"
    with vm.popen(f"{late} head -c 200000 /dev/zero | tr '\\0' x; echo early") as process:
        assert process.stdout.read() == "x" * 200_000 + "early\n"
        assert process.wait(60) == 0
    (place / "go").write_text("")
    assert vm.wait_until_succeeds(["cat", str(place / "alive")], timeout=60).stdout == "alive\n"


def test_nor_does_it_on_a_terminal(vm):
    with vm.popen("sleep 1000 & echo early", pty=(24, 80)) as process:
        assert process.stdout.read() == "early\n"
        assert process.wait(60) == 0


def test_many_at_once(vm):
    processes = [vm.popen(["sh", "-c", f"sleep 0.2; echo {n}"]) for n in range(20)]
    assert [process.communicate(timeout=60)[0] for process in processes] == [f"{n}\n" for n in range(20)]


def test_from_several_threads(vm):
    results = {}

    def work(number):
        results[number] = vm.run(["echo", str(number)]).stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: f"{number}\n" for number in range(8)}


def test_a_terminal(vm):
    with vm.popen('tty; stty size; read x; echo "got $x"', pty=(24, 81)) as process:
        assert process.stderr is None
        assert process.stdout.readline().startswith("/dev/pts/")
        assert process.stdout.readline().strip() == "24 81"
        process.stdin.write("hello\n")
        assert process.stdout.readline().strip() == "hello"  # the terminal's echo
        assert process.stdout.readline().strip() == "got hello"
        assert process.wait(60) == 0
        assert process.stdout.read() == ""


def test_a_terminal_changes_its_size(vm):
    with vm.popen(
        "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.1; done", pty=(24, 80)
    ) as process:
        assert process.stdout.readline().strip() == "ready"
        process.resize(50, 132)
        assert process.stdout.readline().strip() == "50 132"


def test_a_terminals_stdin_can_be_closed_while_output_goes_on(vm):
    with vm.popen("read x; echo one; sleep 0.3; echo two", pty=(24, 80)) as process:
        process.stdin.write("\n")
        process.stdin.close()
        text = process.stdout.read()
    assert text.split() == ["one", "two"]


def test_a_terminal_takes_much_input(vm):
    """More than its buffer of 4 KiB: what does not fit has to wait until there is room."""
    lines = 3000
    with vm.popen("stty -echo; echo ready; wc -l", pty=(24, 80)) as process:
        assert process.stdout.readline().strip() == "ready"
        process.stdin.write("0123456789\n" * lines + "\x04")
        assert process.stdout.readline().strip() == str(lines)


def test_a_terminal_is_hung_up_when_it_is_left(vm):
    for _ in range(3):
        with vm.popen("while :; do echo noise; done", pty=(24, 80)) as process:
            process.stdout.readline()
        vm.wait_until_succeeds(["test", "!", "-e", f"/proc/{process.pid}"], timeout=60)
    assert vm.run(["echo", "fine"]).stdout == "fine\n"


def test_communicating_with_a_terminal(vm):
    with vm.popen('read x; echo "[$x]"', pty=(24, 80)) as process:
        out, err = process.communicate("hi\n", timeout=60)
    assert "[hi]" in out
    assert err is None


def test_wait_until_succeeds(vm, place):
    vm.popen(f"sleep 0.5; touch {place}/ready").wait(60)
    assert vm.wait_until_succeeds(["test", "-e", f"{place}/ready"], timeout=60).returncode == 0
    begin = time.monotonic()
    vm.run("echo no")
    enough = max(0.5, 20 * (time.monotonic() - begin))  # for one try at least, on a busy computer as well
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        vm.wait_until_succeeds("echo no; exit 1", timeout=enough)
    assert caught.value.stdout == "no\n"


def test_the_agent_keeps_nothing_of_commands_that_are_over(vm, kind):
    """Neither descriptors nor what it knew of them."""
    agent = "1" if kind == "vm" else str(vm.instance.vmm.pid)

    def held():
        count = int(vm.run(f"ls /proc/{agent}/fd | wc -l").stdout)
        pages = int(vm.run(["cat", f"/proc/{agent}/statm"]).stdout.split()[1])
        return count, pages

    def work(times):
        for number in range(times):
            vm.run("cat; echo err >&2", input="x" * 1000)
            if number % 10 == 0:
                with vm.popen(["cat"], pty=(24, 80)):
                    pass

    work(50 if kind == "local" else 10)
    before, pages_before = held()
    work(400 if kind == "local" else 40)  # a VM under emulation takes its time
    deadline = time.monotonic() + guards.PROCESS
    while (after := held())[0] > before and time.monotonic() < deadline:
        pass  # the agent may still be closing what the last command had
    assert after[0] <= before
    assert (after[1] - pages_before) * 4096 < 300_000


def test_the_last_commands_are_known(vm):
    vm.run(["echo", "a b"])
    vm.run("exit 1")
    assert list(vm.last_commands)[-2:] == ["echo a b", "exit 1"]


def test_after_the_end(new_machine):
    machine = new_machine()
    process = machine.popen(["sleep", "600"])
    machine.close()
    machine.close()
    with pytest.raises(UsageError, match="has been closed"):
        machine.run(["true"])
    with pytest.raises(MachineCrashed):
        process.wait(60)


def test_a_machine_that_dies_under_a_command(new_machine):
    machine = new_machine()
    with machine.popen(["sleep", "600"]) as process:  # leaving the block of a dead machine's command is quiet
        machine.instance.vmm._process.kill()
        with pytest.raises(MachineCrashed, match=f"machine {machine.id} ended: "):
            process.wait(60)
        with pytest.raises(MachineCrashed, match=f"machine {machine.id} ended: "):
            process.stdout.read()
    with pytest.raises(MachineCrashed, match=f"machine {machine.id} ended: "):
        machine.run(["true"])
    with pytest.raises(MachineCrashed, match=f"machine {machine.id} ended: "):
        machine.path("/etc").exists()
