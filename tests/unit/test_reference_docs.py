"""The reference pages name what is in the code, all of it, and nothing else."""

import argparse
import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from _pytest.junitxml import xml_key

import pytest_microvm
from pytest_microvm import errors
from pytest_microvm.agent.path import GuestPath
from pytest_microvm.agent.process import GuestProcess
from pytest_microvm.ci.definition.keys import SPEC_KEYS
from pytest_microvm.cli import _parser
from pytest_microvm.events import Event
from pytest_microvm.images import kit_keys
from pytest_microvm.machine.instance import MachineFacts, Usage
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.network.proxy.log import NetworkRequest
from pytest_microvm.plugin import fixtures, hookspecs
from pytest_microvm.settings import configuration as config
from pytest_microvm.settings import spec
from pytest_microvm.settings.options import BY_NAME, MACHINE, OPTIONS, QUOTAS
from pytest_microvm.settings.spec import Limits, MachineSpec
from pytest_microvm.suite.arguments import SHOWING_ALONE
from pytest_microvm.suite.backend import BackendFacts
from pytest_microvm.suite.plan import _PASSED
from pytest_microvm.suite.properties import properties
from pytest_microvm.suite.summary import add_suite_properties
from pytest_microvm.tox import environment
from pytest_microvm.tox import settings as tox_settings
from pytest_microvm.tox.options import add_options

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PACKAGE = REPOSITORY / "pytest_microvm"
LIMITS = Limits(1, 512 * 1024**2, 2 * 1024**3)
FACTS = MachineFacts(
    "vm-1a2b3c4d", "python", "0" * 64, "tcg", "no kvm", 0.25, LIMITS, fork_of="vm-0", restored="db"
)
NOT_DOCUMENTED = {"hand_over", "started_by"}  # of MicroVM: for this package's own modules; the page says so


def page(name):
    return (DOCS / "reference" / name).read_text()


def rows(text):
    """Return the code words of the first column of every table."""
    first = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return {word for cell in first for word in re.findall(r"`([^`]+)`", cell)}


