"""The host's pytest imports nothing of the project, and stumbles over nothing that only the guest knows."""

import os
import textwrap

import pytest

# Written by any code of the project that runs outside a guest. The local guest sets the variable; in a
# machine the file would be written inside.
TRAP = """
    import os
    if "LOCAL_GUEST" not in os.environ:
        open({where!r}, "a").write(__name__ + "\\n")
"""


@pytest.fixture
def trap(project):
    """Code for every module of the project, and the file it writes on the host."""
    where = project.path.parent / f"{project.path.name}-trap"
    yield TRAP.format(where=str(where))
    assert not where.exists(), f"imported on the host: {where.read_text()}"


def test_conftest_tests_and_helpers_stay_in_the_guest(project, trap):
    project.write(
        pytest__DOT__ini="[pytest]\npythonpath = src\naddopts = --doctest-modules\n",
        conftest=trap + "    def pytest_configure(config): pass",
        sub__conftest=trap,
        src__helper_of_src=trap + "    class MyWarning(UserWarning): pass",
        test_one=trap + "    import helper_of_src\n    def test_one(): pass",
        sub__test_two=trap + "    def test_two(): pass",
        package____init__=trap,
        package__module=trap + "    '''>>> 1\n    1\n    '''",
    )
    result = project.microvm("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2)


@pytest.mark.skipif(pytest.version_tuple < (9, 2), reason="older pytest reads filters later")
def test_project_import_by_a_warning_filter_warns(project):
    """pytest 9.2 reads filters before it loads any plug-in."""
    project.write(
        pytest__DOT__ini="[pytest]\npythonpath = src\nfilterwarnings =\n    error::helper_of_src.MyWarning\n",
        src__helper_of_src="class MyWarning(UserWarning): pass",
        test_it="""
            import warnings, helper_of_src
            def test_it(): warnings.warn(helper_of_src.MyWarning("mine"))
        """,
    )
    result = project.microvm()
    result.assert_outcomes(failed=1, warnings=1)
    result.stdout.fnmatch_lines(["*pytest has imported helper_of_src on the host, outside any machine*"])


@pytest.mark.skipif(pytest.version_tuple < (9, 2), reason="older pytest refuses such a filter")
def test_a_warning_filter_the_host_cannot_resolve(project):
    project.write(
        pytest__DOT__ini="[pytest]\nfilterwarnings =\n    error::helper.MyWarning\n",
        conftest="import sys, os; sys.path.insert(0, os.path.join(os.path.dirname(__file__), 'src'))",
        src__helper="class MyWarning(UserWarning): pass",
        test_it="import warnings, helper\ndef test_it(): warnings.warn(helper.MyWarning('mine'))",
    )
    project.microvm().assert_outcomes(failed=1)


def test_pytest_plugins_variable_is_the_guests(project, trap, monkeypatch):
    monkeypatch.setenv("PYTEST_PLUGINS", "project_plugin")
    project.write(
        project_plugin=trap + "    import pytest\n    @pytest.fixture\n    def answer(): return 42",
        test_it="def test_it(answer): assert answer == 42",
    )
    project.microvm().assert_outcomes(passed=1)
    project.microvm("-n", "1").assert_outcomes(passed=1)


def test_a_plugin_named_for_the_guest_alone(project, trap):
    project.write(
        plugins__mine=trap + "    def pytest_addoption(parser): parser.addoption('--mine', default='no')",
        test_it="def test_it(pytestconfig): assert pytestconfig.getoption('mine') == 'yes'",
    )
    project.microvm("--microvm-args=-p plugins.mine", "--mine=yes").assert_outcomes(passed=1)


def test_a_project_plugin_on_the_hosts_command_line_is_refused(project):
    project.write(plugins__mine="", test_it="def test_it(): pass")
    result = project.microvm("-p", "plugins.mine")
    assert result.ret == 4
    result.stderr.fnmatch_lines(
        [
            "ERROR: -p plugins.mine is of the project, and pytest has loaded it on this computer*",
            '*--microvm-args="-p plugins.mine"',
        ]
    )


OPTIONS = """
    def pytest_addoption(parser):
        parser.addoption("--level", default="0")
        parser.addoption("--flag", action="store_true")
        parser.addoption("--list", action="append", default=[])
        parser.addini("own_key", "a key")
    import pytest
    @pytest.fixture
    def options(pytestconfig):
        get = pytestconfig.getoption
        return get("level"), get("flag"), get("list"), pytestconfig.getini("own_key")
"""


def test_options_of_the_projects_conftest(project):
    project.write(
        pytest__DOT__ini="[pytest]\naddopts = --level=3 --strict-config\nown_key = value\n",
        conftest=OPTIONS,
        test_it="def test_it(options): assert options == ('3', True, ['a', 'b'], 'value')",
    )
    project.microvm("--flag", "--list=a", "--list", "b", "test_it.py").assert_outcomes(passed=1)


def test_options_from_the_environment(project, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--microvm --level=5 -v")
    project.write(
        pytest__DOT__ini="[pytest]\nown_key = value\n",
        conftest=OPTIONS,
        test_it="def test_it(options): assert options[0] == '5'",
    )
    result = project.microvm()
    result.stdout.fnmatch_lines(["test_it.py::test_it PASSED*"])


def test_microvm_in_the_projects_own_configuration(project):
    project.write(
        pytest__DOT__ini="[pytest]\naddopts = --microvm\n",
        test_it="import os\ndef test_it(): assert os.getppid()",
    )
    arguments = [word for word in project._arguments if word != "--microvm"]
    result = project.native(*arguments)
    result.stdout.fnmatch_lines(["microvm: 1 test in 1 machine, *"])


def test_what_the_host_cannot_judge(project):
    """A missing plug-in and a newer strictness are the guest's to complain about."""
    project.write(
        pytest__DOT__ini="[pytest]\nrequired_plugins = no-such-plugin>=2\n", test_it="def test_it(): pass"
    )
    result = project.microvm()
    assert result.ret == 4
    result.stdout.fnmatch_lines(["microvm: accelerator *"])
    result.stderr.fnmatch_lines(["ERROR: Missing required plugins: no-such-plugin>=2"])


def test_an_unknown_option_is_the_guests_error(project):
    project.write(test_it="def test_it(): pass")
    result = project.microvm("--no-such-option=1")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["ERROR: usage: *", "*unrecognized arguments: --no-such-option=1*"])


def test_an_unknown_key_in_strict_mode(project):
    project.write(pytest__DOT__ini="[pytest]\nno_such_key = 1\n", test_it="def test_it(): pass")
    project.assert_same("-q")
    project.assert_same("--strict-config", "-q")


def test_an_unregistered_marker_in_strict_mode(project):
    project.write(test_it="import pytest\n@pytest.mark.nowhere\ndef test_it(): pass")
    project.assert_same("--strict-markers")
    project.assert_same()


def test_a_broken_conftest(project):
    project.write(conftest="import no_such_module", test_it="def test_it(): pass")
    native, remote = project.native(), project.microvm()
    assert remote.ret == native.ret == 4
    remote.stderr.fnmatch_lines(
        ["ERROR: ImportError while loading conftest*", "*No module named 'no_such_module'"]
    )


def test_pytest_exit_while_collecting(project):
    project.write(
        conftest="import pytest\ndef pytest_collection_modifyitems(): pytest.exit('enough', returncode=7)",
        test_it="def test_it(): pass",
    )
    native, remote = project.native(), project.microvm()
    assert remote.ret == native.ret == 7
    remote.stdout.fnmatch_lines(["!* _pytest.outcomes.Exit: enough !*"])


def test_an_internal_error_while_collecting(project):
    project.write(conftest="def pytest_collection_modifyitems(): 1 / 0", test_it="def test_it(): pass")
    native, remote = project.native(), project.microvm()
    assert remote.ret == native.ret == 3
    remote.stdout.fnmatch_lines(["*INTERNALERROR> *ZeroDivisionError*"])


@pytest.mark.parametrize("option", ["--fixtures", "--markers", "--fixtures-per-test"])
def test_what_pytest_shows_of_a_project_comes_from_the_machine(project, option):
    project.write(
        pytest__DOT__ini="[pytest]\nmarkers =\n    own: a marker of the project",
        conftest="""
            import os
            import pytest

            @pytest.fixture
            def own_fixture():
                \"\"\"A fixture of the project.\"\"\"
                return os.getpid()
        """,
        test_it="def test_it(own_fixture): pass",
    )
    native, remote = project.native(option), project.microvm(option)
    assert remote.ret == native.ret == 0
    own = [line for line in native.outlines if "own" in line or "of the project" in line]
    assert own
    assert [line for line in remote.outlines if line in own] == own


@pytest.mark.parametrize("how", [{"pytest__DOT__ini": "[pytest]\naddopts = --markers"},
                                 {"conftest": "def pytest_cmdline_main(): return 0"}])  # fmt: skip
def test_no_project_ends_a_run_as_if_it_had_passed(project, how):
    project.write(test_it="def test_it(): assert 0", **how)
    assert project.microvm().ret != 0


@pytest.mark.parametrize("option", ["--setup-show", "--setup-plan", "--setup-only"])
def test_fixtures_of_tests_are_shown(project, option):
    project.write(
        test_it="""
            import pytest

            @pytest.fixture
            def own():
                yield

            def test_it(own): pass
        """
    )
    native, remote = project.native(option), project.microvm(option)
    assert remote.ret == native.ret
    lines = [line for line in native.outlines if "SETUP" in line or "fixtures used" in line]
    shown = [line.rstrip(" .") for line in remote.outlines]
    assert len(lines) > 1
    assert [line.rstrip(" .") for line in lines if line.rstrip(" .") not in shown] == []


def test_an_unknown_value_of_ours(project):
    result = project.microvm("--microvm-isolation=planet")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*argument --microvm-isolation: invalid choice: 'planet'*"])


def test_a_path_outside_the_workspace(project, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "test_other.py"
    other.write_text("def test_other(): pass")
    project.write(pytest__DOT__ini="[pytest]\n", test_it="def test_it(): pass")
    result = project.microvm("-c", "pytest.ini", "test_it.py", str(other))
    assert result.ret == 4
    result.stderr.fnmatch_lines(["ERROR: *test_other.py lies outside *", "next step: *--rootdir"])


def test_without_the_option_nothing_is_loaded(project):
    project.write(
        test_it="import sys\ndef test_it(): assert not [n for n in sys.modules if 'microvm.remote' in n]"
    )
    project.native().assert_outcomes(passed=1)


def test_what_a_worker_imports_first(project, trap):
    """A worker of pytest-xdist starts in the project's folder, where Python looks first."""
    project.write(execnet=trap, tests__test_it="def test_it(): pass")
    project.command("-n", "1").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    "words", ["", "-o addopts=-q", "--override-ini=addopts=-q", "-o addopts='' --microvm-memory=1G"]
)
@pytest.mark.parametrize("option", ["--microvm-secret='A=command:touch sprung'", "--microvm-image=./kit"])
def test_addopts_of_the_project_grant_nothing(project, option, words):
    """They may have been taken for what the user says, and hide themselves."""
    project.write(pytest__DOT__ini=f"[pytest]\naddopts = {option} {words}\n", test_it="def test_it(): pass")
    result = project.microvm()
    result.stderr.fnmatch_lines(["*addopts of the project's configuration has --microvm-*"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_the_user_s_own_words_grant(project, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-q --microvm-network=a.example")
    project.write(pytest__DOT__ini="[pytest]\naddopts = -v -o addopts=-q\n", test_it="def test_it(): pass")
    project.microvm("--microvm-image=base", "--microvm-mount", "out:/out").assert_outcomes(passed=1)


ACTING = """
    import os, sys
    import pytest

    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests(early_config):
        os.environ["ACTED"] = "1"
        sys.path.insert(0, os.fspath(early_config.rootpath))
        import settings_of_the_project
"""


def test_installed_plugins_do_not_act_on_project_settings(project, trap, monkeypatch):
    """As pytest-env, pytest-dotenv and pytest-django do: set what its files say, import what they name."""
    site = project.path.parent / f"{project.path.name}-site"
    (site / "acting-1.0.dist-info").mkdir(parents=True)
    (site / "acting-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: acting\nVersion: 1.0\n"
    )
    (site / "acting-1.0.dist-info" / "entry_points.txt").write_text("[pytest11]\nacting = acting\n")
    (site / "acting.py").write_text(textwrap.dedent(ACTING))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    project.write(
        settings_of_the_project=trap,
        test_it="""
            import os
            def test_it(): assert "ACTED" not in os.environ
        """,
    )
    result = project.microvm("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["plugins:*acting-1.0*"])


def test_the_launcher_loads_what_is_named_where_it_is(project, trap):
    """A plug-in that is installed here is for this side, another one for the machine."""
    project.write(
        plugins__mine=trap + "    def pytest_report_header(): return 'mine in ' + __file__",
        pytest__DOT__ini="[pytest]\npythonpath = .\n",
        test_it="def test_it(): pass",
    )
    result = project.launched("-p", "plugins.mine", "-p", "xdist", "-p", "no:junitxml")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["plugins: *xdist-*", "*in the machine:*", "*mine in *plugins/mine.py"])


def test_the_launcher_refuses_a_python_path_into_the_project(project, trap, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.fspath(project.path / "src"), prepend=os.pathsep)
    project.write(test_it="def test_it(): pass")
    result = project.launched()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: PYTHONPATH has */src, *", "next step: unset it*"])
    result.stdout.no_fnmatch_line("*passed*")


def test_a_launched_run_shows_no_file_of_its_own(project):
    project.write(pytest__DOT__ini="[pytest]\naddopts = -v\n", sub__test_it="def test_it(): pass")
    result = project.launched("-n", "1")
    result.stdout.fnmatch_lines(["rootdir: *", "configfile: pytest.ini", "*PASSED sub/test_it.py*"])
    result.stdout.no_fnmatch_line("*launch.json*")
    assert not list(project.path.glob("**/.pytest_cache"))
