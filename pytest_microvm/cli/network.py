"""``pytest-microvm network``: explain which rule decides about a URL, and list the rules in effect."""

from __future__ import annotations

import argparse
import json
import re
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pytest_microvm.errors import ImageError, UsageError
from pytest_microvm.images.kits import load_kit
from pytest_microvm.images.store import ImageStore, cache_root
from pytest_microvm.network.policy.hosts import (
    as_address,
    by_canonical_host,
    canonical_host,
    is_loopback_name,
)
from pytest_microvm.network.policy.matching import PORTS, SCHEMES
from pytest_microvm.network.policy.presets import named_presets, preset_rules, read_preset
from pytest_microvm.network.policy.rules import Decision, Policy, Request, parse_rules
from pytest_microvm.network.proxy.credentials import credential_host, needs_tls
from pytest_microvm.network.proxy.heads import NEVER
from pytest_microvm.network.proxy.own_addresses import decide_here
from pytest_microvm.settings.configuration import Settings, load_settings
from pytest_microvm.settings.reach import parse_network
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from collections.abc import Mapping

EXIT_DENIED = 1
_DESCRIPTION = """\
What machines may reach is written as rules: `network` in [tool.pytest-microvm], or of the kit, or on a
command line. These commands say what they come to on this computer. No machine is started, and the URL is
not asked for anything; its name is looked up if the rules allow that.
"""
_CHECK_EPILOG = """\
exit status: 0 if a machine may send this request, 1 if not, 4 for bad input

examples:
  pytest-microvm network check https://api.example.com/v1/models
  pytest-microvm network check api.example.com:5432                        a connection of any protocol
  pytest-microvm network check --method POST https://api.example.com/v1/
  pytest-microvm network check --network '*.example.com' --network deny:bad.example.com https://bad.example.com
  pytest-microvm network check --prepare https://example.com               by `prepare_network`
"""
_RULES_EPILOG = """\
examples:
  pytest-microvm network rules                        of the project in this folder
  pytest-microvm network rules --network pip          which hosts `pip` stands for on this computer
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb ``network`` and its own verbs."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "network", help="explain what machines may reach", description=_DESCRIPTION, formatter_class=raw
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    check = verbs.add_parser(
        "check", help="say whether a request may go out, and which rule decides", formatter_class=raw,
        description="Say whether machines may send a request, and which rule decides.", epilog=_CHECK_EPILOG,
    )  # fmt: skip
    check.add_argument("url", metavar="URL", help="http(s)://host/path, or host:port for any protocol")
    check.add_argument("--method", default="GET", metavar="METHOD", help="of the request (default: GET)")
    check.set_defaults(run=_check)

    rules = verbs.add_parser(
        "rules", help="list the rules, presets expanded", formatter_class=raw,
        description="List the rules with what presets come to, and the variables that machines get.",
        epilog=_RULES_EPILOG,
    )  # fmt: skip
    rules.set_defaults(run=_rules)

    for verb in (check, rules):
        verb.add_argument(
            "--network", action="append", metavar="RULE", help="in place of the project's rules; repeatable"
        )
        verb.add_argument(
            "--project", default=".", metavar="DIR", help="folder of the project (default: this one)"
        )
        verb.add_argument(
            "--prepare", action="store_true", help="the rules for `prepare` steps, not those for tests"
        )
        verb.add_argument("--json", action="store_true", help="print JSON for scripts")


@dataclass(frozen=True)
class _Rules:
    """The network rules to explain.

    Args:
        texts: The rules as written.
        where: The setting that has them.
        policy: The parsed rules, with presets expanded.
        project: The project's folder.
        file_systems: The layers of the image's root file system, if it is built.
        hosts: The addresses that the user's ``hosts`` assigns to names.
        credentials: The hosts that get a credential, with the port if it is not 443.
    """

    texts: tuple[str, ...]
    where: str
    policy: Policy
    project: Path
    file_systems: tuple[Path, ...]
    hosts: Mapping[str, tuple[str, int | None]]
    credentials: tuple[tuple[str, int | None], ...] = ()


def _check(arguments: argparse.Namespace) -> int:
    rules = _asked_about(arguments)
    request = _request(arguments.url, arguments.method)
    decision, looked_into = _decide(rules, request)
    found = _addresses(rules, request, looked_into) if decision.allowed else {}
    allowed = decision.allowed and (not found or any(each.allowed for each in found.values()))
    inspected = looked_into.path is not None
    if arguments.json:
        answer = {
            "url": arguments.url, "method": request.method, "allowed": allowed, "rule": decision.rule,
            "reason": decision.reason, "inspected": inspected,
            "addresses": [
                {"address": address, "allowed": each.allowed, "rule": each.rule, "reason": each.reason}
                for address, each in found.items()
            ],
        }  # fmt: skip
        print(json.dumps(answer, indent=2))
        return 0 if allowed else EXIT_DENIED
    print(f"rules: {', '.join(rules.texts) or 'none'} ({rules.where})")
    print(f"{_verdict(decision.allowed)}  {request.host}  {decision.reason}")
    if decision.allowed:
        if request.path is not None and not inspected:
            print("         the connection is tunnelled: nobody looks at methods and paths")
        for address, each in found.items():
            print(f"{_verdict(each.allowed)}  {address}  {'' if each.allowed else each.reason}".rstrip())
        if not found:
            print(f"         {request.host} does not resolve on this computer")
    return 0 if allowed else EXIT_DENIED


def _rules(arguments: argparse.Namespace) -> int:
    rules = _asked_about(arguments)
    presets = [read_preset(name, rules.project, rules.file_systems) for name in named_presets(rules.texts)]
    environment = {name: value for preset in presets for name, value in preset.environment}
    hints = [hint for preset in presets for hint in preset.hints]
    listed = [{"rule": str(rule), "preset": rule.preset} for rule in rules.policy.rules]
    if arguments.json:
        answer = {"where": rules.where, "rules": listed, "environment": environment, "hints": hints}
        print(json.dumps(answer, indent=2))
        return 0
    print(f"rules: {', '.join(rules.texts) or 'none: nothing can be reached'} ({rules.where})")
    for rule in rules.policy.rules:
        print(f"  {rule}" + (f"  (preset {rule.preset})" if rule.preset else ""))
    for name, value in environment.items():
        print(f"  {name}={sanitize_line(value)}")
    for hint in hints:
        print(f"  {sanitize_line(hint)}")
    return 0


def _asked_about(arguments: argparse.Namespace) -> _Rules:
    project = Path(arguments.project).absolute()
    settings = load_settings(project, {})
    texts, where = _written(arguments, settings)
    file_systems: tuple[Path, ...] = ()
    with suppress(ImageError):  # not built yet: this computer's apt sources are used instead
        file_systems = ImageStore(cache_root()).inspect(settings.spec.image).image.file_systems
    policy = parse_rules(texts, where, preset_rules(project, file_systems))
    # Steps of `prepare` get no credentials.
    credentials = () if arguments.prepare else tuple(map(credential_host, settings.spec.credentials))
    hosts = by_canonical_host(settings.spec.hosts)
    return _Rules(texts, where, policy, project, file_systems, hosts, credentials)


def _written(arguments: argparse.Namespace, settings: Settings) -> tuple[tuple[str, ...], str]:
    if arguments.network:
        return parse_network(arguments.network, "--network"), "--network"
    if arguments.prepare:
        return settings.prepare_network, "prepare_network"
    if settings.spec.network is not None:
        return settings.spec.network, "network"
    if ImageStore(cache_root()).is_container(settings.spec.image):
        return (), f"image {settings.spec.image}"
    kit = load_kit(settings.spec.image, project=settings.project)
    return kit.network, f"kit {kit.name}"


def _request(url: str, method: str) -> Request:
    """Return the request that a URL, or a host and port, describes.

    Raises:
        UsageError: The text is neither a URL nor a host and port.
    """
    if "@" in re.split(r"[/?#]", url.partition("://")[2] or url)[0]:
        raise UsageError(
            "invalid URL: expected one without a user name, which no machine sends", resolution="leave it out"
        )
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
        host, port = canonical_host(parts.hostname or ""), parts.port
    except ValueError as error:
        raise UsageError(
            f"invalid URL: expected http(s)://host/path or host:port, got {url!r} ({error})",
            resolution="write it like https://api.example.com/v1",
        ) from error
    scheme = parts.scheme or (None if port else "https")
    if scheme is not None and scheme not in SCHEMES:
        raise UsageError(
            f"invalid scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}",
            resolution="write host:port for any other protocol",
        )
    if scheme is None:
        return Request(host, port or 0)
    return Request(host, port or PORTS[SCHEMES[scheme]], scheme, method.upper(), parts.path or "/")


def _decide(rules: _Rules, request: Request) -> tuple[Decision, Request]:
    """Return a machine's proxy's decision, and the request as far as the proxy can see it."""
    decision, looked_into = _by_rules(rules, request)
    if decision.allowed and looked_into.method in NEVER:
        decision = Decision(False, f"{looked_into.method} is not passed on", None)
    return decision, looked_into


def _by_rules(rules: _Rules, request: Request) -> tuple[Decision, Request]:
    """Return the decision by rules and credentials, and the request as far as the proxy can see it."""
    if request.scheme in ("https", "wss"):
        tunnel = replace(request, scheme=None, method=None, path=None)
        decision = rules.policy.decide(tunnel)
        gets_one = any(
            (host, port or 443) == (request.host, request.port) for host, port in rules.credentials
        )
        if not decision.allowed or not (decision.inspect or gets_one):
            return decision, tunnel
        return rules.policy.decide(request), request
    decision = rules.policy.decide(request)
    has_one = any(host == request.host and port in (None, request.port) for host, port in rules.credentials)
    if decision.allowed and has_one and request.scheme is not None:
        decision = Decision(False, needs_tls(request.host), None)
    return decision, request


def _addresses(rules: _Rules, request: Request, looked_into: Request) -> dict[str, Decision]:
    """Return the decision for each address of a request's host."""
    if request.host in rules.hosts:
        address, port = rules.hosts[request.host]
        decision = rules.policy.decide_address(looked_into, address)
        if decision.rule is None:  # no rule denies it, and its range does not matter: the user chose it
            decision = Decision(True, "the project's `hosts` lets the name lead there", None)
        return {f"{address}:{port or request.port}": decision}
    if as_address(request.host) is not None:
        found = [request.host]
    elif is_loopback_name(request.host):
        found = ["127.0.0.1", "::1"]
    else:
        try:
            answers = socket.getaddrinfo(request.host, request.port, type=socket.SOCK_STREAM)
        except OSError:
            return {}
        found = list(dict.fromkeys(str(answer[4][0]) for answer in answers))
    return {address: decide_here(rules.policy, looked_into, address) for address in found}


def _verdict(allowed: bool) -> str:
    return "allowed" if allowed else "denied "
