"""The meter of a machine's network: what it counts, when it says no, and whose turn it is."""

import asyncio
import threading

import pytest

from pytest_microvm.network.proxy.meter import CHUNK, Meter, QuotaReached


def test_nothing_is_limited_without_a_quota():
    async def use(meter):
        for _ in range(1000):
            await meter.connection()
            await meter.move(CHUNK)

    meter = Meter(None, None, None, pytest.fail)
    asyncio.run(use(meter))
    assert (meter.moved_bytes, meter.made_connections, meter.chunk) == (1000 * CHUNK, 1000, CHUNK)


@pytest.mark.parametrize(
    ("quotas", "told"), [((10, None), ("network_bytes", 10, 11)), ((None, 2), ("connections", 2, 3))]
)
def test_first_excess_is_reported_once_and_ends_the_network(quotas, told):
    exceeded = []

    async def use(meter):
        for _ in range(2):
            await meter.connection()
            await meter.move(5)
        for step in (meter.move(1), meter.connection(), meter.move(1)):
            try:
                await step
            except QuotaReached:
                exceeded.append("ended")

    asyncio.run(use(Meter(*quotas, None, lambda *what: exceeded.append((what, threading.current_thread())))))
    (what, thread), *rest = [entry for entry in exceeded if entry != "ended"]
    assert (what, rest) == (told, [])
    assert thread is not threading.main_thread()
    assert exceeded.count("ended") in {2, 3}
    assert exceeded[-1] == "ended"


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time goes on when nothing else is to be done."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def time(self):
        return self.now

    def _run_once(self):
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0]._when)
        super()._run_once()


def test_bandwidth_is_shared_fairly():
    loop = Clock()
    meter = Meter(None, None, 1000, pytest.fail)
    ends = {}

    async def move(name, pieces):
        for _ in range(pieces):
            await meter.move(meter.chunk)
        ends[name] = loop.now

    async def several():
        await asyncio.gather(move("long", 100), *[move(number, 10) for number in range(4)])

    try:
        loop.run_until_complete(several())
    finally:
        loop.close()
    assert meter.chunk == 100
    # 14000 bytes at 1000 a second, but for the start; the short ones have a fifth each until they are done
    assert ends["long"] == pytest.approx(14, abs=0.2)
    assert all(ends[number] == pytest.approx(5, abs=0.6) for number in range(4))


def test_a_pause_is_not_saved_up():
    loop = Clock()
    meter = Meter(None, None, 1000, pytest.fail)

    async def use():
        await meter.move(100)
        await asyncio.sleep(100)
        begin = loop.now
        for _ in range(20):
            await meter.move(100)
        return loop.now - begin

    try:
        assert loop.run_until_complete(use()) == pytest.approx(2, abs=0.1)
    finally:
        loop.close()
