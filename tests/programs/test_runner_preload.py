"""Plug-ins' modules that are imported ahead: held back, and served where an import would find the same."""

import json
import os
import subprocess
import sys
import textwrap
import time
from importlib import metadata
from pathlib import Path

import pytest

import pytest_microvm
from support.tiers import thorough_but

NEEDED = ("pytest", "pluggy", "iniconfig", "packaging", "pygments", "tomli", "exceptiongroup")
GUARD = 120  # seconds; only against hangs

DRIVER = """
import json, os, sys, traceback
here = set(sys.modules)
from pytest_microvm.guest import runner_preload
import pytest
os.environ["RUNNER"] = str(os.getpid())  # what a plug-in tells the child from
environ, path = dict(os.environ), list(sys.path)
exec(os.environ.get("BEFORE", ""))
held = runner_preload.preload()
result = {
    "held": sorted(held._places),
    "unchanged": environ == dict(os.environ) and path == sys.path,
    "early": sorted(set(sys.modules) & set(held._places)),
}
exec(os.environ.get("BETWEEN", ""))
held.install()
sys.path.insert(0, os.getcwd())
result["code"] = int(pytest.main([*sys.argv[2:], "-q", "-p", "no:cacheprovider"]))
result["late"] = sorted(set(sys.modules) & {"plug", "plug_lazy", "plug_never", "second"})
open(sys.argv[1], "w").write(json.dumps(result))
"""

PLUG = """
import os
import pytest

pytest.register_assert_rewrite("plug_never")
with open(os.environ["RUNS"], "a") as file:
    file.write("plug ")

def pytest_configure(config):
    with open(os.environ["RUNS"], "a") as file:
        file.write("configure ")

def pytest_collection_modifyitems():
    import plug_lazy
"""
LAZY = """
import os

with open(os.environ["RUNS"], "a") as file:
    file.write("lazy ")

def check(value):
    assert value == 1
"""
TEST = """
import plug, plug_lazy, plug_never

def test_it(request):
    assert request.config.pluginmanager.get_plugin("plug") is plug
"""


@pytest.fixture(scope="session")
def bare_site(tmp_path_factory):
    """A folder with pytest and what it needs: no plug-in of this environment is found."""
    folder = tmp_path_factory.mktemp("site")
    for name in NEEDED:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # this Python does not need it
            continue
        for top in {file.parts[0] for file in distribution.files if ".." not in file.parts}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    (folder / "pytest_microvm").symlink_to(Path(pytest_microvm.__file__).parent)
    return folder


