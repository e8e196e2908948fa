"""Modules for pytest-xdist workers in a machine: the controller's xdist and execnet, and a start-up hook."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.agent.transfer import send_file
from pytest_microvm.errors import MachineError, UsageError
from pytest_microvm.host.starting import machine_facts
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.templates.chain import IN_THE_MAKING, Base, TemplateStep

if TYPE_CHECKING:
    from pytest_microvm.machine.instance import Instance

FOLDER = "/opt/pytest-microvm/xdist"
ENVIRONMENT = {"PYTHONPATH": FOLDER, "PYTEST_PLUGINS": "sitecustomize"}
"""Variables of a worker's Python."""

_DISTRIBUTIONS = ("pytest-xdist", "execnet")  # both ends need the same version: the protocol is private
_START_UP = Path(__file__).with_name("worker_start.py")
_WARM = "import pytest, execnet, xdist.plugin, xdist.remote"


def worker_step(base: Base) -> TemplateStep:
    """Return the template-chain step that copies the modules of xdist's workers into a machine.

    Raises:
        UsageError: pytest-xdist is not installed here.
    """
    archive = _archive()

    def work(instance: Instance) -> dict[str, bytes]:
        link = instance.adopt("agent", IN_THE_MAKING)
        send_file(link, "unpack", FOLDER, io.BytesIO(archive))
        machine = MicroVM(instance, machine_facts(base, "template", 0.0))
        try:  # so that the template has them compiled, and in the page cache
            machine.run(["python3", "-c", _WARM], env=ENVIRONMENT, check=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise MachineError(
                f"image {base.image.name} cannot run workers of pytest-xdist",
                details=str(getattr(error, "stderr", error)),
                resolution="use an image with Python and pytest, such as `python`",
            ) from None
        return {}

    return TemplateStep(
        "workspace", ("xdist", hashlib.sha256(archive).hexdigest()), work, "copying pytest-xdist"
    )


def _archive() -> bytes:
    """Return this environment's pytest-xdist and execnet as a reproducible tar archive."""
    files = {"sitecustomize.py": _START_UP.read_bytes()}
    for name in _DISTRIBUTIONS:
        try:
            paths = metadata.distribution(name).files or ()
        except metadata.PackageNotFoundError:
            raise UsageError(
                f"--xdist: {name} is not installed beside pytest-microvm",
                resolution="install pytest-microvm[xdist] into the environment that runs pytest",
            ) from None
        for path in paths:
            if ".." not in path.parts and "__pycache__" not in path.parts:
                files[str(path)] = Path(str(path.locate())).read_bytes()
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return raw.getvalue()
