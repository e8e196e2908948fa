"""Rules: how they are written, and what they decide."""

from dataclasses import replace

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.network.policy.rules import PRESETS, Decision, Policy, Request, parse_rules


def policy(*texts, **presets):
    return parse_rules(texts, "network", lambda name: presets[name].rules)


def preset(name, *texts):
    return Policy(tuple(replace(rule, preset=name) for rule in parse_rules(texts, "a preset").rules))


def ask(url, method="GET"):
    """Return the request for ``http(s)://host:port/path``, or for a tunnel to ``host:port``."""
    scheme, slashes, rest = url.rpartition("://")
    authority, slash, path = rest.partition("/")
    host, _, port = (
        authority.rpartition(":") if authority[-1:].isdecimal() and ":" in authority else (authority, "", "")
    )
    host = host or authority
    return Request(
        host.strip("[]"),
        int(port or {"http": 80, "ws": 80}.get(scheme, 443)),
        scheme or None,
        method if slashes else None,
        slash + path or "/" if slashes else None,
    )


def allows(rules, url, method="GET", address=None):
    request = ask(url, method)
    decision = rules.decide(request)
    return (rules.decide_address(request, address) if address else decision).allowed


# What is written


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Files.Example.", "files.example"),
        ("*.EXAMPLE", "*.example"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("files.example:8080", "files.example:8080"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.0.0.0/8:5432", "10.0.0.0/8:5432"),
        ("10.1.2.3/32", "10.1.2.3"),
        ("[::1]:8080", "[::1]:8080"),
        ("[0:0:0:0:0:0:0:1]", "::1"),
        ("fd00::/8", "fd00::/8"),
        ("[fd00::/8]:53", "[fd00::/8]:53"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("https://Files.Example:443/a/*", "https://files.example/a/*"),
        ("https://files.example/*", "https://files.example"),
        ("http://files.example:443", "http://files.example:443"),
        ("head,get  https://files.example/%61/*", "GET,HEAD https://files.example/a/*"),
        ("GET https://*.example/a%20b", "GET https://*.example/a%20b"),
        ("https://[::1]:8443/x", "https://[::1]:8443/x"),
        ("deny: files.example", "deny:files.example"),
        ("DENY:POST https://files.example", "deny:POST https://files.example"),
        ("all", "all"),
        ("deny:all", "deny:all"),
    ],
)
def test_one_spelling_for_each(text, same):
    (rule,) = policy(text).rules
    assert str(rule) == same
    assert policy(same).rules == (rule,)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        ("deny:", "it is empty"),
        ("*", "a * stands for subdomains"),
        ("*.*.example", "a * stands for subdomains"),
        ("files.*", "a * stands for subdomains"),
        ("*.10.0.0.1", "addresses have no subdomains"),
        ("files.example:0", "no port"),
        ("files.example:65536", "65536 is no port"),
        ("files.example:https", "no port"),
        ("files.example:", "no port"),
        ("files.example/path", "what has a / in it is a network"),
        ("10.0.0.1/8", "written 10.0.0.0/8"),
        ("127.1", "this is the address 127.0.0.1"),
        ("0x7f.1", "this is the address 127.0.0.1"),
        ("2130706433", "this is the address 127.0.0.1"),
        ("1.2.3.256", "is no host"),
        ("fe80::1%eth0", "is no host"),
        ("files.exa%6dple", "is no host"),
        ("stra\u00dfe.example", "is no host"),
        ("-files.example", "is no host"),
        ("a" * 64 + ".example", "is no host"),
        ("[files.example]:80", "brackets"),
        ("GET files.example", "has a space"),
        ("a.example b.example", "has a space"),
        ("ftp://files.example", "ftp:// is not looked into"),
        ("https://", "is no host"),
        ("https://10.0.0.0/8/*/x", "more than one way"),
        ("https://files.example/a*", "stands after a /"),
        ("https://files.example/*/a", "more than one way"),
        ("https://files.example/a/../*", "more than one way"),
        ("https://files.example/a%2f*", "stands after a /"),
        ("https://files.example/a?b=c", "query"),
        ("G=T https://files.example", "not methods"),
        ("CONNECT https://files.example", "not methods"),
        ("PIP", "meaning of its own"),
        ("pip.", "meaning of its own"),
        ("deny.:80", "meaning of its own"),
    ],
)
def test_what_is_no_rule_is_refused_with_a_reason(text, why):
    with pytest.raises(UsageError) as caught:
        parse_rules([text], "tool.pytest-microvm.network")
    assert caught.value.brief.startswith("tool.pytest-microvm.network: ")
    assert why in caught.value.brief
    assert caught.value.resolution


