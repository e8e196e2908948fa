"""A test that turns on its own runner harms nobody else: the right outcome, and files that can be read."""

import xml.etree.ElementTree as ET

ATTACKS = r"""
    import gc, os, struct, sys, time
    import pytest

    # What root in a machine can do anyway, done from within: take the runner's end of the channel.

    def port():
        found = next(it for it in gc.get_objects() if type(it).__name__ == "Port" and hasattr(it, "channel"))
        os.set_blocking(found.fd, True)  # all of an attack is sent
        return found

    def stay():
        time.sleep(600)  # until the host has ended this machine

    def change_reports(change):
        gc.unfreeze()
        name = "pytest_microvm.guest.runner_session"  # which the runner keeps out of sys.modules
        session = next(it for it in gc.get_objects() if isinstance(it, dict) and it.get("__name__") == name)
        honest = session["report_record"]
        def forged(config, report):
            record = honest(config, report)
            return change(record) or record
        session["report_record"] = forged

    def test_before(): pass
    def test_garbage():
        os.write(port().fd, b"\xff" * 100)
        stay()
    def test_answer_nobody_asked_for():
        here = port()
        here.channel.send({"id": 99, "result": {}})
        here.flush()
        stay()
    def test_more_than_was_granted():
        while True:
            os.write(port().fd, struct.pack("!BII", 3, 1, 60000) + b"x" * 60000)
    def test_deep_message():
        body = b"[" * 500000
        os.write(port().fd, struct.pack("!BII", 2, 0, len(body)) + body)
        stay()
    def test_about_another():
        change_reports(lambda record: record["data"].update(nodeid="test_it.py::test_after"))
    def test_without_reports():
        change_reports(lambda record: record["data"].update(outcome="rerun"))
    def test_strange_values():
        change_reports(lambda record: record["data"].update(sections=[[1, 2]]))
    def test_strange_kind():
        change_reports(lambda record: record.update(k=["x"]))
    def test_strange_text(record_property):
        record_property("microvm.outcome", "passed")
        record_property("\ufffe\ud800\x1b[2J", "\ufffe\ud800\x1b[2J")
        change_reports(lambda record: record["data"].update(longrepr=
            "reprcrash reprtraceback \ud800\x00\x1b]0;t\x07\u202e\n::error::x ##[error]x\u2028::error"))
        assert 0
    def test_after(): pass
"""

CRASHED = ["test_garbage", "test_answer_nobody_asked_for", "test_more_than_was_granted", "test_deep_message",
           "test_about_another", "test_without_reports", "test_strange_values",
           "test_strange_kind"]  # fmt: skip


def test_attacks_on_the_host(project):
    project.write(test_it=ATTACKS)
    result = project.microvm("-v", "--junitxml=out.xml", "--microvm-timeout=120")
    text = result.stdout.str()
    assert "INTERNALERROR" not in text
    result.assert_outcomes(passed=2, failed=len(CRASHED) + 1)
    assert not [line for line in text.splitlines() if line.lstrip().startswith("::") or "##[" in line]
    assert not set(text) & set("\x00\x07\x1b\u202e\u2028\ud800")
    cases = {case.get("name"): case for case in ET.parse(project.path / "out.xml").iter("testcase")}  # noqa: S314
    assert list(cases) == ["test_before", *CRASHED, "test_strange_text", "test_after"]
    for name, case in cases.items():
        outcomes = [
            prop.get("value") for prop in case.iter("property") if prop.get("name") == "microvm.outcome"
        ]
        expected = {"crashed" if name in CRASHED else "failed" if name == "test_strange_text" else "passed"}
        if name == "test_more_than_was_granted":
            expected.add("quota")  # if the host always grants more in time, until the test has sent too much
        assert set(outcomes) <= expected, name
        assert len(set(outcomes)) == 1, name
