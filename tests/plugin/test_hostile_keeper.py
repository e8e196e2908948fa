"""The machine whose wide fixtures stand turns on the host: a clear outcome, and the run goes on."""

import pytest

LIBRARY = r"""
    import gc, os, struct, sys, time

    def runner_plugin():
        gc.unfreeze()
        return next(it for it in gc.get_objects() if type(it).__name__ == "_SessionPlugin")

    def port():
        here = runner_plugin()._runner.port
        os.set_blocking(here.fd, True)  # all of an attack is sent
        return here

    def forge(number, change):
        "Let the keeper's answer of that number, counted from here, be what `change` makes of its records."
        runner = runner_plugin()._runner
        honest, seen = runner.send_lines, []
        def forged(stream, records):
            records = list(records)
            if "standing" in records[-1]:  # an answer of the keeper; no copy of it gives one
                seen.append(1)
                if len(seen) == number:
                    records = change(records)
            honest(stream, records)
        runner.send_lines = forged

    def end(**values):
        "Return a change of the last record."
        return lambda records: [*records[:-1], {**records[-1], **values}]

    def more(*added):
        "Return a change that puts records before the last one."
        return lambda records: [*records[:-1], *added, records[-1]]

    def raw(data):
        "Send bytes on the stream of the answer, in the place of its records."
        def change(records):
            here = port()
            stream = max(here.channel._streams)
            os.write(here.fd, struct.pack("!BII", 3, stream, len(data)) + data)
            time.sleep(600)
        return change

    def die(records):
        os._exit(3)

    def stay(records):
        time.sleep(600)

    REPORT = {"k": "report", "shown": False, "data": {
        "$report_type": "TestReport", "nodeid": "test_a.py::test_one", "when": "teardown",
        "outcome": "passed",
        "location": ["test_a.py", 1, "test_one"], "keywords": {}, "longrepr": None,
        "sections": [["Captured x", "y"]], "user_properties": [], "duration": 0.1, "start": 1.0, "stop": 1.1}}
    WARNING = {"k": "warning", "when": "runtest", "nodeid": "", "message": "m", "filename": "f",
               "category": ["Warning"], "lineno": 1, "line": "l"}
    EXIT = {"k": "exit", "code": 3, "reason": "exit", "text": "bye"}

    def report_of(**changes):
        nodeid = sys._getframe(1).f_globals["__name__"] + ".py::test_one"
        return {**REPORT, "data": {**REPORT["data"], "nodeid": nodeid, **changes}}

    def report(**changes):
        nodeid = sys._getframe(1).f_globals["__name__"] + ".py::test_one"
        return more(report_of(**{"nodeid": nodeid, **changes}))
"""
SUITE = """
    import pytest
    from attack import *

    @pytest.fixture(scope="module")
    def base():
        forge({number}, {change})
        yield 1

    def test_one(base): pass
"""
HONEST = """
    import pytest

    @pytest.fixture(scope="module")
    def good():
        yield 1
        print("torn down")

    def test_two(good): pass
    def test_three(): pass
"""