@pytest.mark.parametrize("text", ["https://me:hunter2@files.example/x/*", "me:hunter2@files.example"])
def test_a_password_in_a_rule_is_not_repeated(text):
    with pytest.raises(UsageError) as caught:
        parse_rules([text], "network")
    assert "hunter2" not in str(caught.value)
    assert "credential" in caught.value.resolution


def test_presets_are_known_by_name_without_being_read():
    assert parse_rules([*PRESETS, "deny:pip"], "network") == Policy()


# What is decided


def test_nothing_is_allowed_unless_a_rule_allows_it():
    assert Policy().decide(ask("https://files.example/")) == Decision(
        False, "no rule allows anything, so not files.example:443", None
    )


@pytest.mark.parametrize(
    ("rules", "yes", "no"),
    [
        (
            ["files.example"],
            [
                "http://files.example/x",
                "https://FILES.example./",
                "files.example:443",
                "files.example:80",
                "wss://files.example/",
            ],
            [
                "https://files.example:8443/",
                "http://files.example:443/",
                "https://files.example:80/",
                "files.example:22",
                "https://a.files.example/",
                "https://evilfiles.example/",
                "https://files.example.evil/",
            ],
        ),
        (
            ["*.example"],
            ["https://a.example/", "https://b.a.example/"],
            ["https://example/", "https://evilexample/"],
        ),
        (["files.example:22"], ["files.example:22", "http://files.example:22/"], ["https://files.example/"]),
        (
            ["10.0.0.0/8"],
            [
                "http://10.1.2.3/",
                "https://10.255.255.255/",
                "http://167772161/",
                "http://0xa.1/",
                "http://[::ffff:10.0.0.1]/",
            ],
            ["http://11.0.0.1/", "http://10.1.2.3:8080/", "http://a.example/", "http://[64:ff9b::a00:1]/"],
        ),
        (
            ["[::1]:8080"],
            ["http://[::1]:8080/", "[::1]:8080", "[0:0::1]:8080"],
            ["http://[::1]/", "http://[::2]:8080/", "http://127.0.0.1:8080/"],
        ),
        (
            ["all"],
            ["https://a.example/", "a.example:22", "http://198.51.100.7/"],
            [
                "http://10.0.0.1/",
                "http://127.0.0.1/",
                "http://localhost/",
                "http://x.localhost/",
                "http://169.254.169.254/",
                "http://[fe80::1]/",
                "http://[::]/",
            ],
        ),
        (["0.0.0.0/0"], ["http://9.9.9.9/"], ["http://127.0.0.1/", "http://10.0.0.1/", "http://a.example/"]),
        (["169.254.0.0/16"], ["http://169.254.1.1/"], ["http://169.254.169.254/"]),
        (["169.254.169.254"], ["http://169.254.169.254/"], ["http://169.254.169.253/"]),
        (
            ["all", "deny:*.example"],
            ["https://example/", "https://a.test/"],
            ["https://a.example/", "a.example:22", "http://A.EXAMPLE.:80/"],
        ),
        (
            ["files.example", "deny:files.example:80"],
            ["https://files.example/"],
            ["http://files.example/", "files.example:80"],
        ),
        (
            ["all", "deny:9.0.0.0/8"],
            ["http://8.8.8.8/"],
            [
                "http://9.9.9.9/",
                "http://9.1:8080/",
                "http://[64:ff9b::909:909]/",
                "http://[2002:909:909::1]/",
            ],
        ),
        (
            ["https://files.example"],
            ["https://files.example/x", "files.example:443"],
            ["http://files.example/", "files.example:80"],
        ),
        (
            ["http://files.example:8080"],
            ["http://files.example:8080/x", "files.example:8080"],
            ["https://files.example:8080/"],
        ),
        (
            ["https://files.example/pub/*"],
            [
                "https://files.example/pub/",
                "https://files.example/pub/x/y",
                "https://files.example/p%75b/%7Ex",
                "files.example:443",
            ],
            [
                "https://files.example/",
                "https://files.example/pub",
                "https://files.example/public",
                "https://files.example/Pub/x",
                "https://files.example/pub/../x",
                "https://files.example/pub/%2e%2e/x",
                "https://files.example/pub/..%2fx",
                "https://files.example/pub/%2E./x",
                "https://files.example/pub//x",
                "https://files.example//pub/x",
                "https://files.example/pub/..;/x",
                "https://files.example/pub\\..\\x",
                "https://files.example/pub/%5c..%5cx",
                "https://files.example/pub/%252e%252e/x",
                "https://files.example/pub/.",
                "https://files.example/pub/%00",
                "https://files.example/pub/%ff",
                "https://files.example/pub/%zz",
                "https://files.example/pub/ü",
                "http://files.example/pub/x",
            ],
        ),
        (
            ["https://files.example/front"],
            ["https://files.example/front"],
            ["https://files.example/front/", "https://files.example/front/x"],
        ),
        (
            ["files.example", "deny:https://files.example/private/*"],
            [
                "https://files.example/",
                "https://files.example/privateer",
                "files.example:443",
                "http://files.example/private/x",
            ],
            [
                "https://files.example/private",
                "https://files.example/private/",
                "https://files.example/private/x",
                "https://files.example/PRIVATE/x",
                "https://files.example/%70rivate/x",
                "https://files.example/x/../private/y",
                "https://files.example//private/x",
                "https://files.example/x;y",
            ],
        ),
    ],
)
def test_what_rules_allow(rules, yes, no):
    made = policy(*rules)
    assert [url for url in yes if not allows(made, url)] == []
    assert [url for url in no if allows(made, url)] == []


