"""The log of a machine's network: bounded, safe to show, counts that go on."""

from pytest_microvm.events import EventLog
from pytest_microvm.network.proxy.log import MAX_REQUESTS, NetworkLog, NetworkRequest


def request(**changes):
    return NetworkRequest(
        **{
            "at": 1.0,
            "allowed": True,
            "method": "GET",
            "host": "a.example",
            "port": 80,
            "path": "/",
            "rule": "a.example",
            "reason": "allowed by a.example",
        }
        | changes
    )


def test_the_last_requests_are_kept_and_all_are_counted():
    events = EventLog()
    events.add("started", "before all of it")
    log = NetworkLog(events)
    log.add(request(port=1, allowed=False))
    for number in range(MAX_REQUESTS + 5):
        log.add(request(port=number))
    denied, *allowed = log.list()  # many that are allowed do not hide one that was not
    assert (denied.allowed, denied.port) == (False, 1)
    assert [entry.port for entry in allowed] == list(range(5, MAX_REQUESTS + 5))
    assert (log.allowed, log.denied) == (MAX_REQUESTS + 5, 1)
    assert events.list()[0].kind == "started"


def test_what_a_guest_wrote_is_safe_to_show_and_short():
    log = NetworkLog()
    log.add(
        request(method="G" * 999, host="\x1b[2J" + "h" * 9999, path="/\u202e" + "p" * 9999, reason="\n::a::")
    )
    (entry,) = log.list()
    shown = f"{entry.method}{entry.host}{entry.path}{entry.reason}"
    assert len(shown) < 2000
    assert not {"\x1b", "\u202e", "\n"} & set(shown)


def test_an_address_is_shown_as_it_is():
    log = NetworkLog()
    for host in ("::1", "2001:db8::1", "127.0.0.1", "::1%\x1b", "::warning::x"):
        log.add(request(host=host))
    assert [entry.host for entry in log.list()] == [
        "::1", "2001:db8::1", "127.0.0.1", r":\:1%\x1b", r":\:warning::x"
    ]  # fmt: skip


def test_secret_values_are_redacted_in_the_log():
    events = EventLog()
    log = NetworkLog(events, lambda text: text.replace("hunter2", "<secret>"))
    log.add(request(host="hunter2.example", path="/hunter2", reason="no hunter2"))
    assert "hunter2" not in f"{log.list()} {events.lines()}"
    assert log.list()[0].path == "/<secret>"


def test_each_request_is_an_event():
    events = EventLog()
    log = NetworkLog(events)
    log.add(request(allowed=False, seen_by="guest"))
    (event,) = events.list()
    assert (event.kind, event.seen_by, event.data["allowed"]) == ("network", "guest", False)
    assert event.about.startswith("denied GET a.example:80/")


def test_update_sets_status_and_adds_received_bytes():
    log = NetworkLog()
    number = log.add(request())
    log.update(number, status=200)
    log.update(number, sent_bytes=3, received_bytes=4)
    log.update(number, received_bytes=4)
    (entry,) = log.list()
    assert (entry.status, entry.sent_bytes, entry.received_bytes) == (200, 3, 8)


def test_update_of_a_dropped_entry_does_nothing():
    log = NetworkLog()
    numbers = [log.add(request()) for _ in range(MAX_REQUESTS + 1)]
    log.update(numbers[0], status=200)
    assert all(entry.status is None for entry in log.list())
