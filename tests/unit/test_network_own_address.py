"""This computer's own addresses, public ones too: its services are reached only where a rule names them."""

import http.server
import socket
import threading
from ipaddress import ip_network

import pytest

from pytest_microvm.network.policy.rules import Request, parse_rules
from support.network import World

OWN = ip_network("203.0.113.7")


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def own():
    """A server of this computer on the address by which it would reach others; nothing is sent for that."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("203.0.113.1", 9))
        except OSError:
            pytest.skip("this computer has loopback alone")
        address = sock.getsockname()[0]
    with http.server.ThreadingHTTPServer((address, 0), Hello) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address
        server.shutdown()
        thread.join()


def led(address):
    async def resolve(_host, _port):
        return [address]

    return resolve


@pytest.mark.parametrize("rules", [["all"], ["0.0.0.0/0"], ["a.test:{port}"]])
@pytest.mark.parametrize("host", ["{address}", "a.test"])
def test_no_rule_names_it(own, rules, host):
    address, port = own
    rules = [rule.format(port=port) for rule in rules]
    with World(rules, resolve=led(address)) as world:
        status, _headers, body = world.get(f"http://{host.format(address=address)}:{port}/")
        assert (status, body[:7]) == (403, b"microvm")
        assert len(world.denied) == 1


@pytest.mark.parametrize(
    "rules", [["{address}:{port}"], ["http://{address}:{port}/*"], ["all", "{address}:{port}"]]
)
def test_a_rule_names_it(own, rules):
    address, port = own
    with World([rule.format(address=address, port=port) for rule in rules]) as world:
        assert world.get(f"http://{address}:{port}/")[2] == b"hello"


def test_a_name_leads_to_it_and_a_rule_names_both(own):
    address, port = own
    with World([f"a.test:{port}", f"{address}:{port}"], resolve=led(address)) as world:
        assert world.get(f"http://a.test:{port}/")[2] == b"hello"


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (["a.test"], False),
        (["all"], False),
        (["a.test", "203.0.113.7"], True),
        (["a.test", "203.0.113.7:81"], False),
        (["a.test", "203.0.113.0/24"], False),
        (["a.test", "deny:203.0.113.7:81"], False),
    ],
)
def test_what_is_expected_there(rules, expected):
    assert parse_rules(rules, "test").expects(Request("a.test", 80), "203.0.113.7", OWN) is expected


def test_the_users_own_configuration_may_name_it():
    rule = parse_rules(["a.test"], "test").rules[0]
    policy = parse_rules(["pip"], "test", lambda _name: [type(rule)(rule.target, preset="pip")])
    assert policy.expects(Request("a.test", 443), "203.0.113.7", OWN)
