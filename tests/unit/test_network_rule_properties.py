"""What holds of rules whatever is written and whatever is asked for."""

import posixpath
import re
from dataclasses import replace
from ipaddress import ip_network
from urllib.parse import unquote

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_microvm.errors import UsageError
from pytest_microvm.network.policy.rules import Request, canonical_host, parse_rules


def policy(*texts):
    return parse_rules(texts, "network")


LABELS = st.sampled_from(["a", "b", "files", "xn--bcher-kva", "example", "localhost"])
NAMES = st.lists(LABELS, min_size=1, max_size=3).map(".".join)
ADDRESSES = st.one_of(
    st.ip_addresses().map(str),
    st.sampled_from(["127.0.0.1", "10.0.0.1", "::1", "9.9.9.9", "169.254.169.254"]),
)
NETWORKS = st.tuples(st.ip_addresses(v=4), st.integers(0, 32)).map(
    lambda pair: str(ip_network((int(pair[0]), pair[1]), strict=False))
)
PORTS = st.sampled_from(["", ":80", ":443", ":8080"])
PATHS = st.sampled_from(["", "/", "/a", "/a/*", "/a/b/*"])
BRACKETED = st.one_of(
    NAMES, NAMES.map("*.{}".format), ADDRESSES.map(lambda one: f"[{one}]" if ":" in one else one)
)
METHODS = st.sampled_from(["", "GET ", "POST ", "GET,HEAD "])
RULES = st.one_of(
    st.just("all"),
    NETWORKS,
    st.tuples(BRACKETED, PORTS).map("".join),
    st.tuples(METHODS, st.sampled_from(["http://", "https://"]), BRACKETED, PORTS, PATHS).map("".join),
)
DENYING = RULES.map("deny:{}".format)
POLICIES = st.lists(st.one_of(RULES, DENYING), max_size=5)
REQUESTS = st.builds(
    Request,
    host=st.one_of(NAMES, ADDRESSES),
    port=st.sampled_from([80, 443, 8080]),
    scheme=st.sampled_from(["http", "https"]),
    method=st.sampled_from(["GET", "POST"]),
    path=st.sampled_from(["/", "/a", "/a/b", "/a/b/c", "/a/../b", "/%61/b"]),
)
TUNNELS = st.builds(Request, host=st.one_of(NAMES, ADDRESSES), port=st.sampled_from([80, 443, 8080]))
ASKED = st.one_of(REQUESTS, TUNNELS)


@given(st.one_of(RULES, DENYING))
def test_a_rule_reads_as_it_is_shown(text):
    made = policy(text)
    assert policy(*map(str, made.rules)) == made


@given(POLICIES, DENYING, ASKED, ADDRESSES)
def test_to_forbid_more_allows_nothing_more(rules, more, request, address):
    before, after = policy(*rules), policy(*rules, more)
    assert before.decide(request).allowed or not after.decide(request).allowed
    assert (
        before.decide_address(request, address).allowed or not after.decide_address(request, address).allowed
    )


@given(POLICIES, RULES, ASKED, ADDRESSES)
def test_to_allow_more_forbids_nothing(rules, more, request, address):
    before, after = policy(*rules), policy(*rules, more)
    assert not before.decide(request).allowed or after.decide(request).allowed
    assert (
        not before.decide_address(request, address).allowed or after.decide_address(request, address).allowed
    )


@given(
    st.permutations(
        ["all", "a.example", "deny:b.example", "https://a.example/a/*", "10.0.0.0/8", "deny:*.a"]
    ),
    ASKED,
    ADDRESSES,
)
def test_order_makes_no_difference(rules, request, address):
    one, other = policy(*rules), policy(*sorted(rules))
    assert one.decide(request) == other.decide(request)
    assert one.decide_address(request, address) == other.decide_address(request, address)


@given(POLICIES, ASKED)
def test_the_spelling_of_a_host_makes_no_difference(rules, request):
    made = policy(*rules)
    dotted = request.host if ":" in request.host else request.host + "."
    for spelling in (request.host.upper(), dotted):
        assert made.decide(replace(request, host=spelling)) == made.decide(request)


