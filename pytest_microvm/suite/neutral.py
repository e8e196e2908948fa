"""Neutralise the host's pytest: it must not import, run or check things that only the guest has."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from pytest_microvm.errors import UsageError

# Configuration that imports, acts or checks in the process of the tests. The guest reads the real values.
_NEUTRAL: dict[str, Any] = {
    "filterwarnings": [],
    "required_plugins": [],
    "minversion": "",
    "pythonpath": [],
    "usefixtures": [],
    "strict": False,
    "strict_config": False,
    "strict_markers": False,
    "log_file": "",
    "faulthandler_timeout": 0.0,
    "faulthandler_exit_on_timeout": False,
}
# Plug-ins that act on the process the tests run in, or import the project; the guest still loads them.
_ACTING = (
    *("timeout", "pytest_timeout", "pytest_cov", "django", "pytest_django"),
    *("benchmark", "pytest_benchmark", "allure_pytest", "inline_snapshot"),
)

_CACHE = ("README.md", ".gitignore", "CACHEDIR.TAG", "v", "v/cache", "v/cache/lastfailed", "v/cache/nodeids",
          "v/cache/stepwise")  # fmt: skip
_OF_WORKERS = (
    *("pytest_collection_modifyitems", "pytest_itemcollected", "pytest_runtest_protocol"),
    *("pytest_runtest_setup", "pytest_runtest_call", "pytest_runtest_teardown", "pytest_runtest_makereport"),
    *("pytest_pyfunc_call", "pytest_fixture_setup", "pytest_fixture_post_finalizer"),
)  # hooks that pytest-xdist's controller does not call
_TRUSTED = ("_pytest", "pytest_microvm")  # packages whose modules may act: pytest and this one


def neutralise(config: pytest.Config) -> None:
    """Replace the values pytest would act on, and remove the project's folders from ``sys.path``."""
    known = config._parser._inidict  # noqa: SLF001
    tell_imports_for_filters(config)
    paths = [os.fspath(path) for path in config.getini("pythonpath")] if "pythonpath" in known else []
    for key, value in _NEUTRAL.items():
        config._inicache[key] = value  # noqa: SLF001 - the cache that all readers use
    for name in _ACTING:
        config.pluginmanager.set_blocked(name)
    before = list(sys.path)
    config.add_cleanup(lambda: sys.path.__setitem__(slice(None), before))
    roots = [config.rootpath, config.invocation_params.dir]
    sys.path[:] = [entry for entry in sys.path if entry not in paths and not in_project(entry, roots)]
    forget_failed_filters(config)


def write_log_file(config: pytest.Config, path: str) -> None:
    """Let the host's pytest write a log file that the user has named with ``-o log_file=PATH``."""
    config._inicache["log_file"] = path  # noqa: SLF001 - see neutralise


def keep_from_acting_early(config: pytest.Config, plugin: object) -> None:
    """Remove a plug-in's ``pytest_load_initial_conftests`` hooks, which act on the project's files.

    Some plug-ins set variables there that the project's files name (pytest-env, pytest-dotenv), such as PATH
    or trust, or import its modules. No conftest.py is loaded on the host; in the guest these hooks run.

    Args:
        config: pytest's configuration, before that hook is called.
        plugin: Any registered plug-in.
    """
    hook = config.hook.pytest_load_initial_conftests
    for implementation in hook.get_hookimpls():
        module = getattr(implementation.function, "__module__", "")
        if implementation.plugin is plugin and module.partition(".")[0] not in _TRUSTED:
            hook._remove_plugin(plugin)  # noqa: SLF001 - pluggy has no public function


def keep_from_items(config: pytest.Config, plugin: object) -> None:
    """Remove a plug-in's hooks for items and fixtures: they would get stand-ins for tests.

    The machine's plug-ins have those hooks, as the workers of pytest-xdist have; the host keeps those of its
    controller. A plug-in that is for the host alone (``microvm_host_only``) keeps all.

    Args:
        config: pytest's configuration.
        plugin: Any registered plug-in.
    """
    top = (plugin.__name__ if inspect.ismodule(plugin) else type(plugin).__module__).partition(".")[0]
    if top in _TRUSTED or getattr(plugin, "microvm_host_only", False):
        return
    for name in _OF_WORKERS:
        hook = getattr(config.hook, name)
        if any(implementation.plugin is plugin for implementation in hook.get_hookimpls()):
            hook._remove_plugin(plugin)  # noqa: SLF001 - pluggy has no public function


def keep_project_from_worker(spec: Any, *, isolated: bool) -> None:
    """Keep a pytest-xdist worker on this computer from importing modules of its working directory.

    Python looks there first, so a project's ``execnet.py`` would run here before any of our code does.

    Args:
        spec: The worker's execnet specification.
        isolated: Whether ``PYTHONPATH`` and the user's packages are ignored, too.
    """
    if spec.popen and not spec.python:
        safe = "-P" if sys.version_info >= (3, 11) and not isolated else "-I"
        spec.python = shlex.join([sys.executable, safe])


