"""The actions that ours uses, as functions of this computer: setup-python, cache, upload-artifact."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

# Inputs as their action.yml has them.
_INPUTS = {
    "setup-python": {"python-version", "update-environment"},
    "restore": {"path", "key", "restore-keys", "fail-on-cache-miss", "lookup-only"},
    "save": {"path", "key", "upload-chunk-size"},
    "upload-artifact": {"name", "path", "if-no-files-found", "retention-days", "overwrite"},
}
_REFUSED = set('":<>|*?\r\n')  # upload-artifact fails with one of these in a path


def _check(action, given):
    unknown = set(given) - _INPUTS[action]
    assert not unknown, f"{action} has no inputs {unknown}"


def setup_python(runner, given):
    """Return this Python; the environment of the job stays as it is."""
    _check("setup-python", given)
    assert given["update-environment"] == "false"
    return {"python-path": sys.executable}


def _archive(runner, given):
    """Caches are found by key and by the paths as they were given."""
    assert given["path"], "path is required"
    assert given["key"], "key is required"
    assert len(given["key"]) <= 512
    assert "," not in given["key"]
    digest = hashlib.sha256(f"{given['path']}\n{given['key']}".encode()).hexdigest()
    return runner.caches / f"{digest}.tar"


def restore(runner, given):
    """Unpack a cache to the paths where it was packed."""
    _check("restore", given)
    archive = _archive(runner, given)
    if not archive.exists():
        return {"cache-primary-key": given["key"], "cache-hit": ""}
    subprocess.run(["tar", "--extract", "-P", "--file", archive], check=True)
    return {"cache-primary-key": given["key"], "cache-matched-key": given["key"], "cache-hit": "true"}


def save(runner, given):
    """Pack a cache, unless there is one with that key: caches are never replaced."""
    _check("save", given)
    archive = _archive(runner, given)
    if not archive.exists() and Path(given["path"]).exists():
        runner.caches.mkdir(parents=True, exist_ok=True)
        subprocess.run(["tar", "--create", "--sparse", "-P", "--file", archive, given["path"]], check=True)
    return {}


def upload_artifact(runner, given):
    """Copy the files, links followed, as an artifact that must not be there yet."""
    _check("upload-artifact", given)
    source, target = Path(given["path"]), runner.artifacts / given["name"]
    assert given["if-no-files-found"] == "ignore"
    assert given["retention-days"].isdecimal()
    assert not target.exists(), f"there is an artifact {given['name']} already"
    files = [path for path in source.rglob("*") if path.is_file()]
    bad = [path for path in files if _REFUSED & set(str(path.relative_to(source)))]
    assert not bad, f"the name of an artifact's file is not valid: {bad}"
    for path in files:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    return {"artifact-id": "1"}


# Each takes the runner and its inputs, and returns its outputs, by name.
ACTIONS = {
    "actions/setup-python": setup_python,
    "actions/cache/restore": restore,
    "actions/cache/save": save,
    "actions/upload-artifact": upload_artifact,
}