FIXTURE = "a number of a fixture that is not a number in its range"
TWICE = "a record of an unknown kind, or a second one"
ANSWERS = {
    "end(standing=None)": "a list of fixtures that is not a list",
    "end(standing=[-1])": FIXTURE,
    "end(standing=['x'])": FIXTURE,
    "end(standing=[10**400])": FIXTURE,
    "end(wide=None)": "a list of fixtures' times that is not a list",
    "end(wide=[[10**6, 1.0]])": FIXTURE,
    "end(wide=[['x', 1.0]])": FIXTURE,
    "end(wide=[[0]])": "a fixture's time without its two parts",
    "end(wide=[0])": "a fixture's time that is not a list",
    "end(written=7)": "a list of files that is not a list",
    "end(written=[7])": "a path that is not a text",
    "end(printed=['x'])": "a output that is not text",
    "lambda records: records[:-1]": "an answer without an end",
    "lambda records: [records[-1], records[-1]]": "a record after the end",
    "lambda records: [records[-1], WARNING]": "a record after the end",
    "more({'k': 'output', 'output': None})": TWICE,
    "more({'k': 'needs'})": TWICE,
    "more({'k': 'debug', 'socket': '/tmp/x'})": TWICE,
    "more({'k': ['x']})": "a record of an unknown kind",
    "more({'k': 'out', 'data': 7})": "output",
    "more({'k': 'log'})": "an unknown place",
    "more(EXIT, EXIT)": TWICE,
    "more({'k': 'coverage', 'told': []})": "coverage that nobody asked for",
    "more({**WARNING, 'lineno': 'x'})": "a line number that is not a number in its range",
    "more({**WARNING, 'category': 7})": "a warning category that is not a list",
    "more({'k': 'exit', 'code': 'x', 'reason': 'exit', 'text': ''})": "a exit code that is not a number",
    "more({'k': 'x' * 40_000_000})": "a record of more than 33554432 bytes",
    "more(*[WARNING] * 100_001)": "more than 100000 records",
    "more([[[]]] * 3)": "a record that is not a JSON object",
    "raw(b'[' * 60000 + b'\\n')": "a record that is not JSON",
    "die": "the machine ended",
}
"""What neither the answer to a set-up nor that to a tear-down may be, and what the user is told."""

SET_UPS = {
    **ANSWERS,
    "report()": "a report of a set-up",
    "report(outcome='failed', when='setup')": "a report of a set-up",
}
TEAR_DOWNS = {
    **ANSWERS,
    "report(nodeid='test_b.py::test_two')": "a report about another test",
    "report(nodeid=7)": "a report about another test",
    "report(when='call')": "a report about another phase",
    "report(when='call', outcome='failed')": "a report about another phase",
    "report(when='never')": "an unknown phase",
    "report(outcome='splen did')": "an unknown outcome",
    "report(sections=[['one']])": "a section without its two parts",
    "report(longrepr={'reprcrash': 1})": "a place that is not an object",
    "more(report_of(), report_of())": TWICE,
    "lambda records: end(temporary=7)(report(outcome='failed', longrepr='x')(records))": "temporary folders",
    "more({'k': 'report', 'data': []})": "a test report that is not an object",
}


@pytest.fixture
def attacked(project, monkeypatch):
    """Return a function that runs a suite: in each module the keeper forges an answer to its fixture."""
    monkeypatch.setenv("COLUMNS", "300")  # the short summary has whole lines

    def run(number, changes, *options):
        for place, change in enumerate(changes):
            project.write(**{f"test_{place:02}": SUITE.format(number=number, change=change)})
        project.write(attack=LIBRARY, test_last=HONEST)
        done = project.microvm("-v", "-rfE", "--microvm-fixtures=fork", "--microvm-timeout=60", *options)
        text = done.stdout.str() + done.stderr.str()
        assert "INTERNALERROR>" not in text
        assert "Traceback" not in text
        done.stdout.fnmatch_lines(["*::test_two PASSED*", "*::test_three PASSED*"])
        return done

    return run


def told(done, kind):
    """Return the line of the short summary about each of the modules."""
    found = (line.split(" ", 2) for line in done.outlines if line.startswith(f"{kind} test_"))
    return {place: text for _kind, place, text in found}


def test_answers_to_set_ups(attacked):
    done = attacked(1, SET_UPS)
    assert done.ret == 1
    done.assert_outcomes(passed=2, failed=len(SET_UPS))
    crashed = told(done, "CRASHED")
    for place, said in enumerate(SET_UPS.values()):
        assert said in crashed[f"test_{place:02}.py::test_one"]


def test_answers_to_tear_downs(attacked):
    done = attacked(2, TEAR_DOWNS)
    assert done.ret == 1
    done.assert_outcomes(passed=2 + len(TEAR_DOWNS), errors=len(TEAR_DOWNS))
    errors = told(done, "ERROR")
    for place, said in enumerate(TEAR_DOWNS.values()):
        text = errors[f"test_{place:02}.py::test_one"]
        assert "the machine of the fixtures: " in text
        assert said in text


