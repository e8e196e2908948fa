"""Hostile projects as branches of a git repository with an honest default branch, for ``ci run`` and GitLab.

tests/attacks/README.md says what the tables ``[ci]``, ``[dask]`` and ``[gitlab]`` of ``attack.toml`` hold.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from junitparser import JUnitXml

from pytest_microvm.images.store import cache_root
from pytest_microvm.settings.configuration import tomllib
from pytest_microvm.untrusted.text import sanitize_line
from support import guards
from support.attacks import ATTACKS, PROJECTS, Attack, Listener
from support.commands import MICROVM
from support.repositories import blob, git, raw_tree, repository

HONEST = PROJECTS.parent / "main"
"""The default branch: what every hostile branch begins with."""

_USERS = "the user's"  # in every file of the user, see Attack, and in a variable of his
_OTHER = r"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u2028-\u202e]"
_COMMANDS = r"^[ \t]*::|##\[|##vso\[|##teamcity\["
_ACTS = re.compile(rf"\x1b(?!\[[0-9;]*m)|{_OTHER}|{_COMMANDS}|Traceback \(most", re.MULTILINE)
_SIGNATURE = "gpgsig -----BEGIN PGP SIGNATURE-----\n \n x\n -----END PGP SIGNATURE-----"
_BRANCH_KEYS = {"branch", "author", "subject", "raw", "gitlinks", "missing"}


def acting(text):
    """Return what a terminal or a CI system obeys in ``text``, or a user must not see: the lines with it."""
    return [line for line in text.split("\n") if _ACTS.search(line) or _USERS in line]


def attacks_on(entry, *outcomes):
    """Return the attacks whose table of ``entry`` has one of ``outcomes``, as parameters."""
    return [
        pytest.param(name, marks=[pytest.mark.thorough] if {"repeats"} & {*about, *about[entry]} else [])
        for name in ATTACKS
        if (about := about_attack(name)).get(entry, {}).get("outcome") in outcomes
    ]


def controlled(*entries):
    """Return the attacks whose tables of ``entries`` have a control, each with the entry, as parameters."""
    return [
        pytest.param(entry, *param.values, marks=param.marks, id=f"{entry}-{param.values[0]}")
        for entry in entries
        for param in attacks_on(entry, "passed", "failed", "refused")
        if "control" in about_attack(param.values[0])[entry]
    ]


def about_attack(name):
    """Return what ``attack.toml`` says."""
    return tomllib.loads((PROJECTS / name / "attack.toml").read_text())


class HostileBranch(Attack):
    """A hostile project that lies over the files of the default branch.

    Args:
        name: Its folder below projects/.
        path: The folder to make it in.
        listener: What stands for the servers of this computer.

    Attributes:
        name: Its folder's name.
        ci: The table ``[ci]`` of ``attack.toml``.
        branch: The branch's name.
    """

    def __init__(self, name, path, listener):
        self.name, self.ci = name, about_attack(name).get("ci", {})
        program = path.parent / f"{path.name}-program"
        self.late = {"PROGRAM": program, "LISTENER": f"127.0.0.1:{listener.server_address[1]}"}
        self.late["BRANCH"] = self.branch = self._early(self.ci.get("branch", name))
        shutil.copytree(HONEST, path)
        super().__init__(name, path)
        program.write_text(f'#!/bin/sh\necho sprung >>"{self.marker}"\nexit 1\n')
        program.chmod(0o755)
        if self.ci.get("private"):
            repository_of(self.folder)
            self.late["COMMIT"] = git(self.folder, "rev-parse", "HEAD")
            self.before = self.look()

    def write(self, name):
        """Make the project's files; those of the default branch give way to them."""
        for path in self.about.get("links", {}):
            (self.path / path).unlink(missing_ok=True)
        super().write(name)
        for path, text in self.about.get("files", {}).items():
            self.file(path, text)

    def filled(self, text):
        """Return ``text`` with what ``@NAME@`` stands for."""
        return super().filled(self._early(text))

    def _early(self, text):
        for name, value in self.late.items():
            text = text.replace(f"@{name}@", str(value))
        return text

    @property
    def has_branch(self):
        """Whether there is more to it than what ``.git`` says."""
        data = {"files", "links", "repeat"} & set(self.about) or _BRANCH_KEYS & set(self.ci)
        return bool(data) or (PROJECTS / self.name / "project").exists()


def repository_of(folder):
    """Make a repository of a folder with files."""
    git(folder, "init", "-q", "-b", "main", "--template=")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "the user's own")


