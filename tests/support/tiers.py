"""What `make test` runs of many inputs of one kind; `make test-all` runs all."""

import pytest


def thorough_but(values, *chosen):
    """Return the values as parameters of a test: all but the chosen ones are for `make test-all`."""
    missing = [value for value in chosen if value not in values]
    if missing:
        raise ValueError(f"not among the values: {missing}")
    return [
        pytest.param(value, marks=[] if value in chosen else pytest.mark.thorough, id=ascii(value).strip("'"))
        for value in values
    ]