def in_project(path: str, roots: list[Path]) -> bool:
    """Return True if ``path`` belongs to the project: below a root, and not in an installed environment."""
    absolute = Path(path or ".").resolve()
    if not any(absolute.is_relative_to(root.resolve()) for root in roots):
        return False
    installed = {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix}
    return not any(absolute.is_relative_to(Path(folder).resolve()) for folder in installed)


def tell_imports_for_filters(config: pytest.Config) -> None:
    """Warn if pytest has imported a module of the project to find a warning's category.

    pytest 9.2 reads the filters before any plug-in is loaded, so this cannot be prevented here.
    """
    roots = [config.rootpath, config.invocation_params.dir]
    for words in [*config.getini("filterwarnings"), *(config.known_args_namespace.pythonwarnings or ())]:
        category = [*words.split(":"), "", "", ""][2].strip()
        name = category.rpartition(".")[0]
        file = getattr(sys.modules.get(name), "__file__", None)
        if name and file and in_project(file, roots):
            config.issue_config_time_warning(
                pytest.PytestWarning(
                    f"pytest has imported {name} on the host, outside any machine, because filterwarnings "
                    f"names it; give this filter to the machine alone: --microvm-args='-W {words}'"
                ),
                stacklevel=2,
            )


def forget_failed_filters(config: pytest.Config) -> None:
    """Drop pytest's warning about a filter whose category the host does not have.

    pytest 9.2 reads the filters before any plug-in is loaded.
    """
    history = getattr(config.hook.pytest_warning_recorded, "_call_history", None)
    if history:
        history[:] = [
            call
            for call in history
            if "Failed to import filter module" not in str(call[0]["warning_message"])
        ]


def forget_unknown_keys(config: pytest.Config) -> None:
    """Drop configuration keys that the host's pytest does not know; the guest's may know them."""
    values = getattr(config, "_inicfg", None)
    if values is None:  # before pytest 9
        values = config.inicfg
    for key in config._get_unknown_ini_keys():  # noqa: SLF001
        del values[key]


def forbid_conftests(config: pytest.Config) -> None:
    """Disable conftest.py files and the command line's warning filters on the host."""
    namespace = config.known_args_namespace
    namespace.noconftest = True
    namespace.pythonwarnings = None


def shorten_header(config: pytest.Config) -> None:
    """Hide the cache folder from the header without ``-v``, as pytest does for its default folder."""
    config._inicache["cache_dir"] = ".pytest_cache"  # noqa: SLF001 - the cache is already open


def forget_own_file(config: pytest.Config, file: Path | None) -> None:
    """Show the project's configuration file in the header, not the launcher's empty one that pytest read."""
    config._inipath = file  # noqa: SLF001 - only the header still uses it


def refuse_project_plugins(config: pytest.Config, named: list[str]) -> None:
    """Check that no loaded plug-in lies in the project: its code would run on the host.

    A plug-in can be named by ``-p``, be installed from the project's folder, or be found in a folder of
    ``pythonpath``, which pytest puts on ``sys.path`` before it looks for plug-ins.

    Args:
        config: pytest's configuration.
        named: The names given with ``-p``.

    Raises:
        UsageError: A plug-in does.
    """
    roots = [config.rootpath, config.invocation_params.dir]
    for name, plugin in config.pluginmanager.list_name_plugin():
        module = plugin if inspect.ismodule(plugin) else sys.modules.get(type(plugin).__module__)
        file = getattr(module, "__file__", None)
        if module is None or not file or module.__name__.partition(".")[0] in _TRUSTED:
            continue
        if in_project(file, roots):
            how = f"-p {name}" if name in named else f"the plug-in {name} of {file}"
            raise UsageError(
                f"{how} is of the project, and pytest has loaded it on this computer, outside any machine",
                resolution="run `pytest-microvm test`, which loads none on this computer; or load it in the "
                f'machine alone, with -p no:{name} --microvm-args="-p {name}"',
            )


def refuse_linked_cache(config: pytest.Config) -> None:
    """Check that pytest's cache would be written inside the project.

    Raises:
        UsageError: ``cache_dir`` leads out of it, or a path in the cache is a link.
    """
    if "cache_dir" not in config._parser._inidict:  # noqa: SLF001 - the plug-in is switched off
        return
    named = os.path.expandvars(os.path.expanduser(str(config.getini("cache_dir"))))  # noqa: PTH111 - as pytest does
    folder = Path(os.path.normpath(config.rootpath / named))
    written = [folder, *(folder / name for name in _CACHE)]
    links = [path for path in written if path.is_symlink()]
    if links or not folder.is_relative_to(config.rootpath):
        raise UsageError(
            f"pytest's cache would be at {links[0] if links else folder}, which leads out of the project",
            resolution="run with -p no:cacheprovider, or `pytest-microvm test`, which keeps it elsewhere",
        )