@given(
    POLICIES, TUNNELS, st.sampled_from(["/", "/a/b", "/a/b/c", "/a/../b"]), st.sampled_from(["GET", "POST"])
)
def test_uninspected_tunnel_carries_no_denied_request(rules, tunnel, path, method):
    made = policy(*rules)
    decision = made.decide(tunnel)
    schemes = {80: ["http"], 443: ["https"]}.get(tunnel.port, ["https"])
    if decision.allowed and not decision.inspect:
        for scheme in schemes:
            inner = made.decide(replace(tunnel, scheme=scheme, path=path, method=method))
            assert inner.rule is None or inner.allowed


@given(st.text(max_size=40))
def test_a_host_has_one_spelling_or_none(text):
    try:
        host = canonical_host(text)
    except ValueError:
        return
    assert canonical_host(host) == host
    assert host.isascii()
    assert host == host.lower()
    assert "%" not in host
    assert not host.endswith(".")


@given(st.text(max_size=60))
def test_any_text_parses_to_a_rule_or_a_usage_error(text):
    try:
        made = parse_rules([text], "network")
    except UsageError:
        return
    assert parse_rules([str(rule) for rule in made.rules], "network") == made


PIECES = [
    "/",
    "//",
    ".",
    "..",
    "%2e",
    "%2E%2e",
    "%2f",
    "\\",
    "%5c",
    ";",
    ";x",
    "%3b",
    "%25",
    "%252e",
    "%252f",
]
PIECES += ["pub", "PUB", "%70ub", "private", "%50rivate", "a", "%20", "%00", "?", "\u00e4", "%c3%a4", "%e4"]
RAW_PATHS = st.tuples(
    st.sampled_from(["/", "/pub/", "/private/", "/pub/..", "/a/", "/pub%2f"]),
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
).map("".join)


def readings(path):
    """Return what a server may take a path for: unescaped ever more often, with other slashes, cut at a ;.

    Letters and digits mean the same escaped or not (RFC 3986, 6.2.2.2).
    """
    found = {re.sub("%[46][1-9A-Fa-f]|%[57][0-9Aa]|%3[0-9]", lambda code: unquote(code[0]), path)}
    for _ in range(3):
        found |= {unquote(each, errors="replace") for each in found}
        found |= {each.replace("\\", "/") for each in found}
        found |= {re.sub(";[^/]*", "", each) for each in found}
    return {posixpath.normpath(re.sub("/+", "/", each)) for each in found}


@settings(max_examples=10 * settings.default.max_examples)
@given(RAW_PATHS)
@example("/%70ub/")
def test_an_allowed_path_is_below_the_rules_in_every_reading(path):
    made = policy("https://files.example/pub/*")
    if made.decide(Request("files.example", 443, "https", "GET", path)).allowed:
        assert [each for each in readings(path) if not f"{each}/".startswith("/pub/")] == []


@settings(max_examples=10 * settings.default.max_examples)
@given(RAW_PATHS)
def test_path_below_a_denied_one_in_any_reading_is_denied(path):
    made = policy("files.example", "deny:https://files.example/private/*")
    if any(f"{each}/".casefold().startswith("/private/") for each in readings(path)):
        assert not made.decide(Request("files.example", 443, "https", "GET", path)).allowed


@given(st.lists(st.booleans(), min_size=20, max_size=20))
def test_no_escaping_gets_past_what_is_forbidden(escaped):
    path = "".join(
        f"%{ord(char):02x}" if escape and char != "/" else char
        for char, escape in zip("/private/a", escaped, strict=False)
    )
    made = policy("files.example", "deny:https://files.example/private/*")
    assert not made.decide(Request("files.example", 443, "https", "GET", path)).allowed
    assert (
        policy("https://files.example/private/*")
        .decide(Request("files.example", 443, "https", "GET", path))
        .allowed
    )