def test_methods():
    reading = policy("GET,HEAD https://files.example")
    assert [
        method
        for method in ("GET", "HEAD", "POST", "get", "OPTIONS")
        if allows(reading, "https://files.example/", method)
    ] == ["GET", "HEAD"]
    no_post = policy("files.example", "deny:POST https://files.example")
    assert [
        method
        for method in ("GET", "POST", "post", "PUT")
        if allows(no_post, "https://files.example/", method)
    ] == ["GET", "PUT"]


@pytest.mark.parametrize(
    ("rules", "tunnel", "inspect", "tcp"),
    [
        (["files.example"], "files.example:443", False, False),
        (["files.example:443"], "files.example:443", False, True),
        (["files.example", "files.example:443"], "files.example:443", False, True),
        (["all"], "files.example:443", False, True),
        (["https://files.example:8443"], "files.example:8443", False, False),
        (["http://files.example"], "files.example:80", False, False),
        (["http://files.example:8080"], "files.example:8080", True, False),
        (["https://files.example/a/*"], "files.example:443", True, False),
        (["GET https://files.example"], "files.example:443", True, False),
        (["https://files.example/a/*", "files.example"], "files.example:443", False, False),
        (["files.example:443", "deny:https://files.example/a/*"], "files.example:443", True, False),
        (["files.example", "deny:https://files.example/a/*"], "files.example:80", False, False),
        (["files.example", "deny:POST http://files.example"], "files.example:80", True, False),
    ],
)
def test_tunnels(rules, tunnel, inspect, tcp):
    decision = policy(*rules).decide(ask(tunnel))
    assert (decision.allowed, decision.inspect, decision.tcp) == (True, inspect, tcp)


