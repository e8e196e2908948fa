"""Numbers."""


def average(numbers):
    """Return the mean of some numbers, 0 of none."""
    return sum(numbers) / len(numbers)
