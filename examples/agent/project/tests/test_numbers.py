from numbers_ import average


def test_average():
    assert average([1, 2, 6]) == 3


def test_of_nothing():
    assert average([]) == 0
