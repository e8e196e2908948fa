"""The agent at work: its branch, the log of what it asked of the network, and where its key is not."""

import base64
import os
import secrets
import shutil
import subprocess
from pathlib import Path

import pytest
from model_api import HOST, ModelApi

from pytest_microvm import MicroVM

EXAMPLE = Path(__file__).parents[1]
PIECE = 16 * 1024**2
WRITTEN = "tar -C / -c --exclude=run/microvm etc home mnt opt root run srv tmp var work"
"""What a machine may have written, and what it was given."""


def git(folder, *arguments):
    user = ["-c", "user.name=you", "-c", "user.email=you@example.invalid"]
    done = subprocess.run(
        ["git", "-C", folder, *user, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def files(folder):
    """Return the work tree, and what git knows of it: HEAD and the index."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != ".git"
    }
    return found | {name: (folder / ".git" / name).read_bytes() for name in ("HEAD", "index", "config")}


def forms(key):
    """Return the key as it is, and what any base64 of it has inside."""
    return [key.encode(), *(base64.b64encode(b"." * before + key.encode())[4:-4] for before in range(3))]


def found_in_memory(pid, wanted):
    """Search all memory of a process of this computer: that of a VMM is all of its machine's, too."""
    found = []
    process = Path("/proc", str(pid))
    with (process / "maps").open() as maps, (process / "mem").open("rb", buffering=0) as memory:
        for line in maps:
            span, rights, *_rest = line.split()
            start, end = (int(number, 16) for number in span.split("-"))
            if "r" not in rights or line.rstrip().endswith(("[vvar]", "[vsyscall]")):
                continue
            before = b""
            for place in range(start, end, PIECE):
                memory.seek(place)
                try:
                    data = before + memory.read(min(PIECE, end - place))
                except OSError:  # a page behind the end of its file
                    break
                found += [(hex(place), form) for form in wanted if form in data]
                before = data[-256:]
    return found


def own_text(name):
    """Return what the host's processes have in ``cmdline`` or ``environ``, with their ids."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield process.name, (process / name).read_bytes()
        except OSError:  # it has ended, or is another user's
            continue


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Let the agent do its work, and return what there is to look at."""
    folder = tmp_path_factory.mktemp("agent")
    repository = folder / "repository"
    shutil.copytree(EXAMPLE / "project", repository, ignore=shutil.ignore_patterns("__pycache__"))
    git(repository, "init", "-q", "-b", "main")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "As it was")
    (repository / "notes.txt").write_text("mine, not committed\n")
    before, key = files(repository), secrets.token_hex(24)
    (folder / "key").write_text(f"{key}\n")
    with ModelApi(key, folder) as api, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(api.certificates))
        credential = {"host": HOST, "value": {"file": str(folder / "key")}, "variable": "MODEL_API_KEY"}
        vm = MicroVM.start(
            image="agent",
            timeout=600,
            network=[f"POST https://{HOST}/v1/*"],
            hosts={HOST: api.address},
            credentials=[credential],
        )
        with vm:
            mounted = vm.mount(repository, "/code/repository", kind="git")
            vm.push(EXAMPLE / "agent.py", "/opt/agent.py")
            command = ["python3", "/opt/agent.py", "make the tests pass"]
            done = vm.run(command, cwd="/code/repository")
            changes = mounted.copy_back()
            yield vm, repository, before, key, done, changes, api


def test_it_did_its_work(work):
    _vm, _repository, _before, _key, done, _changes, api = work
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Done."
    results = api.heard[-1]["results"]
    assert "1 failed, 1 passed" in results[0]
    assert "2 passed" in results[4]


def test_its_commit_is_a_branch_to_be_reviewed(work):
    vm, repository, before, _key, _done, changes, _api = work
    assert changes.branch == f"microvm/{vm.id}"
    assert (changes.commits, changes.uncommitted) == (1, 0)
    assert changes.subjects == ("average() of no numbers is 0",)
    assert git(repository, "diff", "--name-only", "main", changes.branch) == "numbers_.py"
    assert "if numbers else 0" in git(repository, "show", f"{changes.branch}:numbers_.py")
    assert git(repository, "branch", "--show-current") == "main"
    assert files(repository) == before


def test_it_reached_the_api_and_nothing_else(work):
    vm, _repository, _before, _key, _done, _changes, api = work
    requests = [(each.allowed, each.method, each.host, each.path) for each in vm.network.requests]
    assert requests.count((True, "POST", HOST, "/v1/next")) == len(api.heard) == 7
    assert [(each.method, each.host) for each in vm.network.denied] == [("CONNECT", "paste.example")]


def test_the_key_is_not_in_the_machine(work):
    vm, _repository, _before, key, _done, _changes, api = work
    wanted = forms(key)
    processes = vm.run("cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline", text=False).stdout
    assert b"MODEL_API_KEY" in vm.run("cat /proc/self/environ", text=False).stdout  # a placeholder
    written = vm.run(WRITTEN, text=False).stdout
    assert b"urllib.request.urlopen" in written  # the agent itself
    assert [form for form in wanted if form in processes + written] == []
    assert found_in_memory(vm.instance.vmm.pid, wanted) == []
    assert found_in_memory(os.getpid(), [key.encode()])  # where it is: the search finds it
    assert key not in str(api.heard)


def test_the_key_is_in_nothing_that_is_left(work):
    vm, repository, _before, key, done, _changes, _api = work
    said = (
        done.stdout
        + done.stderr
        + vm.console_tail(1000)
        + "".join(map(str, vm.events))
        + str(vm.network.requests)
    )
    assert key not in said
    for form in forms(key):
        assert subprocess.run(["grep", "-rqF", form, repository], check=False).returncode == 1
    for name in ("cmdline", "environ"):
        assert [pid for pid, text in own_text(name) if key.encode() in text] == []
