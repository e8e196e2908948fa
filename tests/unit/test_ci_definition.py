"""The definition of CI jobs: every key, every kind of mistake, and a schema that says the same."""

import json
import re
import sys
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from pytest_microvm.ci.definition.job import Job, Step
from pytest_microvm.ci.definition.keys import KEYS, SPEC_KEYS, STEP_KEYS
from pytest_microvm.ci.definition.parsing import NOT_DEFAULTS, parse_definition
from pytest_microvm.ci.definition.schema import definition_schema
from pytest_microvm.errors import UsageError
from pytest_microvm.settings.configuration import load_settings
from pytest_microvm.settings.spec import PARSERS, MachineSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "ci-definition.md"
SCHEMA = definition_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def parsed(text, where="microvm.toml"):
    return parse_definition(text, where)


def job(text):
    """Return the only job that has these keys besides a step."""
    (found,) = parsed(f'[ci.jobs.test]\nsteps = ["true"]\n{text}\n').jobs
    return found


def refused(text, where="microvm.toml"):
    with pytest.raises(UsageError) as caught:
        parsed(text, where)
    return caught.value


# What it says


EVERYTHING = """
[ci.jobs.test]
image = "microvm/kits/web"
python = "host"
nested = true
needs = ["lint"]
branches = ["main", "release-*"]
prepare = ["python3 -m pip install -r requirements.txt"]
prepare_inputs = ["requirements.txt", "wheels/"]
prepare_network = ["pip"]
steps = [
    "make",
    { run = "make test", name = "tests" },
    { run = "cat log", when = "failure" },
    { run = "df", when = "always" },
]
env = { LEVEL = "3", JOBS = 2, HALF = 0.50 }
artifacts = ["dist/**", "log"]
junit = ["reports/*.xml"]
timeout = "1h30m"
allow_failure = true
retries = 3
git = true
network = ["api.example.com"]
hosts = { "api.example.com" = "127.0.0.1:8443" }
secrets = { TOKEN = { env = "A" }, KEY = { file = "~/key", as = "file", branches = ["main", "release-*"] } }
cpus = 1.5
memory = "1G"
disk = 4294967296
pids = 100
cpu_seconds = 60
output = "1M"
network_bytes = "10M"
connections = 10
bandwidth = "1M"
fail_on_denied = true
credentials = [{ host = "api.example.com", value = { env = "B" }, variable = "C", branches = ["*"] }]

[ci.jobs.lint]
steps = ["true"]
"""


def test_everything():
    lint, test = parsed(EVERYTHING).jobs
    assert lint == Job(key="lint", name="lint", steps=(Step("true", "true"),))
    assert test.steps == (
        Step("make", "make"),
        Step("make test", "tests"),
        Step("cat log", "cat log", "failure"),
        Step("df", "df", "always"),
    )
    spec = test.spec
    assert (spec.image, spec.cpus, spec.memory, spec.disk) == ("microvm/kits/web", 1.5, 1024**3, 4 * 1024**3)
    assert (spec.python, spec.nested) == ("host", True)
    assert (spec.pids, spec.cpu_seconds, spec.output, spec.network_bytes) == (100, 60, 1024**2, 10 * 1024**2)
    assert (spec.connections, spec.bandwidth, spec.network) == (10, 1024**2, ("api.example.com",))
    assert spec.hosts == (("api.example.com", ("127.0.0.1", 8443)),)
    assert (spec.secrets, spec.credentials) == ((), ())
    assert test.needs == ("lint",)
    assert test.branches == ("main", "release-*")
    assert test.prepare == ("python3 -m pip install -r requirements.txt",)
    assert (test.prepare_inputs, test.prepare_network) == (("requirements.txt", "wheels/"), ("pip",))
    assert test.env == (("LEVEL", "3"), ("JOBS", "2"), ("HALF", "0.50"))
    assert (test.artifacts, test.junit) == (("dist/**", "log"), ("reports/*.xml",))
    assert (test.timeout, test.allow_failure, test.retries, test.git) == (5400, True, 3, True)
    assert [(granted.secret.name, granted.branches) for granted in test.secrets] == [
        ("TOKEN", ()),
        ("KEY", ("main", "release-*")),
    ]
    assert test.secrets[1].secret.delivery == "file"
    assert [(one.credential.host, one.branches) for one in test.credentials] == [("api.example.com", ("*",))]


