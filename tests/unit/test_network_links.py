"""Public addresses on this computer's links are reached only where a rule names them: real routes decide."""

import json
import os
import shutil
import subprocess
import sys

import pytest

# Networks with public addresses, some behind routers, and tunnels to one of them and to the internet.
LINKS = """
ip link set lo up
ip link add eth0 type veth peer name other && ip link set other up && ip link set eth0 up
ip link add wg0 type ifb && ip link set wg0 up
ip address add 203.0.113.10/24 dev eth0
ip address add 2001:db8:1::10/64 dev eth0 nodad
ip route add 192.0.2.1 dev eth0
ip route add 192.0.2.16/28 via 192.0.2.1
ip route add 192.0.2.32/28 via inet6 fe80::1 dev eth0
ip route add 192.0.2.64/28 nexthop via 203.0.113.1 nexthop dev wg0
ip route add 192.0.2.80/28 nexthop via 203.0.113.1 nexthop via 203.0.113.2
ip route add 198.51.100.0/24 dev wg0
ip route add unreachable 198.51.100.128/25
ip route add 8.0.0.0/5 dev wg0
ip route add default via 203.0.113.1
ip -6 route add default via 2001:db8:1::1
ip neighbour add 2001:db8:2::7 lladdr 02:00:00:00:00:07 dev eth0
ip route add 192.0.2.128/28 dev wg0 table 77
ip rule add to 192.0.2.128/28 table 77
echo ready
exec "$@"
"""
DECIDE = """
import json, sys
from pytest_microvm.network.proxy.own_addresses import decide_here
from pytest_microvm.network.policy.rules import Request, parse_rules
for line in sys.stdin:
    rules, host, address = json.loads(line)
    decision = decide_here(parse_rules(rules, "test"), Request(host, 80), address)
    print(json.dumps([decision.allowed, decision.reason]), flush=True)
"""


@pytest.fixture(scope="module")
def decided():
    """Decide in a network namespace of its own."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("unshare(1) and ip(8) are needed")
    unshare = ["unshare", "--net"] if os.getuid() == 0 else ["unshare", "--net", "--map-root-user"]
    command = [*unshare, "sh", "-e", "-c", LINKS, "sh", sys.executable, "-c", DECIDE]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        if child.stdout.readline() != b"ready\n":
            pytest.skip(f"no such links can be made here: {child.stderr.read()[-300:]}")

        def decide(rules, host, address):
            child.stdin.write(json.dumps([rules, host, address]).encode() + b"\n")
            child.stdin.flush()
            return json.loads(child.stdout.readline())

        yield decide
        child.stdin.close()


ON_LINK = [
    "203.0.113.77",
    "2001:db8:1::77",
    "192.0.2.1",  # a router
    "192.0.2.65",  # on one of two ways
    "192.0.2.129",  # in another table
    "198.51.100.7",  # behind a tunnel
    "203.0.113.10",  # its own
    "2001:db8:1::10",
    "64:ff9b::cb00:714d",  # 203.0.113.77 behind a translator
    "2002:cb00:714d::1",
    "2001:db8:2::7",  # known by its link-layer address alone
]


@pytest.mark.parametrize("address", ON_LINK)
@pytest.mark.parametrize(
    "rules", [["all"], ["a.test"], ["*.test", "a.test"], ["a.test", "0.0.0.0/0", "::/0"]]
)
def test_a_name_does_not_lead_to_a_neighbour(decided, rules, address):
    allowed, reason = decided(rules, "a.test", address)
    assert not allowed
    assert "no rule names" in reason


@pytest.mark.parametrize("address", ON_LINK)
@pytest.mark.parametrize("rules", [["all"], ["0.0.0.0/0", "::/0"], ["128.0.0.0/1", "::/1"]])
def test_a_neighbour_is_not_asked_for_itself(decided, rules, address):
    allowed, reason = decided(rules, address, address)
    assert not allowed
    assert "no rule names" in reason


@pytest.mark.parametrize("address", ON_LINK)
def test_a_rule_names_a_neighbour(decided, address):
    assert decided([address], address, address)[0]
    assert decided(["a.test", address], "a.test", address)[0]
    assert decided(["all", address], "a.test", address)[0]


def test_a_rule_names_a_network_on_the_link(decided):
    assert decided(["203.0.113.0/24"], "203.0.113.77", "203.0.113.77")[0]
    assert decided(["a.test", "2001:db8:1:0:0::/80"], "a.test", "2001:db8:1::77")[0]
    assert not decided(["203.0.112.0/23"], "203.0.113.77", "203.0.113.77")[0]
    assert not decided(["203.0.113.0/24"], "203.0.113.10", "203.0.113.10")[0], (
        "its own needs the address itself"
    )


@pytest.mark.parametrize(
    "address",
    [
        "192.0.2.17",  # through a router
        "192.0.2.33",
        "192.0.2.81",
        "192.0.2.200",  # through the default route
        "2001:db8:3::7",
        "9.9.9.9",  # through a tunnel without a router that takes too much to be a network
        "198.51.100.200",  # nowhere: connecting says so
    ],
)
def test_what_is_not_on_a_link_needs_no_rule_of_its_own(decided, address):
    assert decided(["all"], "a.test", address)[0]
    assert decided(["all"], address, address)[0]


NOWHERE = """
import socket, sys
from pytest_microvm.network.proxy import routes
routes._GET_ROUTE = 0x7FF0  # no such request: as where netlink is not to be had
"""


def test_a_kernel_that_cannot_be_asked_is_a_refusal():
    done = subprocess.run(
        [sys.executable, "-c", NOWHERE + DECIDE],
        input='[["all"], "a.test", "192.0.2.9"]\n[["a.test", "192.0.2.9"], "a.test", "192.0.2.9"]\n',
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (refused, reason), (allowed, _) = map(json.loads, done.stdout.splitlines())
    assert not refused
    assert "cannot be asked" in reason
    assert allowed
