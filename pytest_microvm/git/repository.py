"""Find the user's own repository, and run git on it without its configuration.

Discovery happens here, not in git: the nearest folder upwards that has a ``.git`` is the checkout; a bare
repository is never discovered. A clone cannot bring a ``.git`` along, but an archive can, and a clone can
bring a bare repository. So git never sees the repository itself, only a view of it: a folder with a
configuration of ours and with the repository's objects and references. The repository's configuration is only
read as data.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pytest_microvm.errors import UsageError
from pytest_microvm.git.commands import GitError, Talk, git, git_talk, user_config
from pytest_microvm.untrusted.nofollow import OpenTree, read_below

_MAX_POINTER = 64 * 1024  # bytes of HEAD, a gitfile and the like
_MAX_CONFIGURATION = 1024 * 1024  # bytes
_MAX_EXCLUDES = 1024 * 1024  # bytes
_MAX_LISTED = 1_000_000  # paths
_FORMATS = ("sha1", "sha256")
_STORAGES = ("files", "reftable")
_FOLDERS = ("objects", "refs", "logs", "reftable")
_FILES = ("packed-refs", "shallow")
_GITFILE = "gitdir: "


@dataclass(frozen=True)
class Repository:
    """A repository of the host.

    Args:
        directory: The folder of its objects and references.
        format: Its hash, ``sha1`` or ``sha256``.
        head: The folder of its HEAD and index if that is another one, as in a linked work tree.
        storage: How its references are stored, ``files`` or ``reftable``.
        own: Whether this process created it: its configuration is used, and its HEAD can be changed.
    """

    directory: Path
    format: str
    head: Path | None = None
    storage: str = "files"
    own: bool = False

    def git(self, *arguments: str | Path, stdin: IO[bytes] | None = None) -> str:
        """Run git on it, see :func:`pytest_microvm.git.commands.git`."""
        with self.view() as folder:
            return git("--git-dir", folder, *arguments, stdin=stdin)

    @contextmanager
    def talk(self, *arguments: str | Path) -> Iterator[Talk]:
        """Run git on it and exchange data, see :func:`pytest_microvm.git.commands.git_talk`."""
        with self.view() as folder, git_talk("--git-dir", folder, *arguments) as talk:
            yield talk

    @contextmanager
    def view(self) -> Iterator[Path]:
        """Yield the folder that git sees in place of the repository.

        It is as contrib/git-new-workdir of git makes it, but with its own configuration and without hooks,
        ``info/grafts``, ``info/attributes`` and other repositories.

        Raises:
            UsageError: A part of the repository is a link, or of an unexpected type.
        """
        if self.own:
            yield self.directory
            return
        with tempfile.TemporaryDirectory(prefix="microvm-view-") as folder:
            made = Path(folder).resolve()
            (made / "HEAD").write_bytes(_needed(self.head or self.directory, "HEAD"))
            (made / "config").write_text(self._configuration(), encoding="ascii")
            for name, kind in [*((n, stat.S_ISDIR) for n in _FOLDERS), *((n, stat.S_ISREG) for n in _FILES)]:
                if _is(self.directory / name, kind):
                    (made / name).symlink_to(self.directory.absolute() / name)
            yield made

    def _configuration(self) -> str:
        lines = ["[core]", "repositoryFormatVersion = 1", "bare = true"]
        if (self.directory / "logs").is_dir():
            lines += ["logAllRefUpdates = true"]
        lines += ["[extensions]"]
        if self.format != "sha1":  # git before 2.29 does not know the word
            lines += [f"objectFormat = {self.format}"]
        if self.storage != "files":
            lines += [f"refStorage = {self.storage}"]
        return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Checkout:
    """A work tree and its repository.

    Args:
        top: The work tree's folder, resolved.
        repository: The repository.
    """

    top: Path
    repository: Repository

    def files(self, below: Path) -> list[str]:
        """Return the files that git tracks or would add, including links and nested repositories.

        The ignore rules are those of the work tree's ``.gitignore``, the repository's ``info/exclude`` and
        the user's own ``core.excludesFile``, not the repository's. The names are an index's, which may be a
        stranger's: they are checked, but the files need not exist.

        Args:
            below: The folder whose files are wanted, resolved; it is in the work tree.

        Returns:
            Paths relative to ``below``, sorted.

        Raises:
            GitError: git cannot list them.
            UsageError: There are too many.
        """
        found: set[str] = set()
        with self.listing("-co", "--exclude-standard", below=below) as talk:
            for word in talk.words(b"\0"):
                found.add(os.fsdecode(word).rstrip("/"))
                if len(found) > _MAX_LISTED:
                    raise UsageError(f"{below} has more than {_MAX_LISTED} files")
        return sorted(found)

    @contextmanager
    def listing(self, *options: str, below: Path | None = None) -> Iterator[Talk]:
        """Run git-ls-files(1) with its index, the work tree and the user's own ignored patterns.

        Args:
            *options: As for ``git ls-files``; its output is separated by NUL.
            below: The folder whose files are wanted; ``None``: the whole work tree.
        """
        repository = self.repository
        place: tuple[str | Path, ...] = ("--work-tree", self.top, "-C", below or self.top)
        with repository.view() as folder:
            _add_listing(folder, repository.head or repository.directory, repository.directory)
            excludes = ("-c", f"core.excludesFile={_users_excludes()}")
            with git_talk("--git-dir", folder, *excludes, *place, "ls-files", *options, "-z") as talk:
                yield talk


def find_checkout(folder: Path) -> Checkout | None:
    """Return the checkout that contains a folder: that of the nearest folder upwards with a ``.git``.

    Raises:
        UsageError: The user's own git would not have created this repository there, or it is another user's.
    """
    folder = folder.resolve()
    for top in (folder, *folder.parents):
        found = checkout_at(top)
        if found is not None:
            _check_owner(top, folder)
            return found
    return None


def checkout_at(top: Path) -> Checkout | None:
    """Return the checkout with the top folder ``top``; ``None`` if it has no ``.git``, or an empty one.

    Raises:
        UsageError: The ``.git`` is a link, or leads to a repository that does not refer to this work tree.
    """
    top = top.resolve()
    try:
        kind = (top / ".git").lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISLNK(kind):
        raise _refused(top, "it is a link")
    if stat.S_ISREG(kind):
        return Checkout(top, _linked(top))
    repository = top / ".git"
    if not _is_repository(repository):  # git ignores it, too
        return None
    if _is(repository / "commondir", stat.S_ISREG):
        raise _refused(top, "it has the objects and references of another repository")
    return Checkout(top, _opened(repository))


def repository_at(folder: Path) -> Repository | None:
    """Return the bare repository that ``folder`` itself is; ``None`` if it is not one.

    Only for a folder that was named explicitly: in a clone, any folder can be one.
    """
    folder = folder.resolve()
    return _opened(folder) if _is_repository(folder) else None


def with_own_objects(repository: Repository) -> Repository:
    """Return a repository after checking that it has all its objects and references itself.

    One that borrows objects (gitrepository-layout(5), ``objects/info/alternates``), or has links in place of
    files, could be an archive that names a private repository of the user.

    Raises:
        UsageError: It borrows objects, or has links.
    """
    if repository.own:
        return repository
    if read_below(repository.directory, "objects/info/alternates", _MAX_POINTER):
        raise UsageError(
            f"{repository.directory} borrows objects of another repository (objects/info/alternates)",
            details="which repository that is, whoever made this one has chosen",
            resolution="if it is yours: git repack -a -d, then remove objects/info/alternates; "
            "or clone it with --dissociate",
        )
    for name in ("objects", "refs"):
        link = _first_link(repository.directory / name)
        if link is not None:
            raise UsageError(
                f"{link} is a link, which git does not make",
                details="its objects and references could be those of another repository",
                resolution="make a clone of it, and work in that",
            )
    return repository


def _first_link(folder: Path) -> str | None:
    """Return the path of a link in a folder; ``None`` if there is none."""
    for above, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(above, name)  # noqa: PTH118 - many thousand files
            if os.path.islink(path):  # noqa: PTH114
                return path
    return None


def configuration(repository: Repository) -> Mapping[str, Sequence[str]]:
    """Return a repository's own configuration as data, without included files.

    Returns:
        Values by key: section and variable in lower case, as ``git config --list`` has them.

    Raises:
        GitError: The file is not a valid configuration.
    """
    return _read_configuration(repository.directory, "config")


def _read_configuration(folder: Path, name: str) -> Mapping[str, Sequence[str]]:
    content = read_below(folder, name, _MAX_CONFIGURATION)
    found: dict[str, list[str]] = {}
    if not content:
        return found
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        listed = git("config", "--file", "-", "--no-includes", "--null", "--list", stdin=file)
    for item in listed.split("\0"):
        key, _newline, value = item.partition("\n")
        if key:
            found.setdefault(key, []).append(value)
    return found


def _opened(directory: Path, head: Path | None = None) -> Repository:
    said = _read_configuration(directory, "config")
    kind = said.get("extensions.objectformat", ["sha1"])[-1].lower()
    storage = said.get("extensions.refstorage", ["files"])[-1].lower()
    if kind not in _FORMATS or storage not in _STORAGES:
        raise UsageError(
            f"{directory} has a format that is not known here: {kind}, {storage}"[:500],
            resolution="clone it with the default formats",
        )
    return Repository(directory, kind, head, storage)


def _linked(top: Path) -> Repository:
    """Return the repository of a gitfile (of a linked work tree or submodule) if it names the work tree.

    Without that check, an archive could name any repository of this computer as its own.
    """
    text = os.fsdecode(_needed(top, ".git"))
    if not text.startswith(_GITFILE):
        raise _refused(top, "it does not say where its repository is")
    head = (top / text.removeprefix(_GITFILE).rstrip("\r\n")).resolve()
    if not _is(head / "HEAD", stat.S_ISREG):
        raise _refused(top, f"there is no repository at {head}")
    common = read_below(head, "commondir", _MAX_POINTER)
    if common is None:
        names = _read_configuration(head, "config"), _read_configuration(head, "config.worktree")
        places = [name.get("core.worktree", [""])[-1] for name in names]
        if not any(place and (head / place).resolve() == top for place in places):
            raise _refused(
                top, f"{head} is not its repository", f"if it is: git -C {top} config core.worktree {top}"
            )
        return _opened(head)
    shared = (head / os.fsdecode(common).rstrip("\r\n")).resolve()
    back = os.fsdecode(read_below(head, "gitdir", _MAX_POINTER) or b"").rstrip("\r\n")
    if head.parent != shared / "worktrees" or not back or (head / back).resolve() != top / ".git":
        raise _refused(top, f"{head} is not its repository", "if it is: git worktree repair")
    return _opened(shared, head)


def _is_repository(folder: Path) -> bool:
    """Return True if a folder looks like a repository to git; see its is_git_directory()."""
    head = folder / "HEAD"
    return head.is_file() and (folder / "objects").is_dir() and (folder / "refs").is_dir()


def _is(path: Path, kind: object) -> bool:
    """Return True if a part of a repository exists with the expected type.

    Raises:
        UsageError: It has another type.
    """
    assert callable(kind)
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not kind(mode):
        raise UsageError(
            f"{path} is a link, or something else than git puts there",
            details="a repository is read without following links",
            resolution="make a clone of it, and work in that",
        )
    return True


def _needed(folder: Path, name: str) -> bytes:
    content = read_below(folder, name, _MAX_POINTER)
    if content is None:
        raise UsageError(f"{folder} has no {name}", resolution="make a clone of it, and work in that")
    return content


def _refused(top: Path, why: str, resolution: str = "") -> UsageError:
    return UsageError(
        f"{top / '.git'} is not used: {why}",
        resolution=resolution or f"remove it, or make a clone and work in that ({top} was not made by git)",
    )


def _check_owner(top: Path, folder: Path) -> None:
    """Raise an error for a repository that another user may have put above a folder, for example into /tmp.

    Raises:
        UsageError: It belongs neither to the user, nor to root, nor to the owner of the folder.
    """
    owner = (top / ".git").lstat().st_uid
    if owner not in (os.geteuid(), 0, folder.stat().st_uid):
        raise UsageError(
            f"{top / '.git'} belongs to another user than {folder}, which is below it",
            resolution=f"start in {top}, or move the project elsewhere",
        )


def _add_listing(view: Path, head: Path, common: Path) -> None:
    """Add the index and ``info/exclude`` to a view: git needs them to list tracked and ignored files."""
    with OpenTree(head) as tree:
        shared = [name for name in tree.names() if name.startswith("sharedindex.")]
    for name in ("index", *shared):
        if _is(head / name, stat.S_ISREG):
            (view / name).symlink_to(head.absolute() / name)
    excludes = read_below(common, "info/exclude", _MAX_EXCLUDES)
    if excludes is not None:
        (view / "info").mkdir()
        (view / "info" / "exclude").write_bytes(excludes)


def _users_excludes() -> str:
    """Return the user's own file of ignored patterns; see gitignore(5)."""
    try:
        said = user_config("--type=path", "--get", "core.excludesFile").removesuffix("\n")
    except GitError:  # it is not set
        home = os.environ.get("HOME", "")
        above = os.environ.get("XDG_CONFIG_HOME") or (f"{home}/.config" if home else "")
        said = f"{above}/git/ignore" if above else ""
    return said if Path(said).is_absolute() else os.devnull