def cells(text, name):
    """Return the cells behind the first one of the row for ``name``, without links and code marks."""
    line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    line = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", line).replace("`", "")
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


def section(text, title):
    """Return what is below a heading, up to the next of its level."""
    return re.split(r"^## ", text.split(f"\n## {title}\n", 1)[1], flags=re.MULTILINE)[0]


def options(pytestconfig):
    return {name for option in shown_options(pytestconfig) for name in option.names()} | {"--microvm-reports"}


def shown_options(pytestconfig):
    group = pytestconfig._parser.getgroup("microvm")
    return [option for option in group.options if option.attrs().get("help") != argparse.SUPPRESS]


# options.md


def test_every_option(pytestconfig):
    assert rows(section(page("options.md"), "Command line")) == options(pytestconfig)


def test_no_page_names_an_option_that_is_not_there(pytestconfig):
    known = options(pytestconfig) | tox_options()
    for path in [REPOSITORY / "README.md", *DOCS.rglob("*.md")]:
        named = set(re.findall(r"--microvm(?:-[a-z]+)*", path.read_text()))
        assert named <= known, path


def test_choices_of_options(pytestconfig):
    text = page("options.md")
    for option in shown_options(pytestconfig):
        choices = option.attrs().get("choices") or ()
        row = next(line for line in text.splitlines() if line.startswith(f"| `{option.names()[0]}` |"))
        assert [choice for choice in choices if f"`{choice}`" not in row] == []


def test_every_configuration_key():
    assert rows(section(page("options.md"), "Configuration")) == {
        *config._PARSERS,
        *config.ELSEWHERE,
        *spec.PARSERS,
    }


def test_every_environment_variable():
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    ours = set(re.findall(r"\bPYTEST_MICROVM_[A-Z_]+\b", source))
    text = section(page("options.md"), "Environment")
    assert {name for name in rows(text) if name.startswith("PYTEST_")} == ours
    assert [name for name in _PASSED if f"`{name}`" not in text] == []


def test_every_option_that_the_machine_answers_alone():
    text = page("options.md")
    assert [name for name in SHOWING_ALONE - {"--funcargs"} if f"`{name}`" not in text] == []


def test_every_option_as_declared():
    options_page = page("options.md")
    for option in OPTIONS:
        _value, default, text = cells(options_page, f"--microvm-{option.word}")
        assert (default, text[: len(option.about)]) == (option.default, option.about)
        assert f"--microvm-{option.word}" in cells(options_page, option.name)[1]


def test_defaults():
    settings = config.Settings()
    for name, default in {
        "isolation": settings.isolation,
        "image": settings.spec.image,
        "timeout": f"{config.DEFAULT_TIMEOUT:g}",
        "output": spec.format_size(spec.DEFAULT_OUTPUT),
        "retries": str(settings.retries),
        "keep": settings.keep,
    }.items():
        assert BY_NAME[name].default == default


# quotas.md, ci-definition.md


def test_every_quota():
    table = page("quotas.md").split("\n## ")[0]
    assert rows(table) == {quota.name for quota in QUOTAS}


def test_size_and_seconds_quotas_are_formatted_in_their_unit():
    assert {quota.name for quota in QUOTAS if quota.kind == "size"} == errors._BYTES
    assert {quota.name for quota in QUOTAS if quota.kind == "seconds"} == errors._SECONDS


def test_every_option_of_a_job_as_declared():
    for name in SPEC_KEYS:
        assert cells(page("ci-definition.md"), name)[1].startswith(BY_NAME[name].about)


# fixture-api.md


def methods(code, name):
    """Return the public methods of a class, by name: arguments, result and decorators as written."""
    found = next(
        node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ClassDef) and node.name == name
    )
    return {
        node.name: [ast.unparse(part) for part in (node.args, node.returns, *node.decorator_list)]
        for node in found.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


@pytest.mark.parametrize("kind", [MicroVM, GuestProcess, GuestPath], ids=lambda kind: kind.__name__)
def test_every_method_as_it_is(kind):
    blocks = re.findall(r"```python\n(.*?)```", section(page("fixture-api.md"), kind.__name__), re.DOTALL)
    source = methods(Path(inspect.getfile(kind)).read_text(), kind.__name__)
    public = {name: told for name, told in source.items() if name not in NOT_DOCUMENTED}
    assert methods(blocks[0], kind.__name__) == public


@pytest.mark.parametrize("kind", [MicroVM, GuestProcess], ids=lambda kind: kind.__name__)
def test_every_attribute(kind):
    documented = re.search(r"Attributes:\n(.*)", inspect.getdoc(kind), re.DOTALL)[1]
    names = set(re.findall(r"^    (\w+):", documented, re.MULTILINE))
    assert names
    assert names <= rows(section(page("fixture-api.md"), kind.__name__))


def test_every_argument_of_run():
    parameters = set(inspect.signature(MicroVM.run).parameters) - {"self"}
    assert parameters <= rows(section(page("fixture-api.md"), "MicroVM"))


@pytest.mark.parametrize("kind", [MachineSpec, MachineFacts, Usage, Event], ids=lambda kind: kind.__name__)
def test_every_field(kind):
    fields = set(kind.__dataclass_fields__)
    assert fields <= rows(section(page("fixture-api.md"), "Values"))


def test_every_error():
    tree = {
        (name, kind.__mro__[1].__name__)
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and kind.__module__ == errors.__name__
    }
    lines = [line.split("|") for line in section(page("fixture-api.md"), "Errors").splitlines()]
    told = {
        tuple(cell.strip(" `") for cell in line[1:3]) for line in lines if len(line) > 3 and "`" in line[1]
    }
    assert told == tree


def test_every_keyword_of_the_marker():
    signature = re.search(r"`@pytest.mark.microvm\(([^)]*=\.\.\.)\)`", page("fixture-api.md"))[1]
    assert re.findall(r"(\w+)=\.\.\.", signature) == [option.name for option in MACHINE]


def test_every_fixture():
    names = {name for name in vars(fixtures) if re.fullmatch(r"microvm(_\w+)?", name)}
    assert rows(section(page("fixture-api.md"), "Fixtures")) == names


def test_every_public_name():
    text = section(page("fixture-api.md"), "Without pytest")
    assert [name for name in pytest_microvm.__all__ if f"`{name}`" not in text] == []


# cli.md


def test_every_command_and_its_options():
    def walk(parser, words):
        verbs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not verbs:
            yield (
                words,
                {
                    name
                    for action in parser._actions
                    for name in action.option_strings
                    if name.startswith("--") and name != "--help"
                },
            )
        for verb, inner in (verbs[0].choices if verbs else {}).items():
            yield from walk(inner, f"{words} {verb}".strip())

    expected = dict(walk(_parser(), ""))
    told = {}
    text = page("cli.md")
    for line in text.split("\n## ")[0].splitlines():
        if line.startswith("| `"):
            cells = re.split(r"(?<!\\)\|", line)
            command = " ".join(word for word in cells[1].strip(" `").split() if word.islower())
            options = cells[2]
            if "[below]" in options:  # too many for a row: the section's table has them
                rows_below = section(text, command).splitlines()
                options = " ".join(row.split("|")[1] for row in rows_below if row.startswith("| `--"))
            told[command] = set(re.findall(r"--[a-z][a-z-]*", options))
    assert told == expected


