"""The package's modules for containment, put into a machine to be tried on its kernel."""

from pathlib import Path

import pytest_microvm

FOLDER = "/code"
"""For the machine's ``PYTHONPATH``."""


def push_modules(vm):
    """Copy what the walls around a VMM need, which is the standard library and these files."""
    package = Path(pytest_microvm.__file__).parent
    files = [package / "__init__.py", package / "errors.py", *(package / "hypervisors").glob("*.py")]
    files += [package / "untrusted" / "__init__.py", package / "untrusted" / "program_path.py"]
    files += [path for path in (package / "programs").iterdir() if path.is_file()]
    for file in files:
        vm.path(FOLDER, "pytest_microvm", str(file.parent.relative_to(package))).mkdir(
            parents=True, exist_ok=True
        )
        vm.push(file, f"{FOLDER}/pytest_microvm/{file.relative_to(package)}")