def test_every_key_of_a_job_is_said_there():
    said = tomllib.loads(EVERYTHING)["ci"]["jobs"]["test"]
    assert set(said) | {"matrix"} == set(KEYS)
    assert set(SPEC_KEYS) == set(PARSERS) - {"timeout", "lifetime", "credentials", "secrets", "mounts"}


def test_what_a_branch_may_have():
    test = parsed(EVERYTHING).jobs[1]

    def names(branch, *, default):
        return [secret.name for secret in test.spec_for(branch, default=default).secrets]

    assert names("main", default=True) == ["TOKEN", "KEY"]
    assert names("release-1", default=False) == ["KEY"]
    assert names("feature", default=False) == []
    assert names("refs/pull/7/head", default=False) == []


def test_pyproject():
    text = '[project]\nname = "x"\n[tool.other]\na = 1\n[tool.pytest-microvm]\nimage = "base"\n'
    text += '[tool.pytest-microvm.ci.jobs.test]\nsteps = ["true"]\n'
    definition = parsed(text, "main:pyproject.toml (1a2b3c4)")
    assert [one.name for one in definition.jobs] == ["test"]
    assert definition.where == "main:pyproject.toml (1a2b3c4)"
    assert definition.jobs[0].spec == MachineSpec()  # of `pytest --microvm`, not of CI


def test_pytest_reads_past_it(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.pytest-microvm.ci.jobs.test]\nsteps = [1]\n")
    assert load_settings(tmp_path, {}).spec == MachineSpec()


def test_defaults():
    first, second = parsed(
        """
        [ci.defaults]
        image = "base"
        timeout = 60
        env = { A = "1" }
        steps = ["true"]
        [ci.jobs.first]
        [ci.jobs.second]
        image = "python"
        env = { B = "${matrix.x}" }
        matrix = { x = [1] }
        """
    ).jobs
    assert (first.spec.image, first.timeout, first.env) == ("base", 60, (("A", "1"),))
    assert (second.spec.image, second.timeout, second.env) == ("python", 60, (("B", "1"),))
    assert "ci.defaults.timeout" in refused("[ci.defaults]\ntimeout = 0\n[ci.jobs.a]\nsteps = ['x']").brief
    for key in NOT_DEFAULTS:
        assert f"ci.defaults.{key}: unknown key" in refused(f"[ci.defaults]\n{key} = []\n[ci.jobs.a]").brief


# Matrices


def combinations(text):
    return [
        ",".join(value for _name, value in one.matrix)
        for one in parsed(f'[ci.jobs.a]\nsteps = ["x"]\n[ci.jobs.a.matrix]\n{text}').jobs
    ]


def test_a_matrix():
    assert combinations('python = ["3.11", "3.12"]\nos = ["a", "b"]') == [
        "3.11,a",
        "3.11,b",
        "3.12,a",
        "3.12,b",
    ]
    left = 'python = ["3.11", "3.12"]\nos = ["a", "b"]\nexclude = [{python = "3.11", os = "b"}, {os = "a"}]'
    assert combinations(left) == ["3.12,b"]
    assert combinations('python = ["3.11"]\ninclude = [{python = "3.13"}, {python = "3.11"}]') == [
        "3.11",
        "3.13",
    ]


def test_numbers_of_a_matrix_are_as_written():
    """3.10 is not 3.1."""
    assert combinations("python = [3.10, 3.9, 3]") == ["3.10", "3.9", "3"]
    assert combinations('python = [3.10, "3.1"]\nexclude = [{python = 3.10}]') == ["3.1"]


