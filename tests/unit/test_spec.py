"""Sizes, vCPUs, times and specs: what is accepted, and every error by value."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.options import BY_NAME, QUOTAS
from pytest_microvm.settings.reach import parse_hosts, parse_network
from pytest_microvm.settings.spec import (
    PARSERS,
    Limits,
    MachineSpec,
    format_size,
    parse_cpus,
    parse_seconds,
    parse_size,
)

MANY_DIGITS = "9" * 5000
MAX_CPUS = BY_NAME["cpus"].most
MAX_PIDS = BY_NAME["pids"].most


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (1, 1),
        ("4096", 4096),
        ("1K", 1024),
        ("512M", 512 * 1024**2),
        ("512m", 512 * 1024**2),
        (" 2 G ", 2 * 1024**3),
        ("2GB", 2 * 1024**3),
        ("2GiB", 2 * 1024**3),
        ("1T", 1024**4),
        ("10B", 10),
    ],
)
def test_sizes(written, size):
    assert parse_size(written, "memory") == size


@pytest.mark.parametrize(
    "written",
    [0, -1, True, None, 1.5, "", "0", "0G", "-1G", "1.5G", "G", "5iB", "1P", "1 G 2", "٣G", MANY_DIGITS, []],
)
def test_what_is_not_a_size(written):
    with pytest.raises(UsageError) as caught:
        parse_size(written, "marker: memory")
    assert caught.value.brief == (
        f"marker: memory: invalid size: expected bytes, or a number with K, M, G or T, got {written!r}"
    )
    assert "512M" in caught.value.resolution


@given(st.integers(1, 10**17))
def test_a_size_reads_back_as_it_was_written(size):
    assert parse_size(format_size(size), "size") == size


def test_sizes_are_written_with_the_largest_unit_that_fits():
    assert [format_size(size) for size in (0, 1000, 1024, 1536, 512 * 1024**2, 2 * 1024**3, 1024**4)] == [
        "0",
        "1000",
        "1K",
        "1536",
        "512M",
        "2G",
        "1T",
    ]


@pytest.mark.parametrize("written", [1, "2", " 4 ", MAX_CPUS, 0.5, "1.25", 2.0])
def test_cpus(written):
    assert parse_cpus(written, "cpus") == float(written)


@pytest.mark.parametrize(
    ("cpus", "vcpus", "throttle"), [(1, 1, None), (2, 2, None), (0.5, 1, 0.5), (1.5, 2, 1.5)]
)
def test_fractional_cpus_become_throttled_whole_vcpus(cpus, vcpus, throttle):
    limits = Limits(cpus, 1, 1)
    assert (limits.vcpus, limits.throttle) == (vcpus, throttle)


@pytest.mark.parametrize("written", [1, "64", MAX_PIDS])
def test_pids(written):
    assert PARSERS["pids"](written, "pids") == int(written)


@pytest.mark.parametrize("written", [0, -1, True, None, 1.5, "many", "", MAX_PIDS + 1, MANY_DIGITS])
def test_what_is_not_a_number_of_processes(written):
    with pytest.raises(UsageError, match="pids: invalid number of processes: expected 1 to 4194304, got "):
        PARSERS["pids"](written, "pids")


@pytest.mark.parametrize(
    "written", [0, -1, True, None, 0.01, "1e1", "two", "", MAX_CPUS + 1, "²", MANY_DIGITS]
)
def test_what_is_not_a_number_of_cpus(written):
    with pytest.raises(UsageError) as caught:
        parse_cpus(written, "cpus")
    assert caught.value.brief == f"cpus: invalid number of vCPUs: expected 0.05 to 64, got {written!r}"
    assert "0.5 is one vCPU half of the time" in caught.value.resolution


@pytest.mark.parametrize(("written", "seconds"), [(1, 1.0), (0.5, 0.5), ("30", 30.0), ("1e1", 10.0)])
def test_seconds(written, seconds):
    assert parse_seconds(written, "timeout") == seconds


@pytest.mark.parametrize("written", [0, -1, True, None, "soon", "", "nan", "inf", float("inf"), 10**400, []])
def test_what_is_not_a_time(written):
    with pytest.raises(UsageError) as caught:
        parse_seconds(written, "timeout")
    assert caught.value.brief == (
        f"timeout: invalid time: expected a number of seconds above 0, got {written!r}"
    )


def test_changes_are_parsed_and_the_original_stays():
    spec = MachineSpec(image="base", cpus=1)
    changed = spec.with_changes({"cpus": "2", "memory": "1G", "disk": 2**30, "timeout": "5"}, "marker")
    assert changed == MachineSpec("base", 2, 2**30, 2**30, timeout=5.0)
    assert spec == MachineSpec(image="base", cpus=1)
    assert hash(changed) == hash(MachineSpec("base", 2, 2**30, 2**30, timeout=5.0))


@pytest.mark.parametrize(
    ("changes", "brief"),
    [
        ({"cores": 2}, "marker: unknown key 'cores'"),
        ({"zoo": 1, "alpha": 1}, "marker: unknown key 'alpha'"),
        ({"cpus": 0}, "marker: cpus: invalid number of vCPUs: expected 0.05 to 64, got 0"),
        (
            {"memory": "lots"},
            "marker: memory: invalid size: expected bytes, or a number with K, M, G or T, got 'lots'",
        ),
        ({"timeout": 0}, "marker: timeout: invalid time: expected a number of seconds above 0, got 0"),
        ({"image": ""}, "marker: image: invalid image: expected a kit's name or path, got ''"),
        ({"image": 7}, "marker: image: invalid image: expected a kit's name or path, got 7"),
        ({"memory": "1M"}, "memory: invalid size: expected at least 128M to boot, got 1M"),
        ({"disk": "1M"}, "disk: invalid size: expected at least 16M for a file system, got 1M"),
    ],
)
def test_changes_that_cannot_be(changes, brief):
    with pytest.raises(UsageError) as caught:
        MachineSpec().with_changes(changes, "marker")
    assert caught.value.brief == brief
    assert caught.value.resolution


def test_an_unknown_key_is_answered_with_the_known_ones():
    with pytest.raises(UsageError) as caught:
        MachineSpec().with_changes({"ram": 1}, "pyproject.toml")
    assert caught.value.resolution == f"known keys: {', '.join(sorted(PARSERS))}"


def test_the_smallest_machine_is_allowed():
    least = {name: int(BY_NAME[name].least) for name in ("memory", "disk")}
    assert MachineSpec(**least).memory == 128 * 1024**2


def test_every_option_of_a_machine_is_a_field():
    assert list(PARSERS) == list(MachineSpec.__dataclass_fields__)
    assert [quota.name for quota in QUOTAS] == list(Limits.__dataclass_fields__)


def test_where_names_lead_is_written_in_two_ways():
    table = {"API.example.com.": "127.0.0.1:8443", "b.example": "::1", "c.example": "[::1]:80"}
    texts = ["API.example.com.=127.0.0.1:8443", "b.example=::1", "c.example=[::1]:80"]
    parsed = (
        ("api.example.com", ("127.0.0.1", 8443)),
        ("b.example", ("::1", None)),
        ("c.example", ("::1", 80)),
    )
    assert (
        parse_hosts(table, "hosts") == parse_hosts(texts, "hosts") == parse_hosts(parsed, "hosts") == parsed
    )


@pytest.mark.parametrize(
    "value", ["a.example", {"a.example": "localhost"}, {"a": "127.0.0.1:0"}, {"a": 7}, ["a"], 7]
)
def test_where_names_cannot_lead(value):
    with pytest.raises(UsageError, match=r"^hosts: "):
        parse_hosts(value, "hosts")


@pytest.mark.parametrize("value", [7, [7], [""], {"a": "b"}, None])
def test_what_is_no_list_of_rules(value):
    with pytest.raises(UsageError, match="invalid rules: expected a list of texts"):
        parse_network(value, "network")


def test_one_rule_is_a_list_of_one():
    assert parse_network(" pip ", "network") == parse_network(["pip"], "network") == ("pip",)


@pytest.mark.parametrize("value", [0, -1, True, "many", 10**9])
def test_what_is_no_number_of_connections(value):
    with pytest.raises(UsageError, match="invalid number of connections: expected 1 to 999999999, got"):
        PARSERS["connections"](value, "connections")