def test_inspection_is_only_needed_for_parts_of_https():
    assert not policy("files.example", "http://files.example/a/*", "https://files.example").needs_inspection
    assert policy("deny:https://files.example/a/*").needs_inspection
    assert policy("GET https://files.example").needs_inspection


def test_a_request_of_which_too_little_is_known_is_refused():
    rules = policy("https://files.example/a/*")
    assert not rules.decide(Request("files.example", 443, "https")).allowed
    assert (
        not policy("files.example", "deny:https://files.example/a/*")
        .decide(Request("files.example", 443, "https"))
        .allowed
    )


@pytest.mark.parametrize(
    "request_",
    [
        Request("files.example", 0),
        Request("files.example", 65536),
        Request("files.example", 80, "gopher"),
        Request("", 80),
        Request("me@files.example", 80),
        Request("files.example%00", 80),
        Request("fe80::1%1", 80),
        Request("files.example/", 80),
        Request("files example", 80),
        Request("1.2.3.4.5", 80),
        Request("08.1.1.1", 80),
    ],
)
def test_invalid_request_is_denied_under_any_rules(request_):
    assert policy("all").decide(request_).reason.startswith("not a request that could be allowed: ")
    assert not policy("all").decide_address(request_, "9.9.9.9").allowed


# Once the address is known


@pytest.mark.parametrize(
    "address",
    """
    127.0.0.1 127.255.255.254 ::1 0.0.0.0 :: 10.0.0.1 172.31.255.255 192.168.1.1 100.64.0.1
    169.254.1.1 169.254.169.254 168.63.129.16 fd00:ec2::254 100.100.100.200 fe80::1 fe80::1%eth0
    fec0::1 fd12::1 224.0.0.1 ff02::1 255.255.255.255 240.0.0.1 192.0.0.8 198.18.0.1 100::1
    ::ffff:127.0.0.1 ::127.0.0.1 ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::1 2002:7f00:1::
    2002:a9fe:a9fe::1 2001:0:7f00:1:: 2001:0:808:808:0:0:f5ff:fffe 2600::5efe:10.0.0.1 4000::1
    no-address
    """.split(),  # noqa: SIM905 - forty lines otherwise
)
@pytest.mark.parametrize("rules", [["all"], ["a.example"], ["0.0.0.0/0", "::/0", "*.example"]])
def test_a_name_that_leads_where_it_must_not(rules, address):
    request = ask("https://a.example/")
    assert policy(*rules).decide(request).allowed
    assert not policy(*rules).decide_address(request, address).allowed


@pytest.mark.parametrize(
    "address",
    [
        "9.9.9.9",
        "192.0.2.10",
        "198.51.100.1",
        "203.0.113.1",
        "2600::1",
        "64:ff9b::909:909",
        "2001:db8::1",
        "::ffff:9.9.9.9",
    ],
)
def test_a_name_that_leads_to_the_public(address):
    assert allows(policy("a.example"), "https://a.example/", address=address)


def test_a_rule_that_names_the_address_as_well():
    rules = policy("db.example:5432", "10.1.0.0/16", "deny:10.1.9.0/24")
    assert allows(rules, "db.example:5432", address="10.1.2.3")
    assert not allows(rules, "db.example:5432", address="10.2.2.3")
    assert not allows(rules, "db.example:5432", address="10.1.9.1")
    assert not allows(policy("db.example:5432", "10.1.0.0/16:80"), "db.example:5432", address="10.1.2.3")
    refused = policy("db.example:5432").decide_address(ask("db.example:5432"), "10.1.2.3")
    assert (
        refused.reason
        == "db.example resolves to 10.1.2.3, which is private, and no rule names that address as well"
    )


def test_a_rule_for_addresses_does_not_let_a_name_be_looked_up():
    assert not allows(policy("10.0.0.0/8"), "http://db.example/")


def test_denial_for_an_address_applies_to_names_resolving_to_it():
    rules = policy("all", "deny:http://9.9.9.9/admin/*")
    assert not allows(rules, "http://a.example/admin/x", address="9.9.9.9")
    assert allows(rules, "http://a.example/x", address="9.9.9.9")
    assert not allows(rules, "a.example:80", address="9.9.9.9")  # nobody would look into the tunnel