def test_the_matrix_is_put_in():
    jobs = parsed(
        """
        [ci.jobs.test]
        image = "kits/${matrix.os}"
        matrix = { os = ["a", "b"], level = [1] }
        env = { OS = "on ${matrix.os}", KEPT = "${HOME} $${matrix.level} ${matrix}" }
        prepare = ["install ${matrix.os}"]
        prepare_inputs = ["for/${matrix.os}"]
        prepare_network = ["${matrix.os}.example.com"]
        network = "${matrix.os}.example.org"
        steps = [{ run = "test ${matrix.os}${matrix.level}", name = "on ${matrix.os}" }]
        artifacts = ["out/${matrix.os}"]
        junit = ["${matrix.os}.xml"]
        """
    ).jobs
    assert [one.name for one in jobs] == ["test (os=a, level=1)", "test (os=b, level=1)"]
    second = jobs[1]
    assert second.key == "test"
    assert second.matrix == (("os", "b"), ("level", "1"))
    assert (second.spec.image, second.spec.network) == ("kits/b", ("b.example.org",))
    assert second.env == (("OS", "on b"), ("KEPT", "${HOME} $1 ${matrix}"))
    assert (second.prepare, second.prepare_inputs) == (("install b",), ("for/b",))
    assert second.prepare_network == ("b.example.com",)
    assert second.steps == (Step("test b1", "on b"),)
    assert (second.artifacts, second.junit) == (("out/b",), ("b.xml",))


def test_a_value_of_the_matrix_cannot_leave_the_workspace():
    text = '[ci.jobs.a]\nsteps = ["x"]\nartifacts = ["${matrix.x}/y"]\nmatrix = { x = [".."] }'
    assert "expected one inside the workspace, got '../y'" in refused(text).brief


# Order


def order(**needs):
    text = "".join(
        f'[ci.jobs.{name}]\nsteps = ["x"]\nneeds = {json.dumps(on)}\n' for name, on in needs.items()
    )
    return [one.key for one in parsed(text).jobs]


def test_needs_come_first():
    assert order(a=["c"], b=[], c=["d"], d=[]) == ["b", "d", "c", "a"]
    assert order(a=[], b=[], c=[]) == ["a", "b", "c"]
    assert order(c=["b"], b=["a"], a=[]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("needs", "shown"),
    [
        ({"a": ["a"]}, "a -> a"),
        ({"a": ["b"], "b": ["a"]}, "a -> b -> a"),
        ({"x": ["a"], "a": ["b", "y"], "b": ["c"], "c": ["a"], "y": []}, "a -> b -> c -> a"),
    ],
)
def test_a_cycle(needs, shown):
    with pytest.raises(UsageError, match=re.escape(shown)) as caught:
        order(**needs)
    assert caught.value.brief.startswith("microvm.toml: ci.jobs.a.needs: ")


def test_an_unknown_need():
    with pytest.raises(UsageError, match=r"ci\.jobs\.a\.needs: 'buidl': unknown") as caught:
        order(a=["buidl"], build=[])
    assert "did you mean 'build'?" in caught.value.resolution


# What needs trust


def test_what_is_asked_for():
    asked = parsed(EVERYTHING).asked
    assert set(asked) == {
        f"ci.jobs.test.{key}"
        for key in ("nested", "prepare_network", "network", "hosts", "secrets", "credentials")
    }
    assert asked["ci.jobs.test.secrets"] == tomllib.loads(EVERYTHING)["ci"]["jobs"]["test"]["secrets"]
    assert json.loads(json.dumps(asked)) == asked


def test_what_is_asked_for_follows_the_matrix():
    """Else a new value of the matrix would be a new permission that nobody was asked about."""

    def asked(values):
        text = '[ci.jobs.a]\nsteps = ["x"]\nnetwork = ["${matrix.host}"]\n[ci.jobs.a.matrix]\nhost = '
        return parsed(text + json.dumps(values)).asked

    assert asked(["a.example"]) == {"ci.jobs.a.network": ["a.example"]}
    assert asked(["a.example", "evil.example"]) != asked(["a.example"])


def test_what_is_asked_for_by_defaults():
    jobs = '[ci.jobs.a]\nsteps = ["x"]\n[ci.jobs.b]\nsteps = ["x"]\nnetwork = []'
    definition = parsed(f'[ci.defaults]\nnetwork = ["pip"]\n{jobs}')
    assert definition.asked == {"ci.jobs.a.network": ["pip"]}


# Mistakes: what the schema sees too