class HostileRepository:
    """A repository with the honest default branch, and hostile ones.

    Args:
        folder: The folder to make it in, or one that exists: its files are left alone.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder):
        self.folder = folder
        if folder.exists():
            git(folder, "init", "-q", "-b", "main", "--template=")
        else:
            repository(folder)
        self._plain = {}  # trees without the names that git refuses, by branch
        self._main = self._commit(HONEST, "main", subject="honest")

    def add(self, attack):
        """Make an attack's branch."""
        if not attack.has_branch:
            return
        ci = attack.ci
        for path in ci.get("gitlinks", []):
            (attack.path / path).mkdir()
        commit = self._commit(
            attack.path, attack.branch, parent=self._main, raw=ci.get("raw", {}),
            gitlinks=ci.get("gitlinks", []), author=ci.get("author", "somebody"),
            subject=ci.get("subject", attack.name), fill=attack.filled,
        )  # fmt: skip
        if missing := ci.get("missing"):
            gone = git(self.folder, "rev-parse", f"{commit}:{missing}")
            (self.folder / ".git" / "objects" / gone[:2] / gone[2:]).unlink()

    def arm(self, attack):
        """Write what an attack has in ``.git``; from now on git may obey it."""
        attack.late["MAIN"] = self._main
        dot_git = self.folder / ".git"
        for name, text in attack.ci.get("git", {}).items():
            file = dot_git / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(attack.filled(text))
            file.chmod(0o755 if text.startswith("#!") else 0o644)
        for name, target in attack.ci.get("refs", {}).items():
            ref = dot_git / attack.filled(name)
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text((dot_git / "refs" / "heads" / attack.filled(target)).read_text())
        with (dot_git / "config").open("a") as config:
            for key, value in attack.ci.get("config", {}).items():
                section, _dot, rest = key.partition(".")
                middle, _dot, last = rest.rpartition(".")
                title = f'{section} "{middle}"' if middle else section
                config.write(f"[{title}]\n\t{last} = {attack.filled(value)}\n")

    def check_out(self, branch):
        """Have HEAD and the index name a branch; files of the work tree are left alone."""
        (self.folder / ".git" / "HEAD").write_text(f"ref: refs/heads/{branch}\n")
        git(self.folder, "read-tree", self._plain.get(branch, f"refs/heads/{branch}"))

    def _commit(
        self, tree, branch, *, subject, parent=None, author="somebody", raw=None, gitlinks=(), fill=str
    ):
        """Commit a folder's files as a new branch and return the commit; nothing is checked out."""
        there = [f"--git-dir={self.folder / '.git'}", "--work-tree=."]
        names = [path.name for path in tree.iterdir() if path.name != ".git"]
        git(tree, *there, "read-tree", "--empty")
        git(tree, *there, "add", "-f", "--", *names)
        for path in gitlinks:
            git(tree, *there, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},{path}")
        top = git(tree, *there, "write-tree")
        if raw:
            self._plain[branch] = top
            top = self._with_raw(top, {name: fill(text) for name, text in raw.items()})
        who = f"{author} <somebody@example.com> 1767323045 +0000"
        head = [f"tree {top}", *([f"parent {parent}"] if parent else []), f"author {who}", f"committer {who}"]
        text = "\n".join([*head, _SIGNATURE, "", subject, ""])
        options = ("-t", "commit", "-w", "--literally", "--stdin")  # git commit would clean the texts
        made = git(self.folder, "hash-object", *options, input=text.encode())
        git(self.folder, "update-ref", f"refs/heads/{branch}", made)
        return made

    def _with_raw(self, top, raw):
        """Return a tree with more entries, in folders of the top: git would refuse their names."""
        entries = []
        for line in git(self.folder, "ls-tree", "-z", top).rstrip("\0").split("\0"):
            mode, _kind, rest = line.split(" ", 2)
            which, name = rest.split("\t")
            entries.append((mode.lstrip("0").encode(), name.encode(), which))
        for path, text in raw.items():
            folder, name = path.split("/")
            inner = raw_tree(self.folder, (b"100644", name.encode(), blob(self.folder, text.encode())))
            entries.append((b"40000", folder.encode(), inner))
        order = sorted(entries, key=lambda entry: entry[1] + b"/" * (entry[0] == b"40000"))
        return raw_tree(self.folder, *order)


def users_environment(listener, **more):
    """Return the environment of a user: with a value of his own, and a proxy for all that connects."""
    proxy = f"http://127.0.0.1:{listener.server_address[1]}"
    names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    return {
        **os.environ,
        **dict.fromkeys(names, proxy),
        "USERS_OWN": f"{_USERS} environment",
        "CI": "true",
        **more,
    }


