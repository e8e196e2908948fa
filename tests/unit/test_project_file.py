"""A project's pytest configuration is read as pytest reads it, and nothing in it is obeyed."""

import os
import re
from pathlib import Path

import pytest
from _pytest.config import get_config
from _pytest.config.findpaths import determine_setup

from pytest_microvm.errors import UsageError
from pytest_microvm.suite.addopts import (
    SHOWN_KEYS,
    addopts_words,
    divide_addopts,
    refuse_acting,
    shown_values,
)
from pytest_microvm.suite.arguments import (
    ARITY_ELSEWHERE,
    SELECTING_AND_SHOWING,
    parser_arity,
    split_arguments,
)
from pytest_microvm.suite.neutral import _NEUTRAL
from pytest_microvm.suite.project_file import MAX_SIZE, find_project_file

REPOSITORY = Path(__file__).parents[2]
INI = "[pytest]\naddopts = -q\n"
FILES = {
    "pytest.toml": '[pytest]\naddopts = ["-q"]\n',
    ".pytest.toml": '[pytest]\naddopts = ["-q"]\n',
    "pytest.ini": INI,
    ".pytest.ini": INI,
    "pyproject.toml": '[tool.pytest.ini_options]\naddopts = "-q"\nxfail_strict = true\n',
    "tox.ini": INI,
    "setup.cfg": "[tool:pytest]\naddopts = -q\n",
}
TREES = {
    **{name: {name: text} for name, text in FILES.items()},
    "all at once": FILES,
    "all but the first": dict(list(FILES.items())[1:]),
    "above": {"pytest.ini": INI, "sub/test_a.py": ""},
    "below": {"sub/pytest.ini": INI, "sub/test_a.py": "", "other/test_b.py": ""},
    "two below": {"sub/pytest.ini": INI, "other/tox.ini": INI, "sub/test_a.py": "", "other/test_b.py": ""},
    "tool.pytest": {"pyproject.toml": '[tool.pytest]\naddopts = ["-q"]\n'},
    "silent pyproject": {"pyproject.toml": "[project]\nname = 'x'\n", "sub/test_a.py": ""},
    "silent pyproject below a real one": {"pytest.ini": INI, "sub/pyproject.toml": "[project]\n"},
    "silent tox.ini": {"tox.ini": "[tox]\n", "setup.py": "", "sub/test_a.py": ""},
    "empty pytest.ini": {"pytest.ini": ""},
    "setup.py": {"setup.py": "", "sub/test_a.py": ""},
    "nothing": {"sub/test_a.py": "", "other/test_b.py": ""},
    "another name": {"ci/settings.ini": INI, "ci/x.toml": '[pytest]\naddopts = ["-q"]\n'},
}
CALLS = [
    {},
    {"paths": ["sub"]},
    {"paths": ["sub/test_a.py::test_x", "other"]},
    {"paths": ["no/such/path"]},
    {"rootdir": "sub"},
    {"file": "ci/settings.ini"},
    {"file": "ci/x.toml", "rootdir": "."},
    {"file": os.devnull, "paths": ["sub"]},
]


@pytest.fixture
def tree(request, tmp_path, monkeypatch):
    for name, text in TREES[request.param].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of_pytest(directory, call):
    """Return what pytest itself finds; ``None`` where it refuses."""
    try:
        rootdir, file, values, _ignored = determine_setup(
            inifile=call.get("file"),
            override_ini=None,
            args=call.get("paths", []),
            rootdir_cmd_arg=call.get("rootdir"),
            invocation_dir=directory,
        )
    except pytest.UsageError:
        return None
    return rootdir, file, {key: entry.value for key, entry in values.items()}


def of_ours(directory, call):
    options = {key: value for key, value in call.items() if key != "paths"}
    try:
        found = find_project_file(directory, call.get("paths", []), **options)
    except UsageError:
        return None
    path = found.path
    if path is None and options.get("file") == os.devnull:  # pytest has it for the file
        path = directory / os.devnull
    values = found.values
    if path is not None and path.name == "pyproject.toml":  # pytest makes text of what is not a list
        values = {key: value if isinstance(value, list) else str(value) for key, value in values.items()}
    return found.rootdir, path, values


@pytest.mark.skipif(pytest.version_tuple < (9, 1), reason="older pytest has fewer files, and other arguments")
@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("tree", TREES, indirect=True)
def test_it_is_found_where_pytest_finds_it(tree, call):
    assert of_ours(tree, call) == of_pytest(tree, call)


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pytest.ini")
    (tmp_path / "tox.ini").mkdir()
    assert find_project_file(tmp_path, []).path is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pytest.ini", b"#" * (MAX_SIZE + 1), "more than"),
        ("pytest.ini", b"\xff", "expected UTF-8"),
        ("pytest.ini", b"key without a section", "unexpected line"),
        ("pyproject.toml", b"[" * 50_000, "pyproject.toml"),
        ("pyproject.toml", b"tool = 1", "invalid tool: expected a table, got int"),
        ("pyproject.toml", b"[tool]\npytest = 1", "invalid pytest: expected a table, got int"),
        ("pyproject.toml", b"[tool.pytest]\na = 1\n[tool.pytest.ini_options]\n", "has both"),
        ("setup.cfg", b"[pytest]\n", "write [tool:pytest]"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_unusable_file_is_a_usage_error(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        find_project_file(tmp_path, [])
    assert said in str(caught.value)


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "secret.ini").write_text("[pytest]\naddopts = -q\n")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "pytest.ini").symlink_to("../secret.ini")
    with pytest.raises(UsageError, match="is a link"):
        find_project_file(tmp_path / "project", [])


