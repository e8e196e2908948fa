"""The pool: things made ahead, whatever making them does."""

import threading

import pytest

from pytest_microvm.errors import BootError
from pytest_microvm.templates.pool import Pool


class Maker:
    """Makes numbers; can be told to find no room or to fail; remembers what was discarded."""

    def __init__(self):
        self.count = 0
        self.discarded = []
        self.outcome = None
        self.called = threading.Condition()

    def __call__(self):
        with self.called:
            self.count += 1
            self.called.notify_all()
            if isinstance(self.outcome, BaseException):
                raise self.outcome
            return None if self.outcome == "no room" else self.count

    def wait_for(self, count):
        with self.called:
            self.called.wait_for(lambda: self.count >= count)


@pytest.fixture
def maker():
    return Maker()


@pytest.fixture
def pool_of(maker):
    pools = []

    def make(size, **options):
        pools.append(Pool(size, maker, maker.discarded.append, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def wait_ready(pool, count):
    with pool._changed:
        pool._changed.wait_for(lambda: len(pool._ready) == count)


def wait_idle(pool):
    """Wait until every worker has given up for now."""
    with pool._changed:
        pool._changed.wait_for(lambda: not pool._making)


def test_none_of_nothing(pool_of, maker):
    assert pool_of(0).take() is None
    assert maker.count == 0


def test_as_many_as_wanted_are_ready_and_replaced(pool_of, maker):
    pool = pool_of(3)
    wait_ready(pool, 3)
    assert maker.count == 3
    pool.take()
    wait_ready(pool, 3)
    assert maker.count == 4


def test_each_is_given_once(pool_of):
    pool = pool_of(2)
    taken = []
    while len(taken) < 50:
        item = pool.take()
        if item is not None:
            taken.append(item)
    assert len(set(taken)) == 50


def test_closing_discards_what_is_ready(pool_of, maker):
    pool = pool_of(2)
    wait_ready(pool, 2)
    pool.close()
    pool.close()
    assert sorted(maker.discarded) == [1, 2]
    assert pool.take() is None
    assert not [thread for thread in threading.enumerate() if thread in pool._threads]


def test_giving_up_one_makes_room(pool_of, maker):
    pool = pool_of(1)
    wait_ready(pool, 1)
    assert pool.give_up_one()
    assert maker.discarded == [1]
    assert pool_of(0).give_up_one() is False


def test_what_went_bad_while_it_waited_is_discarded(pool_of, maker):
    bad = {1, 2}
    pool = pool_of(1, usable=lambda item: item not in bad)
    wait_ready(pool, 1)
    taken = None
    while taken is None:
        taken = pool.take()
    assert taken == 3
    assert maker.discarded == [1, 2]


@pytest.mark.parametrize("outcome", ["no room", BootError("no luck")])
@pytest.mark.parametrize("size", [1, 3])
def test_failed_making_is_not_retried_until_the_next_take(pool_of, maker, outcome, size):
    maker.outcome = outcome
    pool = pool_of(size)
    maker.wait_for(size)
    wait_idle(pool)
    assert pool.take() is None  # this asks: they try once more
    maker.wait_for(size + 1)
    wait_idle(pool)
    for thread in pool._threads:  # time for tries that must not happen
        thread.join(0.05)
    assert maker.count <= 2 * size
    maker.outcome = None
    item = None
    while item is None:
        item = pool.take()
    assert item > size


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_take_does_not_hang_after_a_fault_in_making(pool_of, maker):
    maker.outcome = ZeroDivisionError("ours")
    pool = pool_of(2)
    maker.wait_for(2)
    assert pool.take() is None
    assert pool.take() is None
    pool.close()


def test_a_taker_waits_for_the_one_being_made(maker):
    begun, go_on = threading.Event(), threading.Event()

    def make():
        begun.set()
        go_on.wait()
        return "made"

    pool = Pool(1, make, lambda item: None)
    begun.wait()
    taken = []
    taker = threading.Thread(target=lambda: taken.append(pool.take()))
    taker.start()
    taker.join(0.05)
    assert taken == []
    go_on.set()
    taker.join()
    assert taken == ["made"]
    pool.close()


def test_closing_discards_what_was_being_made(maker):
    begun, go_on = threading.Event(), threading.Event()
    discarded = []

    def make():
        begun.set()
        go_on.wait()
        return "late"

    pool = Pool(1, make, discarded.append)
    begun.wait()
    closer = threading.Thread(target=pool.close)
    closer.start()
    go_on.set()
    closer.join()
    assert discarded == ["late"]
