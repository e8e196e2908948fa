"""The records of a run, and what the last machine may say and write."""

import contextlib
import json
import types

import pytest

from pytest_microvm.errors import MachineError, ProtocolViolation
from pytest_microvm.guest.runner_controller import decoded, encoded
from pytest_microvm.suite import ending
from pytest_microvm.suite.ending import Course, RunRecords, end_run
from pytest_microvm.suite.running import Ran
from pytest_microvm.suite.write_back import WriteBack
from pytest_microvm.suite.written_options import WantedFiles
from pytest_microvm.untrusted.redaction import Redactor


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        1,
        1.5,
        "text",
        b"bytes",
        [1, b"x"],
        (1, (2,)),
        {1, 2},
        frozenset([1]),
        {"a": {1: (b"",)}, 2: None},
    ],
)
def test_values_that_xdist_transfers(value):
    there = decoded(json.loads(json.dumps(encoded(value))))
    assert there == value
    assert type(there) is type(value)


def test_other_values_are_refused():
    with pytest.raises(TypeError, match="object cannot be transferred"):
        encoded({"a": [object()]})


def test_output_comes_after_the_reports_of_its_machine(tmp_path):
    records = RunRecords(tmp_path / "records")
    item = types.SimpleNamespace(nodeid="test_a.py::test", location=("test_a.py", 1, "test"), config=None)
    records.add_output("vm-1", {"k": "output", "output": {"$type": "dict", "value": []}})
    records.add_test(item, Ran(sent=[{"when": "call"}], facts=types.SimpleNamespace(id="vm-1")))
    records.add_output("vm-2", None)
    records.close()
    records.close()
    lines = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    assert [(line["k"], line["machine"]) for line in lines] == [
        ("test", "vm-1"),
        ("down", "vm-1"),
        ("down", "vm-2"),
    ]
    assert lines[0]["reports"] == [{"when": "call"}]
    assert lines[2]["output"] is None


class Link:
    """A link to a guest that answers every request with one record."""

    def __init__(self, answer):
        self.answer = answer
        self.number = 1
        self.sent = b""

    def open_stream(self):
        return self

    def call(self, op, **_request):
        assert op == "end"

    def write(self, data, timeout):
        self.sent += data

    def close(self):
        pass

    def read_all(self, limit, timeout):
        return json.dumps(self.answer).encode() + b"\n"


class LastMachine:
    """A last machine."""

    redactor = Redactor(["s3cr3t-value-of-a-user"])

    def __init__(self, answer):
        self.link = Link(answer)
        self.killed = False

    def close(self):
        self.killed = True


SAID = {
    "k": "ended",
    "status": 1,
    "loop": "x s3cr3t-value-of-a-user\n",
    "finish": "",
    "summary": "::error::\x1b]0;x\x07\n",
    "written": ["a\nb"],
}


def test_what_the_last_machine_says_is_made_safe(tmp_path):
    (tmp_path / "records").write_bytes(b"{}\n")
    machine = LastMachine(SAID)
    ended = end_run(machine, [tmp_path / "records"], Course(tests=1), width=80)
    assert machine.link.sent == b"{}\n"
    assert (ended.status, ended.loop) == (1, "x ***\n")
    assert "\x1b" not in ended.summary
    assert not ended.summary.startswith("::")


@pytest.fixture
def run_ended_by(tmp_path):
    """Return a function that makes the end of a run, with the given last machine."""

    def make(machine):
        folder = tmp_path / "records"
        folder.mkdir()
        workerinput = {"microvm_records": str(folder), "workerid": "gw0"}
        config = types.SimpleNamespace(workerinput=workerinput, pluginmanager=pytest.PytestPluginManager())
        files = WriteBack(config, tmp_path, WantedFiles((), (), while_running=False))
        return ending.Ending(config, lambda: contextlib.closing(machine), files, whole=False)

    return make


@pytest.mark.parametrize(
    "change",
    [
        {"status": "1"},
        {"status": 256},
        {"loop": 1},
        {"finish": []},
        {"summary": None},
        {"written": "a"},
        {"written": [1]},
        {"coverage": 1},
        {"coverage": [1]},
        {"coverage": [{}, {}]},
    ],
)
def test_malformed_answer_of_the_last_machine_ends_it(run_ended_by, change):
    machine = LastMachine({**SAID, **change})
    with pytest.raises(ProtocolViolation):
        run_ended_by(machine).finish(Course(tests=1))
    assert machine.killed


def test_records_of_a_run_are_limited(run_ended_by, tmp_path, monkeypatch):
    monkeypatch.setattr(ending, "_MAX_RECORDS_SIZE", 10)
    run = run_ended_by(LastMachine(SAID))
    for _ in range(3):
        run.records.add_output("vm-1", None)
        run.records._write_outputs()
    with pytest.raises(MachineError, match="the reports of this run take more than"):
        run.finish(Course(tests=1))
    assert (tmp_path / "records" / "records-gw0").read_text().count("\n") == 1
