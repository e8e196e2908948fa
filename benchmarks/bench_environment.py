"""The environment of this computer in a machine: packing, finding it unchanged, and the first result.

A new virtual environment gets packages of pip's index. `pytest --microvm` in it, which mirrors it, alternates
with a run in which `prepare` installs the same packages from wheels that are already here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_edit import cache_without_templates
from measure import Samples, promise

import pytest_microvm

ROUNDS = 3
IMAGE_PYTHON = "3.13.5"  # of the image `python`, for which the wheels are
PACKAGES = [
    "flask", "httpx", "structlog", "tomlkit", "tenacity", "attrs", "pytest-asyncio", "pytest-mock",
    "pytest-cov", "sqlalchemy", "alembic", "pydantic", "pydantic-settings", "fastapi", "uvicorn", "celery",
    "redis", "django",
    "djangorestframework", "cryptography", "pyyaml", "typer", "boto3", "aiohttp", "beautifulsoup4", "lxml",
    "marshmallow", "python-dateutil", "pillow", "gunicorn", "freezegun",
]  # fmt: skip
TEST = "import flask\n\n\ndef test_it():\n    assert flask.Flask('it').name == 'it'\n"
STORE = """
import time
from pytest_microvm.host.host import Host
from pytest_microvm.settings.spec import MachineSpec

host = Host(say=lambda line: None)
host.image(MachineSpec(image="python"))
begin = time.perf_counter()
host.image(MachineSpec(image="python", python="host"))
print(time.perf_counter() - begin)
host.close()
"""


def main() -> list[dict[str, object]]:
    """Measure in turn, print, and return what was promised."""
    packed, found, mirrored, prepared = Samples(), Samples(), Samples(), Samples()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = environment(folder / "env")
        wheels = folder / "wheels"
        download(python, wheels)
        count = len(list(wheels.glob("*.whl")))
        for _ in range(ROUNDS):
            change(python)
            for samples in (packed, found):
                samples.values.append(float(subprocess.check_output([str(python), "-c", STORE])))
            change(python)
            first_result(mirrored, python, folder / "mirrored")
            first_result(prepared, python, folder / "prepared", wheels)
    print(f"{count} wheels")
    print(f"packing the environment               {packed} s")
    print(f"finding it unchanged                  {found} s")
    print(f"the first result, mirrored            {mirrored} s")
    print(f"the first result, prepare with wheels {prepared} s")
    return [
        promise(
            "the first result, mirrored, against prepare with wheels",
            mirrored.median / prepared.median,
            0.2,
            " x",
        )
    ]


def environment(folder: Path) -> Path:
    """Make a virtual environment with the packages and this one; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    source = Path(pytest_microvm.__file__).parents[1]
    pip(python, "install", "-e", str(source), *PACKAGES)
    return python


def download(python: Path, wheels: Path) -> None:
    """Download wheels of the packages for the image's Python, which may need other versions."""
    target = ["--only-binary=:all:", f"--python-version={IMAGE_PYTHON}", "--dest", str(wheels)]
    pip(python, "download", *target, *PACKAGES)


def pip(python: Path, *words: str) -> None:
    """Run pip, silently unless it fails."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"pip {' '.join(words)} failed\n{done.stdout}{done.stderr}")


def change(python: Path) -> None:
    """Change a file of the environment, so that it is packed again."""
    (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
    (site / "changed.txt").write_text(str(time.time_ns()))


def first_result(samples: Samples, python: Path, project: Path, wheels: Path | None = None) -> None:
    """Run one test in a cache without templates, and add the seconds until its result to ``samples``."""
    project.mkdir(exist_ok=True)
    (project / "test_it.py").write_text(TEST)
    settings = "[tool.pytest-microvm]\n"
    if wheels is not None:
        install = "python3 -m pip install -q --no-index --find-links=wheels --no-deps wheels/*.whl"
        settings += f'prepare = ["{install}"]\nprepare_inputs = ["wheels"]\n'
        if not (project / "wheels").exists():
            wheels.rename(project / "wheels")
    (project / "pyproject.toml").write_text(settings)
    command = [str(python), "-m", "pytest", "--microvm", "-v", "-p", "no:cacheprovider"]
    with cache_without_templates() as cache:
        environment = {**os.environ, "PYTEST_MICROVM_CACHE": cache}
        with samples.timing():
            process = subprocess.Popen(
                command, cwd=project, env=environment, stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            shown = []
            for line in process.stdout:
                shown.append(line)
                if "PASSED" in line:
                    break
        process.stdout.read()
        if process.wait() != 0:
            raise SystemExit(f"{command} ended with status {process.returncode}\n{''.join(shown)}")


if __name__ == "__main__":
    main()
