"""Plug-ins that many people use do in machines what they do natively, or say that they cannot."""

import html
import json
import os
import re

import pytest

from support.comparison import only_locally

pytestmark = only_locally
CI_VARIABLES = (
    "CI",
    "bamboo.buildKey",
    "BUILD_ID",
    "BUILD_NUMBER",
    "BUILDKITE",
    "CIRCLECI",
    "CONTINUOUS_INTEGRATION",
    "GITHUB_ACTIONS",
    "TRAVIS",
)
QUIET = ("-p", "no:hypothesispytest", "-p", "no:cacheprovider", "-p", "no:randomly")
REPORTS = """
    def test_html_extra(extras):
        import pytest_html
        extras.append(pytest_html.extras.text("EXTRA TEXT", name="note"))

    def test_benchmark(benchmark):
        assert benchmark(lambda: 1 + 1) == 2

    def test_allure():
        import allure
        with allure.step("STEP ONE"):
            allure.attach("ATTACHED", name="a", attachment_type=allure.attachment_type.TEXT)

    def test_fails():
        assert 0
"""


class WithPlugins:
    """A project that is run by the Python that has the plug-ins.

    Args:
        project: The project.
        python: The Python.
    """

    def __init__(self, project, python):
        self.path, self.write = project.path, project.write
        self._run = project.run
        self._command = [python, "-m", "pytest"]

    def native(self, *arguments, quiet=QUIET):
        return self._run(*self._command, *quiet, *arguments)

    def microvm(self, *arguments, quiet=QUIET):
        backend = ["--microvm", "-p", "support.local.backend"]
        return self._run(*self._command, *backend, *quiet, *arguments)


@pytest.fixture
def with_plugins(project, plugin_python, monkeypatch):
    monkeypatch.setenv("LOCAL_PYTHON", str(plugin_python))
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)  # of these tests' own workers
    for name in CI_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return WithPlugins(project, plugin_python)


def html_extras(path):
    blob = html.unescape(re.search(r'data-jsonblob="([^"]*)"', path.read_text())[1])
    tests = json.loads(blob)["tests"]
    return {name: [row["extras"] for row in rows] for name, rows in tests.items()}


def allure_results(folder):
    """Return what each test's result says, without times and random names."""
    found = {}
    for path in folder.glob("*-result.json"):
        result = json.loads(path.read_text())
        labels = {label["name"]: label["value"] for label in result["labels"]}
        steps = [
            (step["name"], step["status"], [each["name"] for each in step.get("attachments", [])])
            for step in result.get("steps", [])
        ]
        found[result["fullName"]] = (result["status"], steps, labels["suite"])
    assert found
    return found


@pytest.mark.parametrize("isolation", ["test", "session"])
def test_reports(with_plugins, isolation):
    with_plugins.write(test_reports=REPORTS)
    seen = {}
    for name, run, options in (
        ("native", with_plugins.native, []),
        ("machines", with_plugins.microvm, [f"--microvm-isolation={isolation}"]),
    ):
        files = [f"--html={name}.html", f"--alluredir={name}", f"--benchmark-json={name}.json"]
        result = run("--self-contained-html", *files, *options)
        assert result.ret == 1
        seen[name] = (
            html_extras(with_plugins.path / f"{name}.html"),
            allure_results(with_plugins.path / name),
        )
        if name == "native" or isolation == "session":
            (benchmark,) = json.loads((with_plugins.path / f"{name}.json").read_text())["benchmarks"]
            assert benchmark["fullname"] == "test_reports.py::test_benchmark"
            assert any(line.startswith("test_benchmark ") for line in result.outlines)
            assert f"Wrote benchmark data in: {name}.json" in result.outlines + result.errlines
        else:
            result.stdout.fnmatch_lines(["microvm: pytest-benchmark *use --microvm-isolation=session"])
            assert not (with_plugins.path / f"{name}.json").exists()
    assert seen["machines"] == seen["native"]


def test_snapshots(with_plugins):
    with_plugins.write(
        test_s="""
            def test_one(snapshot): assert {"a": 1} == snapshot
            def test_two(snapshot): assert [1] == snapshot
        """
    )
    file = with_plugins.path / "__snapshots__" / "test_s.ambr"
    native = with_plugins.native("--snapshot-update")
    expected = file.read_text()
    file.unlink()
    result = with_plugins.microvm("--snapshot-update")
    assert (result.ret, file.read_text()) == (native.ret, expected)
    assert "2 snapshots generated." in result.outlines
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    file.write_text(expected.replace("'a': 1", "'a': 2"))
    for run in (with_plugins.native, with_plugins.microvm):
        result = run()
        assert result.ret == 1
        assert "1 snapshot failed. 1 snapshot passed." in result.outlines


