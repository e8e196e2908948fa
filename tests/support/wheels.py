"""Wheels of one empty module each."""

import io
import zipfile

_TAGS = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def wheel(name, version="1.0"):
    """Return the content of a wheel."""
    content = io.BytesIO()
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", _TAGS)
        archive.writestr(f"{about}/RECORD", "")
    return content.getvalue()


def write_wheel(folder, name):
    """Write version 1.0 of a wheel, and return its file's name."""
    file = f"{name}-1.0-py3-none-any.whl"
    (folder / file).write_bytes(wheel(name))
    return file
