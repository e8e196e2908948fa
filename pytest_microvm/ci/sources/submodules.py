"""Where the repositories of a commit's submodules are on this computer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_microvm.ci.sources.git_objects import borrowed
from pytest_microvm.errors import UsageError
from pytest_microvm.git.commands import GitError
from pytest_microvm.git.repository import Repository, repository_at, with_own_objects

_KEY = re.compile(r"submodule\.(.+)\.path", re.DOTALL)


def module_names(repository: Repository, gitmodules: str) -> Mapping[str, str]:
    """Return the submodules' names by their paths.

    git-config(1) reads the blob alone; by itself it would follow its includes.

    Args:
        repository: Where the blob is.
        gitmodules: The name of the blob that is the commit's ``.gitmodules``.
    """
    asked = ("config", "--no-includes", "--blob", gitmodules, "-z", "--get-regexp", r"^submodule\..*\.path$")
    try:
        listed = repository.git(*asked)
    except GitError:  # it has none, or is no configuration
        return {}
    names = {}
    for item in listed.split("\0"):
        key, _newline, path = item.partition("\n")
        found = _KEY.fullmatch(key)
        if found and _is_safe(found[1]):
            names[path.removesuffix("/")] = found[1]
    return names


def find_module(name: str | None, folders: Sequence[Path], kind: str, commit: str) -> Repository | None:
    """Return the repository of a submodule if it is here and has the commit.

    Args:
        name: The submodule's name, if it has one.
        folders: Where repositories of submodules are.
        kind: The hash it has to use.
        commit: What is wanted of it.
    """
    for folder in folders if name else ():
        place = folder / str(name)
        if not (place / "objects").is_dir() or not place.resolve().is_relative_to(folder.resolve()):
            continue
        try:
            module = repository_at(place)
            if module is None or module.format != kind:
                continue
            with borrowed(with_own_objects(module)) as repository:
                repository.git("cat-file", "-e", f"{commit}^{{tree}}")
        except (GitError, UsageError):
            continue
        return module
    return None


def _is_safe(name: str) -> bool:
    """Whether a name stays where names belong; git's own check is check_submodule_name()."""
    names = re.split(r"[/\\]", name)
    return not name.startswith("-") and "" not in names and "." not in names and ".." not in names
