"""Every command and snippet of README.md and docs/ is run, page by page, from top to bottom.

A page has a project folder of its own, empty at first; comments before a block say more:

    <!-- project: examples -->   anywhere in the page: the folder starts as a copy of that one
    <!-- registry: REGISTRY -->  anywhere in the page: a registry runs, with its address in that variable
    <!-- file: tests/test_a.py -->   the block below is the content of that file of the project
    <!-- exit: 1 -->             the last command of the block below ends with this status, not 0

What happens to a block depends on its language:

    console   lines after `$ ` are run by one bash; the lines below a command must come in its output,
              in this order. Any number stands for any other, a digest's beginning (12 hex digits) for any
              other, a run of spaces or of a ruler's signs for a longer or shorter one, `...` for any text.
              A machine's id, such as vm-1a2b3c4d, stands for the id that came in its place; a later
              block that names the page's id gets the real one.
    python    run in the project folder. Tests go to a file, and a later command runs pytest.
    toml      must be well-formed, and what is in [tool.pytest-microvm] must be known,
              the jobs of CI among it
    yaml      must be well-formed; what a CI job in it runs (`run`, `script`, `before_script`) must be set-up
              (SET_UP), or stand in a console block of the page, where it is run
    json, ini, xml               must be well-formed
    text, mermaid                is not looked at

No other language is known, so nothing is left out by accident. `NOT_RUN` holds the only exceptions.
"""

import configparser
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import textwrap
import xml.dom.minidom
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from pytest_microvm.ci.definition.parsing import parse_definition
from pytest_microvm.errors import UsageError
from pytest_microvm.images.store import cache_root
from pytest_microvm.settings.configuration import Settings, merged
from support import guards
from support.registry import registry

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/**/*.md")), REPOSITORY / "CONTRIBUTING.md"]
OF_THEIR_OWN = {
    "how-to/ci-without-kvm.md": "test_github_action.py",
    "how-to/cluster.md": "test_ci_dask.py",
    "how-to/container-images.md": "test_container_images.py",
    "how-to/coverage.md": "test_mirrored_python.py",
    "how-to/debug-failures.md": "test_debug_adapter.py",
    "how-to/docker.md": "test_docker_kit.py",
    "how-to/expensive-fixtures.md": "test_forks.py",
    "how-to/git-version.md": "test_git_history.py",
    "how-to/own-kit.md": "test_image_build.py",
    "how-to/package-index.md": "test_network_tools.py",
    "how-to/prepare.md": "test_suites.py",
    "how-to/real-suites.md": "test_ci_published.py",
    "how-to/run-an-agent.md": "test_run.py",
    "how-to/services.md": "test_services_kit.py",
    "how-to/tox.md": "test_tox.py",
    "how-to/untrusted-plugin.md": "test_attacks.py",
    "how-to/written-files.md": "test_what_suites_leave.py",
    "how-to/xdist.md": "test_xdist_tx.py",
    "reference/quotas.md": "test_machines.py",
    "tutorial/protect-ci.md": "test_ci_run.py",
}
"""Pages that take long and are about what a file of tests shows as well: `make test-all` runs them."""
NOT_RUN = {
    r"make (setup|demo|test|test-all|unit|lint|bench)": "set-up and the whole check, which runs this test",
    r"git clone \S+( \S+)?|cd pytest-microvm": "this is the clone",
}
SET_UP = (
    r"(sudo )?apt-get (update|install) .*|sudo chmod \S+ /dev/kvm"
    r"|python3? -m (venv|pip install) .*|\. .venv/bin/activate|git clone .*|make setup"
)


def title(path):
    return str(path.relative_to(REPOSITORY))


def check_toml(text):
    tables = tomllib.loads(text)
    table = tables.get("tool", {}).get("pytest-microvm", {})
    merged(Settings(), table, "tool.pytest-microvm")
    if "ci" in table or "ci" in tables:
        parse_definition(text, "microvm.toml" if "ci" in tables else "pyproject.toml")


