"""Wheels of one empty module each."""

import zipfile

_TAGS = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(folder, name):
    """Write version 1.0 of a wheel, and return its file's name."""
    file = f"{name}-1.0-py3-none-any.whl"
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / file, "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", _TAGS)
        wheel.writestr(f"{about}/RECORD", "")
    return file
