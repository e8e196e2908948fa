"""An entry in the table of options is all that front ends need, tried with a quota that does not exist."""

import subprocess
import sys
from pathlib import Path

import pytest

from pytest_microvm.settings.options import OPTIONS
from support import guards

REPOSITORY = Path(__file__).resolve().parents[2]
WITH_ONE_MORE = """
import importlib.util, sys
from pathlib import Path
import pytest
found = importlib.util.find_spec("pytest_microvm.settings.options")
source = Path(found.origin).read_text()
begin = "OPTIONS: tuple[Option, ...] = (\\n"
assert source.count(begin) == 1
entry = "Option('inodes', 'quota', 'count', 'files it may make', unit='files', least=1, most=9),\\n"
options = sys.modules[found.name] = importlib.util.module_from_spec(found)
exec(source.replace(begin, begin + entry), options.__dict__)
from pytest_microvm.ci.definition.parsing import parse_definition
from pytest_microvm.ci.definition.schema import definition_schema
from pytest_microvm.ci.gitlab.settings import parse_settings
from pytest_microvm.cli import main
from pytest_microvm.settings.configuration import Settings, merged
from pytest_microvm.images.resources import parse_resources
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.tox.settings import KEYS
"""
JOB = '[ci.jobs.test]\nsteps = ["true"]\ninodes = 10'
FRONT_ENDS = {
    "pytest": ("pytest.main(['--assert=plain', '--help'])", "--microvm-inodes=N "),
    "command": ("main(['run', '--help'])", "--inodes N "),
    "marker": ("pytest.main(['--assert=plain', '--markers'])", "@pytest.mark.microvm(image, inodes, "),
    "factory": ("MachineSpec().with_changes({'inode': 1}, 'microvm_factory()')", ", inodes, "),
    "configuration": ("merged(Settings(), {'inode': 1}, 'pyproject.toml')", ", inodes, "),
    "kit": ("parse_resources(Path('kit.toml'), 'resources', {'inode': 1})", ", inodes, "),
    "CI": (
        f"parse_definition({JOB!r}, 'microvm.toml')",
        "inodes: invalid number of files: expected 1 to 9, got 10",
    ),
    "schema": (
        "print(definition_schema()['$defs']['job']['properties']['inodes'])",
        "'files it may make', 'type': 'integer', 'minimum': 1, 'maximum': 9",
    ),
    "GitLab": ("parse_settings('[machine]\\ninode = 1', 'gitlab.toml', Path('/'))", ", inodes, "),
    "tox": ("print(KEYS['inodes'])", "files it may make"),
}
PAGES = (
    "test_every_option",
    "test_every_configuration_key",
    "test_every_quota",
    "test_every_keyword_of_the_marker",
)


def output_with_one_more(code):
    return subprocess.run(
        [sys.executable, "-c", WITH_ONE_MORE + code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=guards.PROCESS,
        check=False,
    ).stdout


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_new_quota_is_in_every_front_end(front_end):
    code, expected = FRONT_ENDS[front_end]
    assert expected in output_with_one_more(code)


def test_new_quota_is_missed_in_every_page():
    pages = "tests/unit/test_reference_docs.py"
    output = output_with_one_more(
        f"pytest.main({['-q', '--assert=plain', *(f'{pages}::{name}' for name in PAGES)]})"
    )
    assert [name for name in PAGES if f"FAILED {pages}::{name} " not in output] == [], output


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_option_is_declared_completely(option):
    assert bool(option.choices) == (option.kind == "choice")
    assert bool(option.unit) == (option.kind == "count")
    assert bool(option.least_for) == (option.kind == "size" and option.least > 0)
    assert option.most > option.least or option.kind not in ("count", "cpus")
    assert not option.about.endswith(".")
