"""The package's public names exist, are listed once and cost nothing until used."""

import subprocess
import sys

import pytest

import pytest_microvm


@pytest.mark.parametrize("name", pytest_microvm.__all__)
def test_every_public_name_can_be_imported(name):
    thing = getattr(pytest_microvm, name)
    assert thing.__name__ == name
    assert thing.__doc__


def test_the_list_is_sorted_and_complete():
    assert pytest_microvm.__all__ == sorted(pytest_microvm._HOMES)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = pytest_microvm.Nothing


def test_importing_the_package_imports_nothing_but_typing():
    code = (
        "import sys, typing, __future__; old = set(sys.modules);"
        "import pytest_microvm; print(set(sys.modules) - old)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "{'pytest_microvm'}"