INLINE_SNAPSHOTS = """
    from inline_snapshot import snapshot

    def test_wrong():
        assert 1 + 1 == snapshot(3)

    def test_missing():
        assert {"a": [1, 2]} == snapshot()
"""


def test_inline_snapshots_are_rewritten_as_natively(with_plugins):
    file = with_plugins.path / "test_i.py"
    options = ["--inline-snapshot=create,fix"]
    seen = []
    for run, more in ((with_plugins.native, []), (with_plugins.microvm, ["--microvm-isolation=session"])):
        with_plugins.write(test_i=INLINE_SNAPSHOTS)
        first, second = run(*options, *more), run(*more)
        seen.append((first.ret, first.parseoutcomes(), second.ret, file.read_text()))
    assert seen[0] == seen[1]
    assert "snapshot(2)" in seen[0][3]
    assert "snapshot({'a': [1, 2]})" in seen[0][3].replace('"', "'")


def test_inline_snapshots_without_one_process_are_announced(with_plugins):
    with_plugins.write(test_i=INLINE_SNAPSHOTS)
    result = with_plugins.microvm()
    result.stdout.fnmatch_lines(["microvm: inline-snapshot *use --microvm-isolation=session"])


def test_inline_snapshots_in_a_ci_system_are_only_compared(with_plugins, monkeypatch):
    """inline-snapshot turns itself off there, and then nothing of it is lost in machines."""
    monkeypatch.setenv("CI", "true")
    with_plugins.write(test_i=INLINE_SNAPSHOTS)
    native, machines = with_plugins.native(), with_plugins.microvm()
    assert (machines.ret, machines.parseoutcomes()) == (native.ret, native.parseoutcomes())
    machines.stdout.no_fnmatch_line("*use --microvm-isolation=session*")


@pytest.mark.parametrize("how", ["absolute", "relative"])
def test_reports_outside_the_project(with_plugins, tmp_path_factory, how):
    """Natively and in machines they are where the command line says."""
    with_plugins.write(test_reports=REPORTS)
    above = tmp_path_factory.mktemp("reports")
    (with_plugins.path / "cov").mkdir()
    seen = []
    for name, run, options in (
        ("native", with_plugins.native, []),
        ("machines", with_plugins.microvm, ["--microvm-isolation=session"]),
    ):
        folder = above / name
        folder.mkdir()
        shown = folder if how == "absolute" else os.path.relpath(folder, with_plugins.path)
        run(
            *(f"--html={shown}/html/report.html", f"--alluredir={shown}/allure", "--cov=test_reports"),
            *(f"--benchmark-json={shown}/benchmark.json", f"--cov-report=xml:{shown}/cov.xml"),
            *("--cov-report", f"html:{shown}/htmlcov", f"--junitxml={shown}/junit.xml", *options),
        )
        assert allure_results(folder / "allure")
        html_extras(folder / "html" / "report.html")
        json.loads((folder / "benchmark.json").read_text())
        names = {path.name for path in folder.iterdir()} | {
            path.name for path in (folder / "htmlcov").iterdir() if path.suffix == ".html"
        }
        seen.append(names)
    assert seen[0] == seen[1]
    assert len(seen[0]) > 6


def test_dependent_tests(with_plugins):
    with_plugins.write(
        test_d="""
            import pytest
            @pytest.mark.dependency()
            def test_first(): pass
            @pytest.mark.dependency(depends=["test_first"])
            def test_second(): pass
        """
    )
    assert with_plugins.native().ret == 0
    result = with_plugins.microvm("--microvm-isolation=module")
    result.assert_outcomes(passed=2)
    assert "pytest-dependency" not in result.stdout.str()
    result = with_plugins.microvm()
    result.stdout.fnmatch_lines(["microvm: pytest-dependency *use --microvm-isolation=module"])


def test_tests_that_are_run_again(with_plugins):
    with_plugins.write(
        test_r="""
            from pathlib import Path
            def test_flaky():
                seen = Path("seen")
                again = seen.exists()
                seen.touch()
                assert again
        """
    )
    lines = []
    for run in (with_plugins.native, with_plugins.microvm):
        result = run("--reruns=2", "-rR")
        assert result.ret == 0
        lines.append([line for line in result.outlines if line.startswith("RERUN")])
        (with_plugins.path / "seen").unlink()
    assert lines[0] == lines[1] == ["RERUN test_r.py::test_flaky"]


def test_random_order_is_the_native_one(with_plugins):
    with_plugins.write(test_o="".join(f"def test_{number}(): pass\n" for number in range(8)))
    orders = []
    for run in (with_plugins.native, with_plugins.microvm):
        result = run("--randomly-seed=7", "-v", quiet=QUIET[:-2])
        orders.append([line.split()[0] for line in result.outlines if "::test_" in line])
    assert orders[0] == orders[1]
    assert orders[0] != sorted(orders[0])
