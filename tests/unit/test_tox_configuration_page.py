"""docs/reference/tox-configuration.md names each key of tox, and what obeys it under ``--microvm``."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pytest_microvm.tox import settings

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "tox-configuration.md").read_text()
RELEASE = tuple(map(int, version("tox").split(".")[:2]))
OURS = {f"microvm_{name}" for name in settings.KEYS}

pytestmark = pytest.mark.skipif(RELEASE < (4, 67), reason="the page is about tox 4.67")

TOX_INI = """
[testenv:script]
runner = virtualenv-pep-723
script = script.py
[testenv:wheel]
package = wheel
[testenv:built]
package = wheel
package_env = pkg
wheel_build_env = pkg
[testenv:external]
package = external
"""
ASK = """
import json, sys
from tox.provision import provision
from tox.run import setup_state
state = setup_state(["config", *sys.argv[1:]])
provision(state)
envs = {name: list(state.envs[name].conf) for name in state.envs.iter(only_active=False, package=True)}
print(json.dumps({**envs, "core": list(state.conf.core)}))
"""


def rows(title):
    """Return, for each key of a section's table, the last column."""
    table = PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {key: who.strip(" |") for names, _does, who in lines for key in re.findall(r"`([^`]+)`", names)}


def keys(folder, *options):
    """Return the keys that tox registers: the core's, environments', and package environments'."""
    (folder / "tox.ini").write_text(TOX_INI)
    (folder / "script.py").write_text("")
    (folder / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1"\n')
    done = subprocess.run(
        [sys.executable, "-I", "-c", ASK, *options], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    core = set(found.pop("core"))
    package = [found.pop(name) for name in list(found) if name.startswith((".pkg", "pkg"))]
    return core, set().union(*found.values()), set().union(*package)


def test_page_names_each_key_and_who_obeys_it(tmp_path):
    core, environment, package = keys(tmp_path)
    our_core, our_environment, our_package = keys(tmp_path, "--microvm")
    assert our_package == set()
    assert set(rows("Core")) == core | our_core
    assert set(rows("Environments")) == (environment | our_environment) - OURS
    assert set(rows("Package environments")) == package - (environment - {"package_root"})
    assert set(rows("Package environments").values()) == {"nobody"}
    told = {**rows("Core"), **rows("Environments")}
    obeyed = {key for key, who in told.items() if who != "nobody"}
    assert ((core - our_core) | (environment - our_environment)) & obeyed == set()


def test_each_answer_in_the_tables_is_explained_on_the_page():
    explained = set(re.findall(r"^- \*\*(\w+)\*\*", PAGE, re.MULTILINE))
    for title in ("Core", "Environments"):
        for key, who in rows(title).items():
            assert re.split(r"\W", who)[0] in explained, key