@pytest.fixture(scope="module")
def arity():
    return {**ARITY_ELSEWHERE, **parser_arity(get_config()._parser)}


def divided(arity, *words, users=(), reports=None):
    return divide_addopts(words, users, arity, reports)


def test_no_word_for_the_host_can_be_taken_for_another(arity):
    """pytest takes each word that begins with -p for a plug-in, values of other options among them."""
    for option in SELECTING_AND_SHOWING:
        if arity.get(option) == "1":
            for word in divided(arity, option, "evil").host:
                assert word.startswith((f"{option}=evil", f"{option}evil"))
    joined = divided(arity, "-k", "a", "-m=b", "-rA", "--tb", "short", "-xvs").host
    assert joined == ("-ka", "-mb", "-rA", "--tb=short", "-x", "-v", "-s")


def test_what_is_not_known_is_the_machine_s(arity):
    found = divided(arity, "--cov=src", "--cov-report", "html:/outside", "-p", "evil", "tests", "-W", "error")
    assert found.host == ()
    assert found.guest == ("--cov=src", "--cov-report", "html:/outside", "-p", "evil", "tests", "-W", "error")


def test_every_option_of_pytest_is_judged(arity):
    """An option that a new pytest brings is the machine's until somebody has looked at it."""
    allowed = SELECTING_AND_SHOWING | {"--tb"}
    for option, takes in arity.items():
        try:
            found = divided(arity, option, *(["1"] if takes == "1" else []))
        except UsageError:
            continue
        assert option in allowed or not found.host, option


def test_reports_go_where_the_user_says(arity, tmp_path):
    assert divided(arity, "--junitxml=a/b.xml", reports=tmp_path).host == (f"--junitxml={tmp_path}/a/b.xml",)
    assert divided(arity, "--junitxml=/x.xml", users=["--junitxml=mine.xml"]).host == ()
    for path in ("/outside.xml", "../outside.xml", "a/../../outside.xml", "~/x.xml"):
        with pytest.raises(UsageError, match="leads out of"):
            divided(arity, f"--junitxml={path}", reports=tmp_path)
    with pytest.raises(UsageError, match="--microvm-reports=DIR"):
        divided(arity, "--junitxml=a.xml")


def test_the_user_s_own_report_is_no_reason_to_refuse(arity):
    refuse_acting(["--junitxml=a.xml", "-q"], ["--junitxml=mine.xml"], arity)
    with pytest.raises(UsageError, match="acts on this computer"):
        refuse_acting(["--junitxml=a.xml", "-q"], [], arity)


def test_values_that_only_show_come_along():
    values = {
        "console_output_style": "count",
        "junit_family": "xunit1",
        "junit_log_passing_tests": False,
        "verbosity_test_cases": 2,
        "testpaths": ["tests", "more tests"],
        "junit_suite_name": "a\nb",
        "cache_dir": "/outside",
        "log_file": "/outside",
    }
    assert sorted(shown_values(values)) == [
        "console_output_style=count",
        "junit_family=xunit1",
        "junit_log_passing_tests=false",
        "testpaths=tests 'more tests'",
        "verbosity_test_cases=2",
    ]


@pytest.mark.parametrize("paths", ["/etc", "../other", "a/**", "~", "'", ["../x"], {"a": 1}, 7.5])
def test_testpaths_outside_the_project_stay_in_the_machine(paths):
    assert list(shown_values({"testpaths": paths})) == []
    assert "testpaths" in SHOWN_KEYS


@pytest.mark.parametrize("value", [{"a": 1}, 1, ["-q", 1], "-k 'never"])
def test_addopts_that_are_none(value):
    with pytest.raises(UsageError, match="addopts"):
        addopts_words(value, None)


# docs/reference/project-configuration.md

PAGE = (REPOSITORY / "docs" / "reference" / "project-configuration.md").read_text()
with_xdist = pytest.mark.skipif(pytest.version_tuple < (9, 2), reason="the page is about pytest 9.2")


def rows(title):
    """Return, for each name in the first column of a section's table, the last two columns."""
    table = PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {
        name: (launched, optional.strip(" |"))
        for names, _does, launched, optional in lines
        for name in re.findall(r"`([^`]+)`", names)
    }


@pytest.fixture(scope="module")
def config_with_xdist():
    config = get_config()
    config.pluginmanager.load_setuptools_entrypoints("pytest11", name="xdist")
    return config


def who_obeys(words, arity):
    try:
        found = divide_addopts(words, (), arity)
    except UsageError as error:
        return "below `--microvm-reports`, else refused" if "--microvm-reports" in str(error) else "refused"
    return " and ".join(name for name in ("host", "guest") if getattr(found, name)) or "nobody"


@with_xdist
def test_the_page_says_of_each_option_what_comes_of_it(config_with_xdist):
    arity = parser_arity(config_with_xdist._parser)
    expected = {}
    for option, takes in arity.items():
        words = [option, *(["a=b"] if takes == "1" else [])]
        try:
            refuse_acting(words, (), arity)
            split_arguments(words, arity)
            optional = "obeyed"
        except UsageError:
            optional = "refused"
        expected[option] = (who_obeys(words, arity).replace("guest", "machine"), optional)
    assert rows("Options in `addopts`") == expected


@with_xdist
def test_the_page_says_of_each_key_who_obeys_it(config_with_xdist):
    keys = {*config_with_xdist._parser._inidict, "addopts", "minversion", "pythonpath", "required_plugins"}
    told = rows("Keys")
    assert set(told) == keys
    assert {key for key in told if told[key][0].startswith("host and machine")} == set(SHOWN_KEYS)
    assert {key for key in told if told[key][1].startswith("machine")} == set(_NEUTRAL)
