"""The plug-in that tox loads: registers the runner ``microvm`` and its options, imports the rest lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tox.plugin import impl

if TYPE_CHECKING:
    from tox.config.cli.parser import ToxParser
    from tox.config.sets import ConfigSet
    from tox.execute.api import Outcome
    from tox.session.state import State
    from tox.tox_env.api import ToxEnv
    from tox.tox_env.register import ToxEnvRegister


@impl
def tox_register_tox_env(register: ToxEnvRegister) -> None:
    """Register the runner."""
    from pytest_microvm.tox.runner import MicrovmRunner  # noqa: PLC0415 - tox is fully loaded by now

    register.add_run_env(MicrovmRunner)


@impl
def tox_add_option(parser: ToxParser) -> None:
    """Add this plug-in's options."""
    from pytest_microvm.tox.options import add_options  # noqa: PLC0415

    add_options(parser)


@impl
def tox_add_core_config(core_conf: ConfigSet, state: State) -> None:  # noqa: ARG001 - tox gives them by name
    """With ``--microvm``, switch every environment over to machines, and protect this computer's data."""
    if getattr(state.conf.options, "microvm", False):
        from pytest_microvm.tox import shown  # noqa: PLC0415
        from pytest_microvm.tox.options import guard_folders, guard_host, switch_over  # noqa: PLC0415

        shown.install()
        guard_host(state.conf)
        switch_over(state.conf.options)
        guard_folders(state.conf)


@impl
def tox_after_run_commands(tox_env: ToxEnv, exit_code: int, outcomes: list[Outcome]) -> None:  # noqa: ARG001
    """Copy the artifacts back while the machine still runs."""
    give_back = getattr(tox_env, "take_artifacts_back", None)
    if give_back is not None:
        give_back()
