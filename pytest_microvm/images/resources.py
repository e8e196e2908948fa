"""The default limits of an image's machines: the table ``resources`` of kits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_microvm.errors import KitError, UsageError
from pytest_microvm.images.kit_errors import bad_value, unknown_key
from pytest_microvm.settings.options import QUOTAS
from pytest_microvm.settings.spec import PARSERS, check_minimum

if TYPE_CHECKING:
    from pathlib import Path


def parse_resources(path: Path, key: str, value: object) -> dict[str, float]:
    """Parse the table ``resources``: sizes in bytes, times in seconds.

    Raises:
        KitError: A key is unknown, or a value invalid.
    """
    if not isinstance(value, dict):
        raise bad_value(path, key, "a table", value, f'write [{key}] and lines such as memory = "512M"')
    known = {quota.name: quota for quota in QUOTAS}
    parsed = {}
    for name, item in value.items():
        where = f"{path}: {key}.{name}"
        if name not in known:
            raise unknown_key(path, f"{key}.{name}", known)
        try:
            parsed[name] = PARSERS[name](item, where)
            if known[name].kind == "size":
                check_minimum(where, name, parsed[name])
        except UsageError as error:
            raise KitError(error.brief, details=error.details, resolution=error.resolution) from error
    return parsed