# kit-format.md, junit.md, hooks.md


def test_every_kit_key():
    assert rows(page("kit-format.md")) == set(kit_keys.CHECKS)


def test_every_junit_property():
    text = page("junit.md").split("\n## Outcomes\n")[0]
    quota = errors.QuotaExceeded("memory", 1, 2)
    denied = NetworkRequest(0.0, False, "GET", "a.example", 80, "/", None, "no rule")
    every = properties(FACTS, Usage(), "quota", quota=quota, retries=1, artifacts="folder", requests=[denied])
    assert rows(text) == {name for name, _value in every}


def test_every_property_of_the_suite():
    found = []
    xml = SimpleNamespace(add_global_property=lambda name, _value: found.append(name))
    configuration = SimpleNamespace(stash=pytest.Stash())
    configuration.stash[xml_key] = xml
    add_suite_properties(configuration, BackendFacts("tcg", "no kvm", "python", "0" * 64, ".venv"), "test")
    paragraph = next(
        part for part in page("junit.md").split("\n\n") if part.startswith("With `--microvm` the suite")
    )
    assert set(re.findall(r"`(microvm\.\w+)`", paragraph)) == set(found)


def test_every_hook_and_its_arguments():
    hooks = {
        f"{name}({', '.join(inspect.signature(hook).parameters)})"
        for name, hook in vars(hookspecs).items()
        if name.startswith("pytest_microvm_")
    }
    assert rows(page("hooks.md")) == hooks


# Every page


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text()
    pages = [path.relative_to(DOCS) for path in DOCS.rglob("*.md") if path.parent.name != "adr"]
    assert [str(path) for path in pages if path.name != "index.md" and f"({path})" not in index] == []


def test_every_decision_is_listed():
    listed = (DOCS / "adr" / "README.md").read_text()
    assert [path.name for path in DOCS.glob("adr/0*.md") if f"({path.name})" not in listed] == []


# tox.md


def tox_options():
    parser = argparse.ArgumentParser()
    parser.add_argument = lambda *names, **_about: found.update(names)
    found = set()
    add_options(parser)
    return found


def test_every_option_and_key_of_tox():
    text = page("tox.md")
    assert rows(section(text, "Command line")) - {"none"} == tox_options()
    table = [line for line in section(text, "Keys").splitlines() if line.startswith("| `")]
    told = {re.findall(r"`([^`]+)`", line)[0]: line.split("|")[2].strip() for line in table}
    assert set(told) == {f"microvm_{name}" for name in tox_settings.KEYS}
    for name, key in tox_settings.KEYS.items():
        default = key.default[0] if isinstance(key.default, list) and key.default else key.default
        assert told[f"microvm_{name}"] in (
            [f"`{default}`"] if default else ["none", "the kit's", "the kit's, else 300"]
        )
        if BY_NAME.get(name) in (BY_NAME["image"], *QUOTAS):
            assert cells(text, f"microvm_{name}")[1].startswith(key.about)


def test_what_tox_passes_by_default():
    row = next(line for line in page("tox.md").splitlines() if line.startswith("| `pass_env`"))
    by_default = row.split("By default")[1]
    assert set(re.findall(r"`([^`]+)`", by_default)) == {*environment.PASSED, *environment.PASSED_ON_TERMINAL}