class World:
    """A folder of plug-ins, a project, and a Python that has nothing else."""

    def __init__(self, folder, bare_site):
        self.plugins, self.project = folder / "plugins", folder / "project"
        self.plugins.mkdir()
        self.project.mkdir()
        self.runs = folder / "runs"
        self._result = folder / "result.json"
        self._path = [str(self.plugins), str(bare_site)]
        self.install("plug", PLUG, plug_lazy=LAZY, plug_never="def check(value):\n    assert value == 1\n")
        self.write("test_it.py", TEST)

    def install(self, name, text, **others):
        """Install a plug-in: a distribution with an entry point and its modules."""
        (self.plugins / f"{name}.py").write_text(textwrap.dedent(text))
        for other, content in others.items():
            (self.plugins / f"{other}.py").write_text(content)
        info = self.plugins / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[pytest11]\n{name} = {name}\n")
        files = [f"{module}.py,," for module in (name, *others)]
        (info / "RECORD").write_text("\n".join(files) + "\n")

    def write(self, name, text):
        (self.project / name).write_text(textwrap.dedent(text))

    def run(self, *arguments, before="", between="", **variables):
        """Execute ``before``, import ahead, execute ``between``, run the tests; return what was found."""
        self.runs.write_text("")
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(self._path),
            "RUNS": str(self.runs),
            "BEFORE": before,
            "BETWEEN": between,
            "PYTHONDONTWRITEBYTECODE": "1",
            **variables,
        }
        command = [sys.executable, "-S", "-c", DRIVER, self._result, self.project / "test_it.py", *arguments]
        done = subprocess.run(
            command,
            cwd=self.project,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=GUARD,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return {
            **json.loads(self._result.read_text()),
            "out": done.stdout,
            "runs": self.runs.read_text().split(),
        }


@pytest.fixture
def world(tmp_path, bare_site):
    return World(tmp_path, bare_site)


AHEAD = ["plug", "configure", "lazy", "plug", "lazy"]  # in the child, whose hooks run, then in the runner


def test_plugin_modules_are_imported_once_and_held_back(world):
    found = world.run()
    assert {"plug", "plug_lazy"} <= set(found["held"])
    assert "plug_never" not in found["held"]  # no session of plug-ins alone loads it
    assert (found["early"], found["unchanged"]) == ([], True)
    assert found["runs"] == [*AHEAD, "configure"]
    assert found["code"] == 0, found["out"]


def test_without_the_mechanism_the_session_imports_them(world):
    """The control: the count tells modules that are served from those that are imported anew."""
    found = world.run(between="held._groups.clear()")
    assert found["runs"] == [*AHEAD, "plug", "configure", "lazy"]


@pytest.mark.parametrize("module", ["plug_lazy", "plug_never"])
def test_assertions_of_plugins_are_rewritten(world, module):
    world.write("test_it.py", f"import {module}\n\ndef test_it():\n    {module}.check(2)\n")
    found = world.run()
    assert "assert 2 == 1" in found["out"]


def test_plain_assertions_are_not_rewritten(world):
    world.write("test_it.py", "import plug_lazy\n\ndef test_it():\n    plug_lazy.check(2)\n")
    found = world.run("--assert=plain")
    assert "assert 2 == 1" not in found["out"]
    assert found["runs"] == [*AHEAD, "plug", "configure", "lazy"]


def test_plugin_that_is_switched_off_is_not_loaded(world):
    world.write("test_it.py", "def test_it():\n    pass\n")
    found = world.run("-p", "no:plug")
    assert (found["code"], found["late"]) == (0, [])


def test_nothing_is_imported_where_autoload_is_disabled(world):
    world.write("test_it.py", "def test_it():\n    pass\n")
    found = world.run(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert (found["held"], found["runs"], found["late"]) == ([], [], [])


def test_project_module_of_the_same_name_comes_first(world):
    world.write("plug_lazy.py", "MINE = True\n")
    world.write("test_it.py", "import plug_lazy\n\ndef test_it():\n    assert plug_lazy.MINE\n")
    assert world.run()["code"] == 0


def test_stand_in_of_a_conftest_stays(world):
    world.write(
        "conftest.py", "import sys, types\n\nsys.modules['plug_lazy'] = types.ModuleType('stand_in')\n"
    )
    world.write(
        "test_it.py", "import plug_lazy\n\ndef test_it():\n    assert plug_lazy.__name__ == 'stand_in'\n"
    )
    assert world.run()["code"] == 0


def test_module_that_changed_meanwhile_is_imported_anew(world):
    lazy = world.plugins / "plug_lazy.py"
    found = world.run(between=f"open({str(lazy)!r}, 'a').write('NEW = 1')")
    assert found["runs"] == [*AHEAD, "configure", "lazy"]  # plug itself is as it was


def test_module_that_coverage_measures_is_imported_anew(world):
    lazy = world.plugins / "plug_lazy.py"
    found = world.run(between=f"held.is_measured = lambda *it: it == ('plug_lazy', {str(lazy)!r})")
    assert found["runs"] == [*AHEAD, "configure", "lazy"]


def test_deleted_module_is_imported_anew(world):
    world.write(
        "test_it.py", "import sys, plug_lazy\n\ndel sys.modules['plug_lazy']\nimport plug_lazy\n" + TEST
    )
    found = world.run()
    assert found["runs"] == [*AHEAD, "configure", "lazy"]


EFFECTS = [
    "os.environ['LEFT'] = '1'",
    "sys.path.append('/left')",
    "sys.meta_path.append(type('Finder', (), {'find_spec': lambda *_: None})())",
    "import warnings; warnings.warn('look')",
    "import warnings; warnings.simplefilter('ignore')",
    "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "os.chdir('/')",
    "assert os.getpid() != int(os.environ['RUNNER'])",
]


@pytest.mark.parametrize("effect", thorough_but(EFFECTS, *EFFECTS[:2], EFFECTS[5]))
def test_plugin_with_import_side_effects_is_not_preloaded(world, effect):
    note = "with open(os.environ['RUNS'], 'a') as file: file.write('second ')"
    world.install("second", f"import os, sys\n{note}\n{effect}\n")
    found = world.run(between="os.environ['RUNNER'] = '0'")
    assert "second" not in found["held"]
    assert found["unchanged"]
    assert found["runs"].count("second") == 3
    assert found["code"] == 0, found["out"]


def in_the_child(world, action):
    world.install(
        "second",
        f"""
        import os, subprocess, time

        def pytest_configure(config):
            if os.getpid() != int(os.environ["RUNNER"]):
                {action}
        """,
    )


@pytest.mark.parametrize("action", ["os._exit(7)", "os.kill(os.getpid(), 9)", "time.sleep(1000)"])
def test_child_that_gives_no_answer_costs_only_the_advantage(world, action):
    in_the_child(world, action)
    found = world.run(before="runner_preload._CHILD_TIMEOUT = 2")
    assert (found["held"], found["code"]) == ([], 0), found["out"]


def test_processes_of_the_child_end_with_it(world):
    in_the_child(
        world, "print(subprocess.Popen(['sleep', '1000']).pid, file=open(os.environ['RUNS'] + '.pid', 'w'))"
    )
    assert "second" in world.run()["held"]
    stat = Path("/proc", world.runs.with_suffix(".pid").read_text().strip(), "stat")
    deadline = time.monotonic() + GUARD
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.01)


def test_a_module_that_notes_where_it_is_imported_has_noted_the_projects_folder(world):
    """The import ahead ran in another one; hypothesis keeps its examples where it is imported."""
    world.install(
        "notes",
        """
        import os
        from pathlib import Path

        HERE, BELOW, OTHER = os.getcwd(), Path.cwd() / ".notes", Path("/usr")
        """,
    )
    world.write(
        "test_it.py",
        """
        import os
        from pathlib import Path
        import notes

        def test_it():
            assert notes.HERE == os.getcwd()
            assert notes.BELOW == Path.cwd() / ".notes"
            assert notes.OTHER == Path("/usr")
        """,
    )
    found = world.run()
    assert "notes" in found["held"]
    assert found["code"] == 0, found["out"]
