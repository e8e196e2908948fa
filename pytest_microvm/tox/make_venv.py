"""Script for an image's Python: create a virtual environment with pip, without running pip.

Its text is passed to an interpreter in a machine with ``-c``, apart from this package. ensurepip would run
pip to install pip, which takes half a minute under software emulation; this script unpacks ensurepip's
wheels instead. pip would only add a record of the installed files, which is not needed.
"""

import ensurepip
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

_SCRIPT = "#!{python}\nimport sys\nfrom pip._internal.cli.main import main\nsys.exit(main())\n"


def main(folder: Path, system: str) -> int:
    """Create the environment; include the system's packages if ``system`` is not empty; return the status."""
    options = ["--system-site-packages"] if system else []
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", *options, str(folder)], check=True)
    python = str(folder / "bin" / "python")
    wheels = {name: _wheels(name) for name in ("pip", "setuptools")}
    if not wheels["pip"]:
        return subprocess.run([python, "-m", "ensurepip", "--default-pip"], check=False).returncode
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    target = subprocess.run(ask, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    for found in wheels.values():
        if found:
            with zipfile.ZipFile(found[-1]) as wheel:
                wheel.extractall(target)
    script = folder / "bin" / "pip"
    script.write_text(_SCRIPT.format(python=python), encoding="utf-8")
    script.chmod(0o755)
    (folder / "bin" / "pip3").symlink_to("pip")
    return 0


def _wheels(name: str) -> "list[Path]":
    """Return ensurepip's wheels of a project; some distributions keep them in a separate folder."""
    places = [sysconfig.get_config_var("WHEEL_PKG_DIR"), Path(ensurepip.__file__).parent / "_bundled"]
    return sorted(path for place in places if place for path in Path(place).glob(f"{name}-*.whl"))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
