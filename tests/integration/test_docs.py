"""Every command and snippet of README.md and docs/ is run, page by page, from top to bottom.

A page has a project folder of its own, empty at first; comments before a block say more:

    <!-- project: examples -->   anywhere in the page: the folder starts as a copy of that one
    <!-- file: tests/test_a.py -->   the block below is the content of that file of the project
    <!-- exit: 1 -->             the last command of the block below ends with this status, not 0

What happens to a block depends on its language:

    console   lines after `$ ` are run by one bash; the lines below a command must come in its output,
              in this order. Any number stands for any other, and `...` for any text.
    python    run in the project folder. Tests go to a file, and a later command runs pytest.
    toml      must be well-formed, and what is in [tool.pytest-microvm] must be known
    yaml, json, ini, xml         must be well-formed
    text, mermaid                is not looked at

No other language is known, so nothing is left out by accident. `NOT_RUN` holds the only exceptions.
"""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import xml.dom.minidom
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from pytest_microvm.config import Settings, merged
from pytest_microvm.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/**/*.md")), REPOSITORY / "CONTRIBUTING.md"]
NOT_RUN = {
    r"make (setup|demo|test|unit|lint|bench)": "set-up and the whole check, which runs this test",
    r"git clone \S+( \S+)?|cd pytest-microvm": "this is the clone",
}
GUARD = 1800  # seconds for one block, on a slow machine that builds images


def check_toml(text):
    table = tomllib.loads(text).get("tool", {}).get("pytest-microvm", {})
    merged(Settings(), table, "tool.pytest-microvm")


CHECKS = {
    "ini": lambda text: configparser.ConfigParser().read_string(text),
    "json": json.loads,
    "toml": check_toml,
    "xml": xml.dom.minidom.parseString,
    "yaml": yaml.safe_load,
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


def first_missing(expected, actual):
    """Return the first of the ``expected`` lines that does not come in ``actual``, in order, or None."""
    lines = iter(actual)
    for line in expected:
        pattern = re.escape(line.strip()).replace(r"\.\.\.", ".*").replace("…", ".*")
        pattern = re.sub(r"\d+(\\\.\d+)?", r"\\d+(\\.\\d+)?", pattern)
        if not any(re.fullmatch(pattern, candidate.strip()) for candidate in lines):
            return line
    return None


def run_console(block, project):
    """Run a console block and compare what it prints."""
    wanted = [
        (command, output)
        for command, output in commands(block.text)
        if not any(re.fullmatch(pattern, command) for pattern in NOT_RUN)
    ]
    if not wanted:
        return
    script = "".join(f"{command}\nprintf '\\n%s %s\\n' '{MARK}' $?\n" for command, _ in wanted)
    done = run(["bash", "-c", script], project)
    outputs = re.split(rf"\n{MARK} (\d+)\n", done.stdout)
    statuses = [int(status) for status in outputs[1::2]]
    expected = [0] * (len(wanted) - 1) + [int(block.directives.get("exit", 0))]
    assert statuses == expected, f"{block.where}: exit statuses\n{done.stdout}"
    for (command, lines), printed in zip(wanted, outputs[::2], strict=False):
        missing = first_missing(lines, printed.splitlines())
        assert missing is None, f"{block.where}: `{command}` did not print {missing!r}, but\n{printed}"


def run(argv, project):
    of_this_run = re.compile(r"PYTEST_(?!MICROVM)")  # what this pytest tells its own tests
    environment = {name: value for name, value in os.environ.items() if not of_this_run.match(name)}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "100"}
    return subprocess.run(
        argv,
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=GUARD,
        check=False,
    )


def run_page(page, name, project):
    """Run a page's blocks from top to bottom."""
    source = re.search(r"<!-- *project: *(\S+) *-->", page)
    if source:
        shutil.copytree(REPOSITORY / source[1], project, dirs_exist_ok=True)
    tests_not_run = None
    for block in blocks(page, name):
        if block.language == "console":
            run_console(block, project)
            if "pytest" in block.text:
                tests_not_run = None
            continue
        if block.language == "python":
            compile(block.text, block.where, "exec")
        else:
            assert block.language in CHECKS, f"{block.where}: a block of language {block.language!r}"
            CHECKS[block.language](block.text)
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


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_page(path, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    run_page(path.read_text(), path.relative_to(REPOSITORY), project)


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
    for target in ("setup", "demo", "test", "unit", "lint", "bench"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
