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


def by_turns(entries, values):
    """Return all pairs as parameters of a test; `make test` runs every value with one entry, by turns."""
    return [
        pytest.param(
            entry,
            value,
            marks=[] if turn == number % len(entries) else pytest.mark.thorough,
            id=f"{entry}-{' '.join(value)}",
        )
        for number, value in enumerate(values)
        for turn, entry in enumerate(entries)
    ]