WRONG = {
    "step": '["x"]', "steps ": "[]", "image": '""', "python": '"mine"', "nested": "1", "needs": '["b", "b"]',
    "branches": "[]", "prepare": '"x"', "prepare_inputs": '["/etc"]', "prepare_network": "[1]",
    "env": '{ "a-b" = "x" }', "artifacts": '["../x"]',
    "junit": '["a/../b"]', "timeout": '"soon"', "allow_failure": '"yes"', "retries": "11", "git": "1",
    "network": '[""]', "hosts": '["a=127.0.0.1"]', "cpus": "0", "memory": '"1X"', "disk": "1", "pids": "0",
    "cpu_seconds": "0", "output": '"0"', "network_bytes": "true", "connections": "-1", "bandwidth": '""',
    "secrets": '{ A = "value" }', "credentials": '{ host = "a" }', "matrix": "{}", "fail_on_denied": "0",
}  # fmt: skip
MORE_WRONG = [
    ("steps", "[1]"), ("steps", "[{}]"), ("steps", '[""]'), ("steps", '[{ run = "x", wen = "always" }]'),
    ("steps", '[{ run = "x", when = "never" }]'), ("steps", '[{ run = "x", name = "" }]'), ("steps", '"x"'),
    ("timeout", "0"), ("timeout", '""'), ("timeout", '"0s"'), ("timeout", '"1m1h"'), ("timeout", "true"),
    ("timeout", '"90"'), ("memory", "134217727"), ("memory", "1.5"), ("cpus", "65"), ("cpus", "true"),
    ("matrix", "{ a = [] }"), ("matrix", '{ a = "x" }'), ("matrix", '{ "a b" = ["x"] }'),
    ("matrix", "{ a = [true] }"),
    ("matrix", '{ a = ["x", "x"] }'), ("matrix", '{ a = ["x"], exclude = {} }'), ("matrix", "[]"),
    ("matrix", '{ a = ["x"], include = ["x"] }'), ("matrix", "{ exclude = [] }"), ("matrix", '{ a = [""] }'),
    ("secrets", "{ A = {} }"), ("secrets", '{ A = { env = "B", file = "C" } }'),
    ("secrets", '{ "A-B" = { env = "C" } }'),
    ("secrets", '{ A = { env = "B", as = "disk" } }'), ("secrets", '{ A = { env = "B", branches = [] } }'),
    ("secrets", '{ A = { env = "B", branches = "main" } }'), ("secrets", '[{ env = "A" }]'),
    ("secrets", '{ A = { value = "x" } }'), ("credentials", '[{ host = "a.example" }]'),
    ("credentials", '[{ value = { env = "A" } }]'), ("credentials", '["host=a.example,env=A"]'),
    ("credentials", '[{ host = "a.example", value = { env = "A" }, branch = ["main"] }]'),
    ("credentials", '[{ host = "a.example", value = { env = "A" }, scheme = "digest" }]'),
    ("env", "{ A = true }"), ("env", '{ A = ["x"] }'), ("env", '"A=1"'), ("hosts", "{ a = 1 }"),
    ("prepare", '[""]'), ("needs", '"a"'), ("branches", '[""]'), ("artifacts", '".."'),
    ("artifacts", '[".."]'),
    ("cpus", '"1"'), ("pids", '"9"'), ("cpu_seconds", '"9"'), ("connections", '"9"'), ("retries", '"1"'),
    ("network", "{}"), ("image", "1"), ("retries", "-1"), ("retries", "true"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [*WRONG.items(), *MORE_WRONG], ids=lambda value: value)
def test_a_mistake_is_seen_by_both(key, value):
    text = (
        "[ci.jobs.test]\n" + ("" if key.strip() == "steps" else 'steps = ["true"]\n') + f"{key} = {value}\n"
    )
    error = refused(text)
    assert error.brief.startswith(f"microvm.toml: ci.jobs.test.{key.strip()}")
    assert error.resolution
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(tomllib.loads(text))


def test_every_key_was_tried():
    assert {key.strip() for key in WRONG} - {"step"} == set(KEYS)


@pytest.mark.parametrize(
    ("text", "where", "brief"),
    [
        ("[ci]", "microvm.toml", "microvm.toml: ci.jobs: there is no job"),
        ("[ci.jobs]", "microvm.toml", "microvm.toml: ci.jobs: there is no job"),
        ("[ci.job.a]", "microvm.toml", "microvm.toml: ci.job: unknown key"),
        ("ci = 1", "microvm.toml", "microvm.toml: ci: invalid value: expected a table, got int"),
        ("[jobs.a]", "microvm.toml", "microvm.toml.jobs: unknown key"),
        (
            "[ci.jobs]\na = 1",
            "microvm.toml",
            "microvm.toml: ci.jobs.a: invalid value: expected a table, got int",
        ),
        (
            "[ci.jobs.'a b']",
            "microvm.toml",
            "microvm.toml: ci.jobs: invalid name: expected at most 64 letters",
        ),
        ("[ci.jobs.a]", "microvm.toml", "microvm.toml: ci.jobs.a: invalid job: expected steps, got none"),
        ("[ci", "microvm.toml", "microvm.toml: invalid TOML"),
        ("[tool.x]", "pyproject.toml", "pyproject.toml: no jobs are defined"),
        ("tool = 1", "pyproject.toml", "pyproject.toml: no jobs are defined"),
        ("", "microvm.toml", "microvm.toml: no jobs are defined"),
        ("a = " + "[" * 5000 + "]" * 5000, "microvm.toml", "microvm.toml: invalid TOML"),
    ],
)
def test_what_is_no_definition(text, where, brief):
    assert refused(text, where).brief.startswith(brief)


@pytest.mark.parametrize(
    "text", ["[ci]", "[ci.jobs]", "[ci.job.a]", "[jobs.a]", "[ci.jobs]\na = 1", "[ci.jobs.'a b']"]
)
def test_the_schema_says_so_too(text):
    assert not VALIDATOR.is_valid(tomllib.loads(text))


def test_what_was_meant():
    assert "did you mean 'timeout'?" in refused("[ci.jobs.a]\ntimeuot = 1").resolution
    assert "known keys: image, python, nested, steps, matrix" in refused("[ci.jobs.a]\nxyz = 1").resolution


# Mistakes that take more than one key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('image = "${matrix.os}"', "the job's matrix has no 'os'"),
        ('matrix = { os = ["a"] }\nimage = "${matrix.so}"', "the job's matrix has no 'so'"),
        ('matrix = { a = ["x"], exclude = [{ a = "y" }] }', "no combination has these values"),
        ('matrix = { a = ["x"], exclude = [{ a = "x" }] }', "expected 1 to 256 combinations, got 0"),
        ('matrix = { a = ["x"], exclude = [{ b = "x" }] }', "the matrix has no 'b'"),
        ('matrix = { a = ["x"], b = ["y"], include = [{ a = "z" }] }', "a value is missing"),
        ('matrix = { a = ["x"], A = ["y"] }', "differ in case alone"),
        (f"matrix = {{ a = {list(range(17))}, b = {list(range(17))} }}", "expected at most 256 combinations"),
        ('memory = "1M"', "expected at least 128M to boot, got 1M"),
        ('network = ["${matrix.x}"]', "the job's matrix has no 'x'"),
        ('hosts = { a = "nowhere" }', "invalid address: expected ADDRESS or ADDRESS:PORT, got 'nowhere'"),
        (
            'credentials = [{ host = "a/b", value = { env = "A" } }]',
            "invalid host: expected HOST or HOST:PORT",
        ),
        (
            'credentials = [{ host = "a", header = "Host", value = { env = "A" } }]',
            "invalid header: expected one that no connection sets",
        ),
    ],
)
def test_a_mistake_that_only_the_parser_sees(text, message):
    error = refused(f'[ci.jobs.test]\nsteps = ["true"]\n{text}\n')
    assert message in error.brief
    assert "microvm.toml: ci.jobs.test." in error.brief
    assert error.resolution