CHECKS = {
    "ini": lambda text: configparser.ConfigParser().read_string(text),
    "json": json.loads,
    "toml": check_toml,
    "xml": xml.dom.minidom.parseString,
    "yaml": yaml.safe_load,  # its commands: check_jobs
    "text": str,
    "mermaid": str,
}
FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```\s*$", re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r"<!-- *(\w+): *(.*?) *-->")
MARK = "-- end of a command --"


@dataclass
class Block:
    """A fenced block: where it stands, its language, its text, and what the comments before it say."""

    where: str
    language: str
    text: str
    directives: dict = field(default_factory=dict)


def blocks(page, name):
    """Return the blocks of a page's text."""
    found = []
    for fence in FENCE.finditer(page):
        before = page[: fence.start()].rstrip("\n").splitlines()
        directives = {}
        while before and (match := DIRECTIVE.fullmatch(before[-1].strip())):
            directives[match[1]] = match[2]
            before.pop()
        where = f"{name}:{page.count(chr(10), 0, fence.start()) + 1}"
        unknown = set(directives) - {"project", "file", "exit"}
        assert not unknown, f"{where}: unknown directive: {unknown}"
        found.append(Block(where, fence[2], textwrap.dedent(fence[3]), directives))
    return found


def commands(text):
    """Return [(command, the output lines below it)] of a console block."""
    found = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found and not found[-1][1] and found[-1][0].endswith("\\"):
            found[-1] = (found[-1][0] + "\n" + line.removeprefix("> "), [])
        else:
            assert found, f"output before the first command: {line!r}"
            found[-1][1].append(line)
    return found


LOOSE = re.compile(
    r"(?P<id>\bvm-[0-9a-f]{8}\b)|(?P<digest>\b(?=[a-f]*\d)[0-9a-f]{12}\b)|(?P<number>\d+(?:\.\d+)?)"
    r"|(?P<any>\.\.\.|…)|(?P<space> +)|(?P<ruler>={3,}|-{3,}|_{3,})"
)
KINDS = {"digest": "[0-9a-f]{12}", "number": r"\d+(\.\d+)?", "any": ".*", "space": r"\s+"}


def line_pattern(line, ids):
    """Return what a printed line must match, and the page's new ids in the order of its groups."""
    pattern, new, end = "", [], 0
    for found in LOOSE.finditer(line):
        pattern += re.escape(line[end : found.start()])
        end = found.end()
        name = found["id"]
        if name and name not in ids and name not in new:
            new.append(name)
            pattern += f"(?P<id{len(new)}>vm-[0-9a-f]{{8}})"
        elif name:
            pattern += ids.get(name) or f"(?P=id{new.index(name) + 1})"
        elif found["ruler"]:
            pattern += re.escape(found["ruler"][0]) + "+"
        else:
            pattern += KINDS[found.lastgroup]
    return pattern + re.escape(line[end:]), new


def first_missing(expected, actual, ids):
    """Return the first of the ``expected`` lines that does not come in ``actual``, in order, or None.

    ``ids`` learns which machines the page's ids stand for.
    """
    lines = iter(actual)
    for line in filter(str.strip, expected):
        pattern, new = line_pattern(line.strip(), ids)
        for candidate in lines:
            shown = re.sub(r" \(\d+:\d\d:\d\d\)", "", candidate.strip())  # pytest: after a minute, that too
            if match := re.fullmatch(pattern, shown):
                ids.update({name: match[f"id{number}"] for number, name in enumerate(new, 1)})
                break
        else:
            return line
    return None


def job_commands(value):
    """Yield the commands of a CI configuration's jobs, line by line."""
    if isinstance(value, list):
        for inner in value:
            yield from job_commands(inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in {"run", "script", "before_script"}:
                for text in inner if isinstance(inner, list) else [inner]:
                    yield from filter(None, map(str.strip, text.splitlines()))
            else:
                yield from job_commands(inner)


def check_jobs(block, page):
    """Check that what a CI job runs is run by this page, or is set-up."""
    consoles = [other.text for other in blocks(page, "") if other.language == "console"]
    shown = {command for text in consoles for command, _output in commands(text)}
    for command in job_commands(yaml.safe_load(block.text)):
        known = command in shown or re.fullmatch(SET_UP, command)
        assert known, f"{block.where}: no console block of this page runs {command!r}"


def run_console(block, project, ids):
    """Run a console block and compare what it prints."""
    wanted = [
        (command, output)
        for command, output in commands(block.text)
        if not any(re.fullmatch(pattern, command) for pattern in NOT_RUN)
    ]
    if not wanted:
        return
    script = "".join(f"{command}\nprintf '\\n%s %s\\n' '{MARK}' $?\n" for command, _ in wanted)
    script = re.sub(r"\bvm-[0-9a-f]{8}\b", lambda found: ids.get(found[0], found[0]), script)
    done = run(["bash", "-c", script], project)
    outputs = re.split(rf"\n{MARK} (\d+)\n", done.stdout)
    statuses = [int(status) for status in outputs[1::2]]
    expected = [0] * (len(wanted) - 1) + [int(block.directives.get("exit", 0))]
    assert statuses == expected, f"{block.where}: exit statuses\n{done.stdout}"
    for (command, lines), printed in zip(wanted, outputs[::2], strict=False):
        missing = first_missing(lines, printed.splitlines(), ids)
        assert missing is None, f"{block.where}: `{command}` did not print {missing!r}, but\n{printed}"


def run(argv, project):
    of_this_run = re.compile(r"PYTEST_(?!MICROVM)")  # what this pytest tells its own tests
    environment = {name: value for name, value in os.environ.items() if not of_this_run.match(name)}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "100"}
    runtime = project.parent / "runtime"  # other tests' machines are not on the pages
    runtime.mkdir(mode=0o700, exist_ok=True)
    environment["XDG_RUNTIME_DIR"] = str(runtime)
    environment["XDG_STATE_HOME"] = str(
        project.parent / "state"
    )  # what pages trust is not trusted afterwards
    return subprocess.run(
        argv,
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=guards.SUITE,
        check=False,
    )


def run_page(page, name, project):
    """Run a page's blocks from top to bottom."""
    source = re.search(r"<!-- *project: *(\S+) *-->", page)
    if source:
        shutil.copytree(REPOSITORY / source[1], project, dirs_exist_ok=True)
    tests_not_run = None
    ids = {}
    for block in blocks(page, name):
        if block.language == "console":
            run_console(block, project, ids)
            if "pytest" in block.text:
                tests_not_run = None
            continue
        if block.language == "python":
            compile(block.text, block.where, "exec")
        else:
            assert block.language in CHECKS, f"{block.where}: a block of language {block.language!r}"
            CHECKS[block.language](block.text)
        if block.language == "yaml":
            check_jobs(block, page)
        if path := block.directives.get("file"):
            project.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
            project.joinpath(path).write_text(block.text)
            if Path(path).name.startswith("test_"):
                tests_not_run = block.where
        elif block.language == "python":
            assert "def test_" not in block.text, f"{block.where}: tests need a file: directive"
            done = run([sys.executable, "-c", block.text], project)
            assert done.returncode == 0, f"{block.where}\n{done.stdout}"
    assert tests_not_run is None, f"{tests_not_run}: no command below runs these tests"


def pages():
    """Return the pages as parameters; those with tests of their own are for `make test-all`."""
    long = {REPOSITORY / "docs" / name for name in OF_THEIR_OWN}
    assert long <= set(PAGES)
    return [pytest.param(path, marks=[pytest.mark.thorough] if path in long else []) for path in PAGES]


@contextmanager
def registry_of(page, folder, monkeypatch):
    """Run the registry that a page asks for, with a home whose skopeo knows that it speaks no TLS."""
    wanted = re.search(r"<!-- *registry: *(\w+) *-->", page)
    if not wanted:
        yield
        return
    folder.mkdir()
    with registry(folder) as running:
        monkeypatch.setenv(wanted[1], running.address)
        monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(cache_root()))
        monkeypatch.setenv("HOME", str(running.home))
        yield


@pytest.mark.parametrize("path", pages(), ids=title)
def test_page(path, tmp_path, monkeypatch):
    project = tmp_path / f"project-{secrets.token_hex(4)}"  # a new place: no template of an earlier run fits
    project.mkdir()
    page = path.read_text()
    with registry_of(page, tmp_path / "registry", monkeypatch):
        run_page(page, path.relative_to(REPOSITORY), project)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCE.sub("", path.read_text()))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (path.parent / link).exists()] == []


# The check itself

GOOD_PAGE = """
<!-- file: greet.py -->
```python
print("hello 42")
```

Then:

```console
$ python greet.py
hello 17
$ export WHO=you && echo $WHO \\
> and me
you ...
```

1. In a list

   <!-- exit: 3 -->
   ```console
   $ echo first; echo second; echo third
   first
   third
   $ (exit 3)
   ```

```toml
[tool.pytest-microvm]
memory = "512M"
```

<!-- file: tests/test_greet.py -->
```python
def test_greet():
    assert True
