"""Jobs on a cluster: a scheduler and workers as processes of their own, with TLS, on this computer.

The second worker has a cache of its own, as another computer would: it fetches images by digest.
"""

from __future__ import annotations

import gc
import io
import json
import os
import queue
import re
import secrets
import signal
import subprocess
import sys
import tarfile
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import psutil
import pytest
import trustme
from junitparser import JUnitXml

from pytest_microvm.ci.cluster.connection import Certificates
from pytest_microvm.ci.cluster.executor import DaskExecutor
from pytest_microvm.ci.definition.job import GrantedSecret, Job, Step
from pytest_microvm.ci.definition.task import Source, Task
from pytest_microvm.ci.running.executor import Work
from pytest_microvm.ci.sources.tar_tree import TarTree
from pytest_microvm.errors import HostError
from pytest_microvm.images.store import cache_root
from pytest_microvm.settings.secret_values import parse_secrets
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.templates.store import TemplateStore
from support import guards
from support.branches import SUITES, TESTS, VERDICTS, Branches, together
from support.commands import MICROVM
from support.repositories import git

pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning"
)  # of Dask's, when its peer is killed
DASK = [sys.executable, "-m", "distributed.cli.dask_scheduler"]


class Process:
    """A program whose lines are waited for."""

    def __init__(self, command, **options):
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
        )
        self.pid = self.process.pid
        self.said = []
        self._lines = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def await_line(self, pattern):
        while (line := self._lines.get(timeout=guards.MACHINE)) is not None:
            self.said.append(line)
            if found := re.search(pattern, line):
                return found
        pytest.fail(f"it ended without {pattern!r}:\n{''.join(self.said)}")

    def machines(self):
        """Return the hypervisors that it runs now."""
        children = psutil.Process(self.pid).children(recursive=True)
        return [child for child in children if "qemu-system" in "".join(child.cmdline()[:1])]

    def end(self, how=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(guards.MACHINE)

    def close(self):
        self.end(signal.SIGKILL)
        self._reader.join()
        self.process.stdout.close()


class Cluster:
    """A scheduler with TLS, and workers that tests start and end."""

    def __init__(self, folder, caches, stack):
        self._caches = caches
        self._stack = stack
        self.workers = {}
        authority = trustme.CA()
        self.certificates = write_certificates(folder / "own", authority)
        self.strangers = write_certificates(folder / "stranger", trustme.CA())
        command = [
            *DASK,
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--protocol",
            "tls",
            *self._tls("--tls-ca-file"),
        ]
        command += ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
        env = {**os.environ, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
        self.scheduler = Process(command, env=env)
        stack.callback(self.scheduler.close)
        self.address = self.scheduler.await_line(r"Scheduler at:\s+(tls://\S+)")[1]

    def _tls(self, ca="--tls-ca"):
        names = self.certificates
        return [ca, names.ca, "--tls-cert", names.cert, "--tls-key", names.key]

    def have(self, *names):
        """Start the workers that are missing, and end those that are not named."""
        for name, worker in self.workers.items():
            if name not in names:
                worker.end()
        for name in names:
            if name not in self.workers or self.workers[name].process.poll() is not None:
                self._start_worker(name)

    def _start_worker(self, name):
        options = ["--slots", "1", "--name", name, *self._tls()]
        env = {**os.environ, "PYTEST_MICROVM_CACHE": str(self._caches[name])}
        worker = Process([*MICROVM, "ci", "worker", self.address, *options], env=env)
        self._stack.callback(worker.close)
        worker.await_line("connected to")
        self.workers[name] = worker


def write_certificates(folder, authority):
    folder.mkdir()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    names = Certificates(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    authority.cert_pem.write_to_path(names.ca)
    issued.cert_chain_pems[0].write_to_path(names.cert)
    issued.private_key_pem.write_to_path(names.key)
    return names


@pytest.fixture(scope="module")
def other_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("other-host")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, other_cache):
    with ExitStack() as stack:
        caches = {"one": cache_root(), "two": other_cache}
        yield Cluster(tmp_path_factory.mktemp("cluster"), caches, stack)


class Recorder:
    """A watcher that is asked, and waited for."""

    def __init__(self):
        self.told = []
        self._more = threading.Condition()

    def _add(self, *what):
        with self._more:
            self.told.append(what)
            self._more.notify_all()

    def began(self, plan):
        pass

    def phase(self, task, phase):
        self._add(task.id, phase)

    def line(self, task, text):
        self._add(task.id, text)

    def done(self, task, result):
        pass

    def ended(self, run):
        pass

    def wait(self, number, *what):
        """Wait until it was told something for the ``number``-th time."""
        with self._more:
            assert self._more.wait_for(lambda: self.told.count(what) >= number, guards.MACHINE), self.told


class Archive:
    """The sources of every task: one file."""

    def __init__(self, folder):
        self._path = folder / "sources.tar"
        with tarfile.open(self._path, "w") as archive:
            member = tarfile.TarInfo("hello.txt")
            member.size = 6
            archive.addfile(member, io.BytesIO(b"hello\n"))

    def tree(self, _source):
        return TarTree(self._path)

    def bundle(self, _source):
        pytest.fail("no job asks for history")


@contextmanager
def executor(host, cluster, folder, **options):
    watcher = Recorder()
    work = Work(Archive(folder), folder / "out", watcher, "repository", "main")
    options = {"scheduler": cluster.address, "certificates": cluster.certificates, **options}
    running = DaskExecutor(host, work, 4, **options)
    try:
        yield running, watcher
    finally:
        running.close()


def task(name, *steps, **changes):
    job = Job("unit", "unit", tuple(Step(step, step[:20]) for step in steps), spec=MachineSpec(image="base"))
    return Task(name, Source("main", "c" * 40, default=True), replace(job, **changes))


@pytest.fixture(autouse=True)
def _collected():
    """Have what a lost connection leaves collected within its own test, where its warnings are ignored."""
    yield
    gc.collect()


def test_jobs_run_where_there_is_room_and_images_come_by_digest(host, cluster, other_cache, tmp_path):
    cluster.have("one", "two")
    command = "cat hello.txt; echo made > made.txt; printf '::error::x\\033[2J\\n'"
    tasks = [task(f"task-{number}", command, "exit 3", artifacts=("*.txt",)) for number in range(2)]
    with executor(host, cluster, tmp_path) as (running, watcher):
        results = [future.result(guards.MACHINE) for future in [running.submit(one) for one in tasks]]
    assert [result.verdict for result in results] == ["failed", "failed"]
    assert {result.worker for result in results} == {"one", "two"}  # each has one slot
    assert [result.lost_workers for result in results] == [0, 0]
    for result in results:
        folder = tmp_path / "out" / result.id
        assert result.reason == "step 'exit 3' ended with status 3"
        assert sorted(result.artifacts) == [f"{result.id}/artifacts/{n}.txt" for n in ("hello", "made")]
        assert (folder / "artifacts/made.txt").read_text() == "made\n"
        log = (folder / "log.txt").read_text()
        assert log.startswith("$ cat hello.txt")
        assert "\x1b[2J" not in log
        assert (folder / "machine.json").exists()
        assert {(result.id, "run"), (result.id, "hello")} <= set(watcher.told)
        assert result.machine["image_digest"] == host.images.get("base").digest
    store = other_cache / "images"
    assert [path.stem for path in store.glob("manifests/*")] == [results[0].machine["image_digest"]]
    assert not (store / "artifacts").exists()  # nothing was built there


@pytest.mark.thorough
def test_prepared_templates_come_from_the_worker_that_has_them(host, cluster, other_cache, tmp_path):
    prepare = ("head -c 16 /dev/urandom | base64 > /made",)

    def preparing(name):
        return task(name, "cat /made", "sleep 3", prepare=prepare, env=(("RUN", str(tmp_path)),))

    cluster.have("one")
    with executor(host, cluster, tmp_path) as (running, watcher):
        assert running.submit(preparing("first")).result(guards.MACHINE).verdict == "passed"
        made = watcher.told[watcher.told.index(("first", "$ cat /made")) + 1]
        cluster.have("one", "two")
        later = [running.submit(preparing(name)) for name in ("second", "third")]
        results = [future.result(guards.MACHINE) for future in later]
    assert {result.worker for result in results} == {"one", "two"}
    for result in results:
        assert watcher.told.count((result.id, made[1])) == 1  # what was random is the same on both
    assert "prepared" in {entry.kind for entry in TemplateStore(other_cache, 10 * 1024**3).list()}


def hanging(tmp_path, name="task"):
    """Return a task that hangs for as long as a file of the host says so; its machine is given the file."""
    (tmp_path / "what").write_text("sleep 100000")
    secret = GrantedSecret(parse_secrets({"WHAT": {"file": str(tmp_path / "what")}}, "test")[0])
    return task(name, "echo begun", "cat hello.txt > taken.txt", 'eval "$WHAT"',
                secrets=(secret,), artifacts=("taken.txt",))  # fmt: skip


def begun_on(running, future):
    """Return the name of the worker that a task runs on."""
    assert not future.done()
    (hosts,) = running._began.values()
    return hosts[-1]


def test_a_lost_workers_job_is_done_again_once_and_marked(host, cluster, tmp_path):
    cluster.have("one", "two")
    with executor(host, cluster, tmp_path) as (running, watcher):
        future = running.submit(hanging(tmp_path))
        watcher.wait(1, "task", "begun")
        (tmp_path / "what").write_text("true")
        lost = begun_on(running, future)
        machines = cluster.workers[lost].machines()
        assert len(machines) == 1
        cluster.workers[lost].end(signal.SIGKILL)
        _gone, alive = psutil.wait_procs(machines, timeout=guards.MACHINE)
        assert alive == []  # its machines end with it
        result = future.result(guards.MACHINE)
    assert (result.verdict, result.lost_workers, result.worker != lost) == ("passed", 1, True)
    assert any(text.startswith(f"infra: worker {lost} was lost") for _id, text in watcher.told)


def test_a_job_that_loses_two_workers_is_given_up(host, cluster, tmp_path):
    cluster.have("one", "two")
    with executor(host, cluster, tmp_path) as (running, watcher):
        future = running.submit(hanging(tmp_path))
        for number in (1, 2):
            watcher.wait(number, "task", "begun")
            cluster.workers[begun_on(running, future)].end(signal.SIGKILL)
        result = future.result(guards.MACHINE)
    assert (result.verdict, result.lost_workers) == ("infra", 2)
    assert result.reason.startswith("2 workers were lost while they did it: ")


def test_cancelled_task_ends_its_machine_and_returns_artifacts(host, cluster, tmp_path):
    cluster.have("one")
    with executor(host, cluster, tmp_path) as (running, watcher):
        future = running.submit(hanging(tmp_path))
        watcher.wait(1, "task", '$ eval "$WHAT"')
        waiting = running.submit(task("waiting", "true"))  # there is one slot, and it is taken
        machines = cluster.workers["one"].machines()
        running.cancel()
        results = [future.result(guards.MACHINE), waiting.result(guards.MACHINE)]
        assert psutil.wait_procs(machines, timeout=guards.MACHINE)[1] == []
    assert [result.verdict for result in results] == ["cancelled", "cancelled"]
    assert (tmp_path / "out/task/artifacts/taken.txt").read_text() == "hello\n"


def test_who_submits_a_run_and_dies_leaves_no_machine(cluster, tmp_path):
    cluster.have("one")
    (tmp_path / "microvm.toml").write_text(
        '[ci.jobs.unit]\nimage = "base"\nsteps = ["echo begun; sleep 10000"]\n'
    )
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    names = cluster.certificates
    command = [*MICROVM, "ci", "run", "--executor", "dask", "--scheduler", cluster.address, "--plain"]
    command += ["--tls-ca", names.ca, "--tls-cert", names.cert, "--tls-key", names.key]
    run = Process(command, cwd=tmp_path)
    try:
        run.await_line(r"^\[main / unit\] begun")
        machines = cluster.workers["one"].machines()
        assert len(machines) == 1
    finally:
        run.close()
    assert psutil.wait_procs(machines, timeout=guards.MACHINE)[1] == []


def test_a_worker_that_is_ended_gives_its_job_to_another(host, cluster, tmp_path):
    cluster.have("one")
    with executor(host, cluster, tmp_path) as (running, watcher):
        future = running.submit(hanging(tmp_path))
        watcher.wait(1, "task", "begun")
        (tmp_path / "what").write_text("true")
        cluster.have("one", "two")
        assert cluster.workers["one"].end(signal.SIGTERM) == 0
        result = future.result(guards.MACHINE)
    assert (result.verdict, result.worker) == ("passed", "two")


def test_scheduler_death_ends_machines_and_fails_tasks_as_infra(host, tmp_path):
    with ExitStack() as stack:
        cluster = Cluster(tmp_path, {"one": cache_root()}, stack)
        cluster.have("one")
        with executor(host, cluster, tmp_path) as (running, watcher):
            future = running.submit(hanging(tmp_path))
            watcher.wait(1, "task", "begun")
            machines = cluster.workers["one"].machines()
            cluster.scheduler.end(signal.SIGKILL)
            results = [
                future.result(guards.MACHINE),
                running.submit(task("later", "true")).result(guards.MACHINE),
            ]
            assert psutil.wait_procs(machines, timeout=guards.MACHINE)[1] == []
        assert cluster.workers["one"].process.wait(guards.MACHINE) == 1  # systemd starts it again
    assert [result.verdict for result in results] == ["infra", "infra"]
    assert ["scheduler" in result.reason for result in results] == [True, True]


def test_a_stranger_is_refused(host, cluster, tmp_path):
    cluster.have("one")
    with (
        pytest.raises(HostError, match="does not answer"),
        executor(host, cluster, tmp_path, certificates=cluster.strangers),
    ):
        pytest.fail("the scheduler took a certificate of another authority")


def test_a_secret_that_a_worker_lacks_is_its_jobs_result(host, cluster, tmp_path):
    cluster.have("one")
    name = f"NOT_THERE_{secrets.token_hex(4)}"
    granted = GrantedSecret(parse_secrets({name: {"env": name}}, "test")[0])
    with executor(host, cluster, tmp_path) as (running, _watcher):
        result = running.submit(task("task", "true", secrets=(granted,))).result(guards.MACHINE)
    assert result.verdict == "failed"
    assert name in result.reason


@pytest.mark.parametrize("chosen", together())
def test_branches_of_strangers_on_a_cluster_of_the_runs_own(tmp_path, chosen):
    branches = Branches(tmp_path)
    command = [*MICROVM, "ci", "run", "--executor", "dask", "--jobs", "2"]
    command += [f"--branch={branch}" for branch in chosen]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")],
        cwd=branches.folder, env={**os.environ, "CI": "true"}, capture_output=True, timeout=guards.MACHINE,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {task["branch"]: task["verdict"] for task in results["tasks"]} == {
        branch: VERDICTS[branch] for branch in chosen
    }
    assert {task["worker"] for task in results["tasks"]} == {"0", "1"}
    tests = {task["branch"]: task["tests"] for task in results["tasks"]}
    counted = {branch: TESTS[branch] for branch in chosen if branch in TESTS}
    assert {branch: (tests[branch]["passed"], tests[branch]["failed"]) for branch in counted} == counted
    suites = JUnitXml.fromfile(str(tmp_path / "out/junit.xml"))
    assert {suite.name for suite in suites} == {suite for suite in SUITES if suite.split(" /")[0] in chosen}
    assert not branches.marker.exists()
    said = done.stdout + done.stderr
    assert b"forged" in said
    assert b"\x1b]0;" not in said
    assert not any(line.lstrip().startswith(b"::") for line in said.splitlines())