def test_denied_network_is_denied_in_teredo_addresses():
    rules = policy("2001::/32", "deny:9.0.0.0/8")
    assert allows(rules, "http://[2001:0:808:808::f7f7:f7f7]/")
    assert not allows(rules, "http://[2001:0:909:909::f7f7:f7f7]/")  # its Teredo server
    assert not allows(rules, "http://[2001:0:808:808::f6f6:f6f6]/")  # its client


def test_a_request_to_an_address_goes_to_that_address():
    assert allows(policy("9.9.9.9", "8.8.8.8"), "http://9.9.9.9/", address="9.9.9.9")
    assert not allows(policy("9.9.9.9", "8.8.8.8"), "http://9.9.9.9/", address="8.8.8.8")


def test_names_that_are_loopback():
    rules = policy("*.localhost:8080", "localhost")
    assert allows(rules, "http://a.localhost:8080/", address="127.0.0.1")
    assert allows(rules, "http://localhost/", address="::1")
    assert not allows(rules, "http://a.localhost:8080/", address="9.9.9.9")
    assert not allows(rules, "http://a.localhost:8080/", address="10.0.0.1")
    assert not allows(
        policy("*.localhost:8080", "deny:127.0.0.1"), "http://a.localhost:8080/", address="127.0.0.1"
    )


def test_presets_may_lead_to_an_organisations_own_servers():
    rules = policy("pip", pip=preset("pip", "https://index.example"))
    assert allows(rules, "https://index.example/simple/", address="10.0.0.1")
    assert allows(rules, "https://index.example/simple/", address="fd12::1")
    for address in ("127.0.0.1", "169.254.169.254", "169.254.1.1", "::", "::ffff:127.0.0.1"):
        assert not allows(rules, "https://index.example/simple/", address=address)
    both = policy("index.example", "pip", pip=preset("pip", "https://index.example"))
    assert allows(both, "https://index.example/simple/", address="10.0.0.1")
    assert not allows(both, "http://index.example/simple/", address="10.0.0.1")


def test_a_forbidden_preset_forbids_its_hosts_altogether():
    rules = policy("all", "deny:pip", pip=preset("pip", "https://index.example"))
    assert not allows(rules, "index.example:22")
    assert not allows(rules, "http://index.example/")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://a.example/", "allowed by *.example"),
        ("https://b.a.example/", "forbidden by deny:b.a.example"),
        (
            "https://a.example:8443/",
            "*.example does not allow this port, protocol, method or path of a.example:8443",
        ),
        ("https://a.test/", "no rule allows a.test:443"),
        ("http://10.0.0.1/", "no rule allows 10.0.0.1:80, which is private and must be named itself"),
        ("http://[::1]/", "no rule allows [::1]:80, which is loopback and must be named itself"),
    ],
)
def test_reasons(url, reason):
    assert policy("*.example", "deny:b.a.example").decide(ask(url)).reason == reason


@pytest.mark.parametrize(
    "address",
    # Sources: the data sources of cloud-init (Scaleway, Akamai, Oracle), Tencent's and Alibaba's manuals.
    ["169.254.42.42", "fd00:42::42", "fd00:a9fe:a9fe::1", "fd00:c1::a9fe:a9fe", "169.254.0.23",
     "fd00:100::100:200"],
)  # fmt: skip
def test_metadata_addresses_are_named_by_themselves_alone(address):
    shown = f"[{address}]" if ":" in address else address
    around = "fd00::/8" if ":" in address else "169.254.0.0/16"
    assert not allows(policy(around), f"http://{shown}/")
    assert allows(policy(shown), f"http://{shown}/")
    assert not allows(preset("pip", "files.example"), "http://files.example/", address=address)
    assert not allows(policy("files.example", around), "http://files.example/", address=address)
    assert allows(policy("files.example", shown), "http://files.example/", address=address)