def test_too_many_jobs():
    values = list(range(100))
    text = "".join(
        f'[ci.jobs.j{number}]\nsteps = ["x"]\nmatrix = {{ a = {values} }}\n' for number in range(3)
    )
    assert "expected at most 256 jobs" in refused(text).brief


def test_a_value_that_may_be_secret_is_not_shown():
    for text in (
        'secrets = { A = "hunter2" }',
        'credentials = ["hunter2"]',
        'secrets = { A = { env = "", x = "hunter2" } }',
    ):
        assert "hunter2" not in str(refused(f'[ci.jobs.test]\nsteps = ["true"]\n{text}\n'))


# The schema


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    job_schema = SCHEMA["$defs"]["job"]
    assert set(job_schema["properties"]) == set(KEYS)
    assert set(SCHEMA["properties"]["ci"]["properties"]["defaults"]["properties"]) == set(KEYS) - set(
        NOT_DEFAULTS
    )
    assert all(fragment["description"] for fragment in job_schema["properties"].values())


def test_everything_is_valid():
    VALIDATOR.validate(tomllib.loads(EVERYTHING))


TEXT = st.text("ab ./$*{}\n0é", max_size=6)
FRACTIONS = st.integers(0, 300).filter(lambda number: number % 100).map(lambda number: number / 100)
LEAVES = st.one_of(TEXT, st.integers(-2, 12), st.booleans(), FRACTIONS)
SIZES = st.one_of(st.from_regex(r"[0-9]{1,3} ?[KMGTx]?i?B?", fullmatch=True), st.integers(0, 2**30))
DURATIONS = st.from_regex(r"([0-9]h)?([0-9]m)?([0-9]s)?x?", fullmatch=True)
NAMES = st.text("aB_-1", min_size=1, max_size=3)
VALUES = st.one_of(
    LEAVES,
    st.lists(TEXT, max_size=3),
    st.dictionaries(NAMES, LEAVES, max_size=2),
    st.dictionaries(NAMES, st.lists(LEAVES, max_size=3), max_size=2),
    st.lists(
        st.fixed_dictionaries({}, optional={"run": TEXT, "name": TEXT, "when": TEXT | st.just("always")}),
        max_size=2,
    ),
)
# What more than one key, or the policy's own reading, decides; a float for a text is as it was written.
ONLY_THE_PARSER = {"needs", "hosts", "credentials"}
PARTS = st.sampled_from(sorted(set(KEYS) - ONLY_THE_PARSER)).flatmap(
    lambda key: st.tuples(
        st.just(key),
        VALUES if key not in ("memory", "disk", "output", "bandwidth", "network_bytes", "timeout") else
        SIZES | DURATIONS | VALUES,
    )
)  # fmt: skip