@pytest.mark.parametrize(
    ("number", "outcomes"), [(1, {"failed": 1, "passed": 2}), (2, {"errors": 1, "passed": 3})]
)
def test_keeper_that_never_answers(attacked, number, outcomes):
    done = attacked(number, ["stay"], "--microvm-timeout=3")
    assert done.ret == 1
    done.assert_outcomes(**outcomes)
    done.stdout.fnmatch_lines("*timeout: limit 3 s, observed 3* s")


def test_answer_that_comes_too_late(project):
    """More of it comes when the next request is answered, on a stream that has ended."""
    project.write(
        attack=LIBRARY,
        test_a="""
            import pytest
            from attack import *

            @pytest.fixture(scope="module")
            def base():
                yield 1
                os.write(port().fd, struct.pack("!BII", 3, 1, 5) + b"late\\n")

            def test_one(base): pass
        """,
        test_b=HONEST,
    )
    done = project.microvm("-v", "--microvm-fixtures=fork")
    assert done.ret == 1
    done.assert_outcomes(passed=3, errors=1)
    done.stdout.fnmatch_lines("*the machine of the fixtures: *")


def test_keeper_that_dies_between_two_tests(project):
    project.write(
        test_a="""
            import os
            import signal
            import pytest

            @pytest.fixture(scope="module")
            def base():
                keeper = os.getpid()
                yield keeper

            def test_one(base): os.kill(base, signal.SIGKILL) if base != os.getpid() else None
        """,
        test_b=HONEST,
    )
    done = project.microvm("-v", "--microvm-fixtures=fork")
    assert done.ret == 1
    assert done.parseoutcomes()["passed"] == 3
    done.stdout.fnmatch_lines("*the machine of the fixtures: *")


def test_times_that_cannot_be(attacked):
    """What a keeper says of the time of a set-up is no more than the host has waited for it."""
    times = "[[0, 2.0**52]] * 1000 + [[0, 1e300], [0, float('nan')]]"
    done = attacked(1, [f"end(wide={times})"], "--durations=0", "-vv")
    assert done.ret == 0
    seconds = [line.split()[0] for line in done.outlines if line.endswith("setup    test_00.py::test_one")]
    assert seconds
    assert all(float(text.removesuffix("s")) < 60 for text in seconds)


@pytest.mark.parametrize("number", [1, 2])
def test_run_that_it_ends_is_not_green(project, number):
    project.write(attack=LIBRARY, test_a=SUITE.format(number=number, change="more({**EXIT, 'code': 0})"))
    done = project.microvm("-v", "--microvm-fixtures=fork")
    assert done.ret == pytest.ExitCode.INTERRUPTED
    done.stdout.fnmatch_lines("*Exit: bye*")


@pytest.mark.parametrize(
    ("number", "outcomes"), [(1, {"errors": 1, "passed": 2}), (2, {"errors": 1, "passed": 3})]
)
def test_internal_error_is_that_of_a_test(project, number, outcomes):
    project.write(
        attack=LIBRARY,
        test_a=SUITE.format(number=number, change="more({**EXIT, 'reason': 'internal', 'text': 'oops'})"),
        test_b=HONEST,
    )
    done = project.microvm("-v", "--microvm-fixtures=fork")
    assert done.ret == 1
    done.assert_outcomes(**outcomes)
    done.stdout.fnmatch_lines(["INTERNALERROR in the guest's pytest", "oops"])


def test_times_that_a_tests_own_machine_sends(project):
    """The keeper is innocent: it tears its fixtures down."""
    project.write(
        attack=LIBRARY.replace('"standing" in records[-1]', '"standing" not in records[-1]'),
        test_a="""
            import pytest
            from attack import *

            @pytest.fixture(scope="module")
            def base():
                yield 1
                print("torn down")
                raise OSError("stuck")

            def test_one(base): forge(1, end(wide=[[99, 1.0]]))
        """,
    )
    done = project.microvm("-v", "--microvm-fixtures=fork")
    done.assert_outcomes(passed=1, errors=1)
    done.stdout.fnmatch_lines(["*crashed: *fixture*", "*Tear-down of wider fixtures*", "*OSError: stuck*"])
