"""Services of a kit are started once, in the template, and run in every machine; the kit ``services``."""

from dataclasses import replace
from urllib.request import urlopen

import pytest

from pytest_microvm.errors import MachineError
from pytest_microvm.host import services
from pytest_microvm.images.image import Service
from pytest_microvm.settings.spec import MachineSpec
from support import guards

TICKER = Service("ticker", "echo up $LANG; touch /run/up; exec sleep 31536000", "test -e /run/up")


@pytest.fixture(scope="module")
def base(host):
    return host.base(MachineSpec(image="base"))


def serving(base, *found):
    """Return ``base`` with other services of its image."""
    return replace(base, image=replace(base.image, services=found))


@pytest.fixture(scope="module")
def machine(host):
    """A machine of the kit ``services``."""
    with host.start(image="services", timeout=guards.MACHINE) as machine:
        yield machine


def psql(machine, query, *options):
    return machine.run(["psql", "-At", *options, "-c", query], check=True).stdout.strip()


def fetch(url):
    with urlopen(url, timeout=guards.MACHINE) as response:  # noqa: S310 - of the machine
        return response.read()


# Any kit


def test_a_service_is_started_once_and_runs_in_every_machine(host, base):
    with_ticker = serving(base, TICKER)
    template = host.template(with_ticker)
    processes = set()
    for _ in range(2):
        with host.try_machine(template, with_ticker) as machine:
            processes.add(machine.run(["pgrep", "-f", "^sleep 31536000"], check=True).stdout)
            assert machine.path("/var/log/microvm/ticker.log").read_text() == "up C.UTF-8\n"
    assert len(processes) == 1  # the same process


def test_services_are_part_of_the_templates_key(host, base):
    keys = {host.template(base).key, host.template(serving(base, TICKER)).key}
    assert len(keys) == 2
    assert host.cached(serving(base, replace(TICKER, start="other"))) is None


def test_a_service_that_fails_shows_its_log_made_safe(host, base):
    start = r"printf '::error::boom \033]0;title\007\n' >&2; exit 3"
    broken = serving(base, replace(TICKER, name="broken"), Service("web", start, "test -e /nowhere"))
    with pytest.raises(MachineError) as caught:
        host.template(broken)
    assert caught.value.brief == "service web of image base failed before it was ready (exit code 3)"
    assert caught.value.details == r":\:error::boom \x1b]0;title\x07"
    assert "services.web.start" in caught.value.resolution


def test_a_service_that_never_is_ready_shows_why(host, base, monkeypatch):
    monkeypatch.setattr(services, "_TIMEOUT", 3.0)
    slow = serving(base, Service("slow", "echo waiting; exec sleep 31536000", "echo not yet; false"))
    with pytest.raises(MachineError, match="service slow of image base is not ready after 3 s") as caught:
        host.template(slow)
    assert caught.value.details.splitlines() == ["waiting", "not yet"]


# The kit


def test_postgresql_needs_no_start_and_no_password(machine):
    assert psql(machine, "select current_user") == "postgres"
    assert psql(machine, "select current_user", "-h", "127.0.0.1") == "postgres"
    assert machine.run(["psql", "-Atc", "select 1"], user="postgres", check=True).stdout == "1\n"


def test_redis_and_nginx_serve(machine):
    assert machine.run(["redis-cli", "ping"], check=True).stdout == "PONG\n"
    with machine.forward(80) as address:
        assert b"nginx" in fetch(address.url)


def test_machines_begin_with_the_same_servers_and_share_no_data(host, machine):
    started = "select pg_postmaster_start_time()"
    psql(machine, "create table orders (id int)")
    machine.run(["redis-cli", "set", "key", "value"], check=True)
    with host.start(image="services", timeout=guards.MACHINE) as other:
        assert psql(other, started) == psql(machine, started)  # it was not started again
        assert psql(other, "select count(*) from pg_tables where tablename = 'orders'") == "0"
        assert other.run(["redis-cli", "get", "key"], check=True).stdout == "\n"


def test_time_zones_and_locales_work(machine):
    def date(form, **environment):
        return machine.run(["date", "-d", "2025-03-01 12:00 UTC", form], env=environment, check=True).stdout

    assert date("+%H %Z", TZ="Asia/Tokyo") == "21 JST\n"
    assert date("+%B", LANG="de_DE.UTF-8") == "März\n"
    assert date("+%B", LANG="fr_FR.UTF-8") == "mars\n"
    assert machine.run(["locale", "charmap"], check=True).stdout == "UTF-8\n"