```

```console
$ python -m pytest -q -p no:cacheprovider
1 passed in 0.01s
```

```console
$ echo ==== vm-00000001 of abcdef123456 is here, vm-00000001 is not there ====
=== vm-1a2b3c4d of 0123456789ab   is here, vm-1a2b3c4d is not there ======
```

```console
$ echo enter vm-1a2b3c4d && test vm-1a2b3c4d = vm-00000001
enter vm-1a2b3c4d
```

```yaml
job:
  script:
    - python -m pip install something
    - python greet.py
```
"""


def test_a_page_that_is_right(tmp_path):
    run_page(GOOD_PAGE, "page.md", tmp_path)
    assert (tmp_path / "tests" / "test_greet.py").is_file()


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("hello 17", "hello world", "did not print 'hello world'"),
        ("$ (exit 3)", "$ (exit 4)", "exit statuses"),
        ("$ python greet.py", "$ python gret.py", "exit statuses"),
        ("first\n   third", "third\n   first", "did not print 'first'"),
        ("assert True", "assert False", "exit statuses"),
        ('print("hello 42")', 'print("hello 42"', "was never closed"),
        ("<!-- file: tests/test_greet.py -->", "", "need a file"),
        ("$ python -m pytest -q -p no:cacheprovider\n1 passed in 0.01s", "$ true", "no command below runs"),
        ('memory = "512M"', 'ram = "512M"', "unknown key 'ram'"),
        ('memory = "512M"', "memory = 512M", "newline"),
        ("```python", "```py", "language 'py'"),
        ("<!-- exit: 3 -->", "<!-- skip: tired -->", "unknown directive"),
        ("\nenter vm-1a2b3c4d", "\nenter vm-1a2b3c4d twice", "did not print 'enter vm-1a2b3c4d twice'"),
        ("here, vm-00000001", "here, vm-00000002", "did not print '=== vm-1a2b3c4d"),
        ("- python greet.py", "- python other.py", "no console block of this page runs 'python other.py'"),
    ],
)
def test_a_page_that_is_wrong(tmp_path, right, wrong, message):
    assert right in GOOD_PAGE
    with pytest.raises(
        (AssertionError, SyntaxError, UsageError, tomllib.TOMLDecodeError), match=re.escape(message)
    ):
        run_page(GOOD_PAGE.replace(right, wrong), "page.md", tmp_path)


def test_only_whole_commands_are_left_out():
    assert not any(re.fullmatch(pattern, "make demo && pytest") for pattern in NOT_RUN)
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in ("setup", "demo", "test", "test-all", "unit", "lint", "bench"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
