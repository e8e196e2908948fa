"""The runner ``microvm``: a tox environment that installs packages and runs commands in machines."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from tox.config.loader.memory import MemoryLoader
from tox.config.types import Command
from tox.execute.request import StdinSource
from tox.tox_env.errors import Fail
from tox.tox_env.python.api import PythonInfo
from tox.tox_env.python.runner import PythonRun
from tox.tox_env.runner import RunToxEnv
from virtualenv.discovery.py_spec import PythonSpec

from pytest_microvm.tox import environment, folders
from pytest_microvm.tox.failures import check_name, in_tox_words
from pytest_microvm.tox.generation import Generation
from pytest_microvm.tox.installer import GuestPip, InstallPlan

if TYPE_CHECKING:
    from tox.execute.api import Execute
    from tox.tox_env.api import ToxEnvCreateArgs
    from tox.tox_env.info import Info
    from tox.tox_env.package import Package
    from tox.tox_env.python.pip.pip_install import Pip

    from pytest_microvm.machine.microvm import MicroVM
    from pytest_microvm.templates.chain import TemplateStep
    from pytest_microvm.tox.checked_places import CheckedPlaces
    from pytest_microvm.tox.guest import ToxGuest
    from pytest_microvm.tox.host_values import HostValueGuard
    from pytest_microvm.tox.native import NativeEnvironment
    from pytest_microvm.tox.recorded import EnvironmentRecord

_PROJECT_FILES = ("pyproject.toml", "setup.py", "setup.cfg")
_ARTIFACTS_TIMEOUT = 600.0
_log = logging.getLogger(__name__)


class MicrovmRunner(PythonRun):
    """virtual environment in a machine of its own, via pytest-microvm."""

    guard: ClassVar[HostValueGuard | None] = None
    """Decides what the configuration may read on this computer; ``None``: anything, as in native tox."""

    def __init__(self, create_args: ToxEnvCreateArgs) -> None:
        self._executor: Execute | None = None
        self._installer: Pip | None = None
        self._guest_made: ToxGuest | None = None
        self._plan = InstallPlan()
        self._steps: list[TemplateStep] = []
        self._has_files = False
        self._installs_package = False
        self._making: MicroVM | None = None
        self._generation = Generation()
        self._native_found: NativeEnvironment | None = None
        self._record: EnvironmentRecord | None = None
        check_name(create_args.conf.name)
        super().__init__(create_args)

    @staticmethod
    def id() -> str:
        """Return the name of this runner, for tox's key ``runner``."""
        return "microvm"

    # Configuration

    def register_config(self) -> None:
        """Register the keys of a Python environment, and ``microvm_*``."""
        from pytest_microvm.tox import settings  # noqa: PLC0415 - see tox/plugin.py

        settings.register(self.conf)
        own = self._own_dir
        places = {"env_tmp_dir": own / "tmp", "env_log_dir": own / "log"}
        self.conf.loaders.append(MemoryLoader(**places, **({} if self._mirrors else {"env_dir": own})))
        super().register_config()
        self.conf.add_config(
            keys=["system_site_packages", "sitepackages"],
            of_type=bool,
            default=False,
            desc="create virtual environments that also have access to globally installed packages.",
        )

    @property
    def _mirrors(self) -> bool:
        """True if the machine mirrors the native environment, in ``env_dir``, which is never written to."""
        return bool(self.conf["microvm_python"] == "host")

    @property
    def _own_dir(self) -> Path:
        """A separate folder, so that switching to machines and back keeps the native environment."""
        return self.core.get("work_dir", Path) / ".microvm" / self.conf.name

    @property
    def env_dir(self) -> Path:
        """The folder in which tox keeps this runner's state of the environment."""
        return self._own_dir if self._mirrors else self.prefix

    @property
    def prefix(self) -> Path:
        """The virtual environment's folder in the machine."""
        return self.conf.get("env_dir", Path)

    @property
    def cache(self) -> Info:
        """The state of the last setup; while installations are compared, that of the native environment."""
        return super().cache if self._record is None else self._record

    @property
    def executor(self) -> Execute:
        """The executor of commands."""
        if self._executor is None:
            from pytest_microvm.tox.executor import GuestExecutor  # noqa: PLC0415 - needs a Unix

            self._executor = GuestExecutor(self.options.is_colored, self)
        return self._executor

    @property
    def installer(self) -> Pip:
        """The installer, which plans installations, or compares them with those of the native environment."""
        if self._installer is None and self._mirrors:
            from pytest_microvm.tox.recorded import RecordedPip  # noqa: PLC0415 - see tox/plugin.py

            self._installer = RecordedPip(self)
        elif self._installer is None:
            self._installer = GuestPip(self, lambda: self._plan)
        return self._installer

    @property
    def runs_on_platform(self) -> str:
        """The machine's platform."""
        return "linux"

    @property
    def default_pkg_type(self) -> str:
        """The default package type of tox, or ``skip`` if the folder has no project to install."""
        root = self.core.get("tox_root", Path)
        return super().default_pkg_type if any((root / name).exists() for name in _PROJECT_FILES) else "skip"

    @property
    def _package_tox_env_type(self) -> str:
        return "none"  # a package environment would run the project's build backend on this computer

    @property
    def _external_pkg_tox_env_type(self) -> str:
        return "none"

    def get_package_env_types(self) -> tuple[str, str] | None:
        """Return ``None``: the package is built in the machine."""
        self._installs_package = self._register_package_conf()
        return None

    def _build_packages(self) -> list[Package]:
        return []

    # Python

    def _get_python(self, base_python: list[str]) -> PythonInfo | None:
        from pytest_microvm.tox.interpreters import chosen  # noqa: PLC0415

        with in_tox_words():
            if not self._mirrors:
                return chosen(base_python, self._guest().pythons)
            native = self._native()
            if chosen(base_python, [native.python]) is None:
                raise native.stale(f"it has {native.environment.library}, not {', '.join(base_python)}")
            return native.python

    @classmethod
    def python_spec_for_path(cls, path: Path) -> PythonSpec:
        """Return the spec of a Python path: only its name counts, since the path is not this computer's."""
        return PythonSpec.from_string_spec(path.name)

    def env_bin_dir(self) -> Path:
        """Return the folder with the environment's programs."""
        return self.prefix / "bin"

    def env_python(self) -> Path:
        """Return the environment's Python."""
        return self.env_bin_dir() / "python"

    def env_site_package_dir(self) -> Path:
        """Return the folder for installed packages."""
        python = self.base_python
        if python.implementation == "PyPy":
            return self.prefix / "lib" / f"pypy{python.version_dot}" / "site-packages"
        return self.prefix / "lib" / f"python{python.version_dot}" / "site-packages"

    def prepend_env_var_path(self) -> list[Path]:
        """Return the folders that are searched first for commands."""
        return [self.env_bin_dir()]

    def create_python_env(self) -> None:
        """Do nothing: the environment is created together with its packages."""

    # Variables

    def _default_pass_env(self) -> list[str]:
        return [*environment.PASSED, *(environment.PASSED_ON_TERMINAL if sys.stdout.isatty() else ())]

    @staticmethod
    def _load_pass_env(pass_env: list[str]) -> dict[str, str]:
        found = environment.passed(pass_env, os.environ)
        guard = MicrovmRunner.guard
        return found if guard is None else {name: found[name] for name in guard.allowed(found)}

    def _make_path(self, existing: str | None = None) -> str:
        return environment.path_of(self._paths, existing)

    @property
    def environment_variables(self) -> dict[str, str]:
        """The variables of commands; while a template is made, only those that it may contain."""
        variables = super().environment_variables
        if self._making is None:
            return variables
        return self._prepared_with(variables)

    def _prepared_with(self, variables: Mapping[str, str]) -> dict[str, str]:
        set_here = set(self.conf["set_env"])
        passed = [name for name in self._load_pass_env(self.conf["pass_env"]) if name not in set_here]
        return environment.prepared_with(variables, [*passed, "__TOX_ENVIRONMENT_VARIABLE_ORIGINAL_CI"])

    # Installation

    def _setup_env(self) -> None:
        self._check_folders()
        self._plan, self._steps, self._has_files = InstallPlan(), [], False
        super(PythonRun, self)._setup_env()
        if self._mirrors:
            with in_tox_words():
                self._compare_with_record()
            return
        self._install_requirements()
        with in_tox_words():
            self._steps = [self._environment_step()]

    def _install_requirements(self) -> None:
        if self.conf["pylock"]:
            self._install_pylock()
        else:
            self._install_deps()
            self._install_dependency_groups()

    def ensure_python_env(self) -> None:
        """Check that the image or the native environment has a suitable Python.

        Raises:
            Skip: The image has none, and missing interpreters are skipped.
            NoInterpreter: The image has none.
            Fail: The native environment cannot be mirrored.
        """
        self.base_python  # noqa: B018 - it raises

    def _setup_with_env(self) -> None:
        self._plan = InstallPlan()
        with in_tox_words():
            if self._installs_package and self._mirrors:
                self._check_installed_package()
            elif self._installs_package:
                self._plan_package()
            for number, command in enumerate(self.conf.get("extra_setup_commands", list[Command])):
                self._plan.commands.append((tuple(command.args), f"extra_setup_commands[{number}]"))
            step = self._package_step() if self._plan.commands else None
            if step is not None and self._skips_package() and not self._guest().cached([*self._steps, step]):
                _log.warning("skip building and installing the package")
                step = None
            if step is not None:
                self._steps.append(step)
                self._has_files = True
            self._guest().make(self._steps)

    def _environment_step(self) -> TemplateStep:
        from pytest_microvm.tox.requirements import needed  # noqa: PLC0415

        guest, root = self._guest(), self.core.get("tox_root", Path)
        reads = needed(self._plan.arguments, root)
        files = guest.workspace if reads.all else guest.files(reads.files)
        venv = (
            str(self.base_python.extra["executable"]),
            str(self.env_dir),
            self.conf.get("system_site_packages", bool),
        )
        return self._step("tox-env", files=files, venv=venv)

    def _package_step(self) -> TemplateStep:
        return self._step("tox-package", files=self._guest().workspace, venv=None)

    def _step(self, kind: str, *, files: Any, venv: tuple[str, str, bool] | None) -> TemplateStep:
        plan = self._plan

        def run(machine: MicroVM) -> None:
            self._making = machine
            try:
                for argv, run_id in plan.commands:
                    outcome = self.execute(argv, stdin=StdinSource.OFF, run_id=run_id)
                    outcome.assert_success()
            finally:
                self._making = None

        return self._guest().step(
            kind,
            plan,
            self._prepared_with(self.environment_variables),
            files=files,
            venv=venv,
            run=run,
            generation=self._generation.mark(self.env_dir),
        )

    def _plan_package(self) -> None:
        from pytest_microvm.tox.package import Package as Wanted  # noqa: PLC0415 - see tox/plugin.py
        from pytest_microvm.tox.package import plan_package  # noqa: PLC0415

        if self.options.package_only:
            raise Fail("a package built in a machine stays in it: leave --pkg-only out")
        external = self.pkg_type == "external"
        if external and self.options.install_pkg is None:
            raise Fail("package = external needs --installpkg: no other package is made on this computer")
        assert isinstance(self.installer, GuestPip)
        wanted = Wanted(
            how=self.pkg_type,
            root=self.core.get("package_root", Path),
            extras=frozenset(self.conf.get("extras", set[str])),
            given=self.options.install_pkg if external else None,
            env_dir=self.env_dir,
            python=self.env_python(),
        )
        plan_package(wanted, self.installer, self._plan)

    # The native environment

    def _native(self) -> NativeEnvironment:
        """Return the environment that tox made on this computer, checked on first use.

        Raises:
            UsageError: It cannot be mirrored.
        """
        if self._native_found is None:
            from pytest_microvm.tox.native import find_python, native_environment  # noqa: PLC0415

            project = self._places.file.folder
            self._check_reads(project)
            folders.check_mirrored(self.prefix, self._places.roots, project)
            first = getattr(self.options, "discover", None) or []
            how = "without --microvm" if self.options.microvm else "with runner = virtualenv"
            self._native_found = native_environment(
                self.prefix,
                lambda version: find_python(version, project, first),
                f"run `tox -e {self.conf.name}` once {how}",
            )
        return self._native_found

    def _compare_with_record(self) -> None:
        """Check that the native environment has what the configuration says.

        Raises:
            Fail: It does not.
        """
        from pytest_microvm.tox.package import written_dependencies  # noqa: PLC0415 - see tox/plugin.py
        from pytest_microvm.tox.recorded import EnvironmentRecord  # noqa: PLC0415

        native = self._native()
        if native.environment.shares_base != self.conf.get("system_site_packages", bool):
            raise native.stale("system_site_packages has changed")
        if getattr(self.options, "skip_env_install", False):
            return
        self._record = EnvironmentRecord(native.record, native.stale)
        try:
            self._install_requirements()
            package, extras = self.core.get("package_root", Path), self.conf.get("extras", set[str])
            needs = written_dependencies(package, extras) if self._installs_package else None
            if needs is not None:
                section = PythonRun if self.pkg_type == "deps-only" else RunToxEnv
                self._install(needs, section.__name__, "package_deps")
        finally:
            self._record = None

    def _check_installed_package(self) -> None:
        if self.options.package_only or self.pkg_type == "external":
            raise Fail("--pkg-only and --installpkg need the image's Python: microvm_python = image")
        native = self._native()
        if self.pkg_type != "deps-only" and not native.imports_from(self.core.get("tox_root", Path)):
            _log.warning("%s", native.copied_package)

    def _skips_package(self) -> bool:
        return any(getattr(self.options, name, False) for name in ("skip_pkg_install", "skip_env_install"))

    # Commands

    def running_machine(self) -> MicroVM:
        """Return the machine in which commands currently run."""
        if self._making is not None:
            return self._making
        guest = self._guest()
        if guest.machine is None:
            machine = guest.start(self._steps, files=not self._has_files)
            for folder in (self.env_tmp_dir, self.conf.get("change_dir", Path)):
                machine.path(str(folder)).mkdir(parents=True, exist_ok=True)
        assert guest.machine is not None
        return guest.machine

    def take_artifacts_back(self) -> None:
        """Copy the files that ``microvm_artifacts`` names to the environment's folder ``artifacts``.

        Raises:
            Fail: The machine has ended.
        """
        from pytest_microvm.ci.running.collecting import Collection  # noqa: PLC0415 - where it is needed

        guest = self._guest_made
        if guest is None or guest.machine is None or not guest.settings.artifacts:
            return
        folder, root = self.env_dir / "artifacts", PurePosixPath(self.core.get("tox_root", Path))
        for place in (folder, folder.with_name("artifacts.new")):
            if place.is_symlink():
                raise Fail(f"{place} is a link: delete it")
        collection = Collection(guest.machine, root, time.monotonic() + _ARTIFACTS_TIMEOUT)
        with in_tox_words():
            taken = collection.take(guest.settings.artifacts, folder)
        for note in collection.notes:
            _log.warning("artifacts: %s", note)
        _log.warning("artifacts: %d files in %s", len(taken), folder)

    def interrupt(self) -> None:
        """Stop the running command, and stop waiting for room in the host budget."""
        guest = self._guest_made
        if guest is not None:
            guest.stopped.set()
        super().interrupt()

    def _teardown(self) -> None:
        super()._teardown()
        if self._guest_made is not None:
            self._guest_made.close()
            self._guest_made = None

    def _guest(self) -> ToxGuest:
        """Return the object that starts machines, created on first use."""
        if self._guest_made is None:
            from pytest_microvm.tox.guest import ToxGuest  # noqa: PLC0415 - see tox/plugin.py
            from pytest_microvm.tox.settings import read  # noqa: PLC0415

            root, file = self.core.get("tox_root", Path), self._places.file
            self._check_reads(file.folder)
            self._guest_made = ToxGuest(
                read(self.conf, self.options, root, file),
                project=root,
                made=[self.core.get("work_dir", Path), self.prefix],
                environment=lambda: self._native().environment,
                say=lambda line: _log.warning("%s", line),
            )
        return self._guest_made

    # Files and folders of this computer

    def _read_python_version_file(self, file_paths: list[str]) -> list[str]:
        with in_tox_words():
            self._places.check_version_files(file_paths)
        found: list[str] = super()._read_python_version_file(file_paths)
        return found

    @cached_property
    def _places(self) -> CheckedPlaces:
        from pytest_microvm.tox.checked_places import CheckedPlaces  # noqa: PLC0415 - see tox/plugin.py

        return CheckedPlaces(self.core, self.conf, self.options)

    def _check_reads(self, folder: Path) -> None:
        installs = self._installs_package and (self._mirrors or self.pkg_type == "deps-only")
        self._places.check_reads(folder, reads_project_file=installs)

    def _check_folders(self) -> None:
        """Check that tox empties only its own folders.

        Raises:
            Fail: A folder is outside the project.
        """
        with in_tox_words():
            self._places.check_written(self.env_dir)

    def _handle_env_tmp_dir(self) -> None:
        """Do nothing on this computer: the folder is in the machine."""

    def _clean(self, transitive: bool = False) -> None:
        self._check_folders()
        if self._mirrors and self.conf.get("recreate", bool):
            _log.warning("-r does not make %s again; next step: tox -r without --microvm", self.prefix)
        self._generation.end()
        super()._clean(transitive)

    def _run_recreate_commands(self) -> None:
        """Do nothing: no earlier machine is left to run them in."""
