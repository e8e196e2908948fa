"""The command line's options, and the effects of ``--microvm`` before any environment is created."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tox.plugin.manager import MANAGER
from tox.report import HandledError
from tox.tox_env.register import REGISTER

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.options import BY_NAME
from pytest_microvm.tox.runner import MicrovmRunner

if TYPE_CHECKING:
    from tox.config.cli.parser import Parsed, ToxParser
    from tox.config.main import Config

_log = logging.getLogger(__name__)


def add_options(parser: ToxParser) -> None:
    """Add this plug-in's options to tox's command line."""
    parser.add_argument(
        "--microvm",
        action="store_true",
        default=False,
        help="run every environment in a machine of its own, whatever its runner is",
    )
    parser.add_argument(
        "--microvm-image",
        metavar="KIT",
        default=None,
        of_type=str,
        help="the kit whose image the machines have, in place of the configuration's",
    )
    parser.add_argument("--microvm-git", action="store_true", default=False, help=BY_NAME["git"].help)
    for name, whose in (("network", "commands"), ("prepare-network", "the installation")):
        parser.add_argument(
            f"--microvm-{name}",
            metavar="RULES",
            default=None,
            of_type=str,
            help=f"what {whose} may reach, comma separated, in place of the configuration's; none: nothing",
        )
    parser.add_argument(
        "--microvm-pass-env",
        metavar="NAMES",
        default=None,
        of_type=str,
        help="with --microvm: which of this computer's variables the configuration may read and pass, comma "
        "separated, globs too; the others are as if they were not set; none: no variable",
    )


def guard_host(conf: Config) -> None:
    """Keep the configuration from reading values of this computer that the user has not allowed.

    Raises:
        HandledError: This version of tox is not supported.
    """
    from pytest_microvm.tox.configuration import ToxFile  # noqa: PLC0415 - for --microvm alone
    from pytest_microvm.tox.host_values import HostValueGuard, install  # noqa: PLC0415

    said = getattr(conf.options, "microvm_pass_env", None)
    named = None if said is None else [name.strip() for name in said.split(",")]
    guard = HostValueGuard(ToxFile.of(conf.src_path, conf.options), [] if named == ["none"] else named)
    install(guard)
    MicrovmRunner.guard = guard


def guard_folders(conf: Config) -> None:
    """Keep tox from writing outside the project to paths that only the project's configuration names.

    Raises:
        HandledError: The configuration names a path outside the project, or a link of the project leads out.
    """
    from pytest_microvm.tox.configuration import ToxFile  # noqa: PLC0415
    from pytest_microvm.tox.folders import check_core  # noqa: PLC0415
    from pytest_microvm.untrusted.nofollow import refuse_links  # noqa: PLC0415 - for --microvm alone

    folder = ToxFile.of(conf.src_path, conf.options).folder
    try:
        check_core(conf, folder)
        report = getattr(conf.options, "result_json", None)
        if report is not None:
            refuse_links(folder, Path.cwd() / report)
    except UsageError as error:
        raise HandledError(str(error)) from error


def switch_over(options: Parsed) -> None:
    """Replace every runner with machines, and keep tox from installing requirements on this computer."""
    for name in list(REGISTER.env_runners):
        if name != MicrovmRunner.id():
            REGISTER.add_run_env(_as(name))
    if not options.no_provision:
        options.no_provision = True
    inline = MANAGER.inline_module
    if inline is not None:
        _log.warning(
            "%s has run on this computer: tox loads it before any plug-in; see docs/reference/tox.md",
            getattr(inline, "__file__", "toxfile.py"),
        )


def _as(name: str) -> type[MicrovmRunner]:
    """Return a subclass of the runner with another runner's name."""
    return type("MicrovmRunner", (MicrovmRunner,), {"id": staticmethod(lambda: name)})