def unprotected(attack, folder, control, listener):
    """Run a control's shell command in a folder; return what it printed.

    Its git and Python have no configuration of the user, and find the programs that the tests find.
    """
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    programs = os.pathsep.join([os.fspath(Path(MICROVM[0]).parent), os.environ["PATH"]])
    environment = users_environment(
        listener, PATH=programs, HOME=os.fspath(home), GIT_CONFIG_NOSYSTEM="1", BRANCH=attack.branch,
        OUT=os.fspath(folder.parent / "out"), PYTEST_MICROVM_CACHE=os.fspath(cache_root()),
        GIT_AUTHOR_NAME="x", GIT_AUTHOR_EMAIL="x@x", GIT_COMMITTER_NAME="x", GIT_COMMITTER_EMAIL="x@x",
    )  # fmt: skip
    done = subprocess.run(
        ["/bin/sh", "-c", control], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=guards.MACHINE,
    )  # fmt: skip
    return done.stdout.decode(errors="replace")


@dataclass
class Run:
    """One ``ci run`` over hostile branches, and what came of it.

    Args:
        entry: The table of ``attack.toml`` that says what must come of each.
        attacks: By name.
        listener: What stands for the servers of this computer.
        output: The folder with the results.
        said: What was printed.
        returncode: The exit status.
        unchanged: Whether the repository is as it was.
        tasks: What ``results.json`` says, by branch.
        suites: The suites of the merged JUnit report.
    """

    entry: str
    attacks: dict[str, HostileBranch]
    listener: Listener
    output: Path
    said: str
    returncode: int
    unchanged: bool
    tasks: dict[str, dict[str, Any]]
    suites: dict[str, Any]

    def check(self, name):
        """Assert that an attack had its outcome, and nothing else."""
        attack = self.attacks[name]
        wanted = attack.about[self.entry]
        log = ""
        if attack.has_branch:
            task = self.tasks[attack.branch]
            log = (self.output / task["id"] / "log.txt").read_text()
            assert (task["verdict"] == "passed") == (wanted["outcome"] == "passed"), (task, log)
            assert wanted.get("reason", "") in task["reason"]
            self._check_report(task, red=wanted.get("red", False))
            self._check_artifacts(task, wanted.get("artifacts"))
        assert wanted.get("said", "") in log
        assert wanted.get("noted", "") in self.said
        for path, text in self._written():
            assert acting(text) == [], path
            assert "unsaid" not in wanted or wanted["unsaid"] not in text, path
        assert attack.sprung(self.listener) == [], self.said

    def _check_report(self, task, *, red):
        suite = self.suites[suite_of(task["branch"])]
        red = red or task["verdict"] != "passed"
        assert (suite.failures + suite.errors > 0) == red, [case.name for case in suite]

    def _check_artifacts(self, task, wanted):
        taken = [path.removeprefix(f"{task['id']}/artifacts/") for path in task["artifacts"]]
        assert wanted in (None, taken)
        for path in (self.output / task["id"]).rglob("*"):
            assert not path.is_symlink(), path
            assert path.is_file() or path.is_dir(), path

    def _written(self):
        """Yield what the run wrote itself, by path: not what a branch gave back."""
        for path in self.output.rglob("*"):
            if path.is_file() and not {"artifacts", "junit"} & {*path.relative_to(self.output).parts}:
                yield path, path.read_text(errors="surrogateescape")


def suite_of(branch):
    """Return the name of the suite of a branch's job."""
    return sanitize_line(f"{branch} / test")


@contextmanager
def run_over(entry: str, names: set[str], folder: Path, *options: str) -> Iterator[Run]:
    """Run the jobs of the branches of some attacks, from a folder of a clone that has hostile files, too."""
    with Listener() as listener:
        attacks = {name: HostileBranch(name, folder / name, listener) for name in sorted(names)}
        repository = HostileRepository(folder / "repository")
        for attack in attacks.values():
            repository.add(attack)
        repository.check_out("main")
        start = repository.folder / "sub"
        start.mkdir()
        for attack in attacks.values():
            if attack.about[entry].get("here"):
                shutil.copytree(attack.path, repository.folder, symlinks=True, dirs_exist_ok=True)
        for attack in attacks.values():
            repository.arm(attack)
        before = times(repository.folder)
        done = subprocess.run(
            [*MICROVM, "ci", "run", "--branch", "*", "--output", folder / "out", *options], cwd=start,
            env=users_environment(listener), capture_output=True, check=False, timeout=guards.SUITE,
        )  # fmt: skip
        said = (done.stdout + done.stderr).decode()
        assert (folder / "out/results.json").exists(), said
        tasks = json.loads((folder / "out/results.json").read_text())["tasks"]
        suites = {suite.name: suite for suite in JUnitXml.fromfile(str(folder / "out/junit.xml"))}
        yield Run(
            entry, attacks, listener, folder / "out", said, done.returncode,
            times(repository.folder) == before, {task["branch"]: task for task in tasks}, suites,
        )  # fmt: skip
        listener.shutdown()


def times(folder):
    """Return when each file below a folder was changed."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def names_tested_by(session, test):
    """Return the names of the attacks that a session gives to ``test``."""
    items = (item for item in session.items if getattr(item, "function", None) is test)
    return {item.callspec.params["name"] for item in items}