def is_beyond(error):
    """Whether the schema cannot know: sums of values, ${matrix.x}, least sizes that are written as text."""
    return any(
        text in error.brief
        for text in (
            "the job's matrix has no",
            "differ in case",
            "expected at least",
            "combination",
            "there twice",
        )
    )


@settings(max_examples=4 * settings.default.max_examples, suppress_health_check=[HealthCheck.too_slow])
@given(PARTS)
def test_parser_and_schema_agree(part):
    key, value = part
    table = {"steps": ["true"], key: value}
    valid = VALIDATOR.is_valid({"ci": {"jobs": {"test": table}}})
    found = None
    try:
        KEYS[key].parse(value, "here")
    except UsageError as error:
        found = error
    assert valid == (found is None) or (found is not None and is_beyond(found))


# The reference


def rows(text):
    return {
        word
        for line in text.splitlines()
        if line.startswith("| `")
        for word in re.findall(r"`([^`]+)`", line.split("|")[1])
    }


def test_the_reference_has_every_key():
    text = PAGE.read_text()
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert rows(sections["Keys of a job"]) == set(KEYS)
    assert rows(sections["Steps"]) == set(STEP_KEYS)


def test_the_schema_for_pyproject():
    """As the reference says it: the part of the schema that a pyproject.toml's one refers to."""
    told = json.loads(re.search(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])
    resource = Resource.from_contents(SCHEMA, DRAFT202012)
    registry = Registry().with_resource("microvm.schema.json", resource)
    validator = jsonschema.Draft202012Validator(told, registry=registry)
    text = EVERYTHING.replace("[ci.", "[tool.pytest-microvm.ci.") + '[tool.pytest-microvm]\nmemory = "1G"\n'
    validator.validate(tomllib.loads(text))
    assert not validator.is_valid(tomllib.loads(text.replace("timeout", "timeuot")))


def test_the_examples_of_the_reference():
    blocks = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        own = "[ci." in block
        assert parsed(block, "microvm.toml" if own else "pyproject.toml").jobs
        table = tomllib.loads(block)
        VALIDATOR.validate(table if own else table["tool"]["pytest-microvm"])
