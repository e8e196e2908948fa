"""``.pth`` files whose folders come after Python has started: what ``site`` would have made of them."""

import json
import subprocess
import sys
import textwrap

import pytest

GUARD = 60  # seconds; only against hangs

DRIVER = """
import json, site, sys
from pathlib import Path

from pytest_microvm.guest import site_paths

folder, workspace = Path(sys.argv[1]), Path(sys.argv[2])
site.addsitedir(str(folder))
site.getsitepackages, site.ENABLE_USER_SITE = lambda: [str(folder)], False
sys.path.append("/after")
before = list(sys.path)
done = site_paths.lines_in_effect()
exec(sys.argv[3])
site_paths.catch_up(done)
sys.modules.pop("sitecustomize", None)
now = [entry for entry in sys.path if entry in before or entry.startswith(str(workspace))]
print(json.dumps({"path": now[now.index(str(folder)):], "others": [e for e in sys.path if e not in now]}))
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "site").mkdir()
    return tmp_path


def catch_up(place, between):
    command = [sys.executable, "-c", DRIVER, place / "site", place / "work", textwrap.dedent(between)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=GUARD)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["path"], done.stdout


def test_folder_that_came_is_added_in_the_place_it_would_have(place):
    there = place / "there"
    there.mkdir()
    (place / "site" / "a.pth").write_text(f"{there}\n../work/one\n# ../work/no\n\n../work/never\n")
    (place / "site" / "b.pth").write_text("../work/two\n")
    path, _said = catch_up(place, "(workspace / 'one').mkdir(parents=True); (workspace / 'two').mkdir()")
    work = place / "work"
    assert path == [str(place / "site"), str(there), str(work / "one"), str(work / "two"), "/after"]


def test_nothing_came(place):
    (place / "site" / "a.pth").write_text("../work/one\n")
    path, _said = catch_up(place, "")
    assert path == [str(place / "site"), "/after"]


def test_import_line_is_executed_once(place):
    (place / "site" / "a.pth").write_text("import counted; print('line')\n")
    (place / "site" / "counted.py").write_text("print('module')\n")
    _path, said = catch_up(place, "")
    assert said.splitlines()[:-1] == ["module", "line"]


def test_import_line_that_failed_is_executed_again(place):
    (place / "site" / "a.pth").write_text("../work\nimport late; print('line')\n")
    _path, said = catch_up(place, "workspace.mkdir(); (workspace / 'late.py').write_text('')")
    assert said.count("line\n") == 1


def test_sitecustomize_of_a_folder_that_came_is_run(place):
    (place / "site" / "a.pth").write_text("../work\n")
    between = """
        workspace.mkdir()
        (workspace / "sitecustomize.py").write_text("print('customized')")
        sys.modules.pop("sitecustomize", None)
    """
    _path, said = catch_up(place, between)
    assert said.count("customized") == 1
