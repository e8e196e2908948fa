"""The policy: decide from rules alone, without I/O, whether a guest's request is allowed.

A request is denied unless a rule allows it, and deny rules override all others. A name is checked before it
is resolved (:meth:`Policy.decide`), and again with each address that it resolves to, each time
(:meth:`Policy.decide_address`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

from pytest_microvm.errors import UsageError
from pytest_microvm.network.policy.addresses import (
    OWN,
    Address,
    AddressNetwork,
    covers,
    is_subnet,
    parse_address,
    special_range,
)
from pytest_microvm.network.policy.hosts import canonical_host, is_loopback_name
from pytest_microvm.network.policy.matching import (
    Everything,
    Match,
    Name,
    Network,
    NormalizedRequest,
    Request,
    Rule,
)
from pytest_microvm.network.policy.rule_text import PRESETS, parse_rule, split_deny

__all__ = ["PRESETS", "Decision", "Policy", "Request", "Rule", "canonical_host", "parse_rules"]

_IPV6_LOOPBACK = parse_address("::1")


@dataclass(frozen=True)
class Decision:
    """The policy's decision on a request.

    Args:
        allowed: Whether the request may go out.
        reason: One line for people: the rule that decided, or why none did. Of the request it contains only
            the canonical host and the port.
        rule: The text of the rule that decided.
        inspect: Whether a tunnel is allowed only if each request in it is inspected.
        tcp: Whether any protocol is allowed; otherwise HTTP on port 80 and TLS on all others.
    """

    allowed: bool
    reason: str
    rule: str | None
    inspect: bool = False
    tcp: bool = False


@dataclass(frozen=True)
class Policy:
    """The network rules of a guest.

    Args:
        rules: The rules; their order makes no difference.
    """

    rules: tuple[Rule, ...] = ()

    @property
    def needs_inspection(self) -> bool:
        """True if requests inside TLS must be inspected: a rule for https names a path or methods."""
        return any(rule.scheme == "https" and rule.is_partial for rule in self.rules)

    def decide(self, request: Request) -> Decision:
        """Decide on a request before its name is resolved."""
        try:
            asked = NormalizedRequest.of(request)
        except ValueError as error:
            return Decision(False, f"not a request that could be allowed: {error}", None)
        return self._decide(asked)[0]

    def decide_address(self, request: Request, address: str) -> Decision:
        """Decide on a request again, with the address that it would go to.

        Args:
            request: The request passed to :meth:`decide`.
            address: An address that its name resolved to, or its host itself if that is an address.
        """
        try:
            asked, found = NormalizedRequest.of(request), parse_address(address)
        except ValueError as error:
            return Decision(False, f"not a request that could be allowed: {error}", None)
        decision, allowing = self._decide(asked)
        if not decision.allowed:
            return decision
        at_address = replace(asked, address=found)
        if forbidden := _first(
            rule for rule in self._denying(at_address) if isinstance(rule.target, Network)
        ):
            return Decision(False, f"{found} is forbidden by {forbidden}", str(forbidden))
        why = self._address_refused(asked, found, allowing)
        return Decision(False, why, None) if why else decision

    def expects(self, request: Request, address: str, own: AddressNetwork) -> bool:
        """Return True if an allowed request may go to an address of this computer or its links.

        It may if a rule names the address, or a network around it no wider than ``own``; if the address is
        not public (a rule has named its range then); or if the user's own configuration names the host.

        Args:
            request: The request.
            address: The address that it would go to.
            own: The network of this computer that contains the address.
        """
        asked, found = NormalizedRequest.of(request), parse_address(address)
        if special_range(found) is not None:
            return True
        return any(
            self._names(rule, found, asked.port)
            if asked.address is None and not rule.may_lead_inside
            else rule.match(asked) is not Match.NOTHING
            for rule in self.rules
            if not rule.deny and (rule.may_lead_inside or _is_within(rule, own))
        )

    def _decide(self, asked: NormalizedRequest) -> tuple[Decision, list[Rule]]:
        """Return the decision, and the rules that allow the request."""
        matches = [(rule, match) for rule in self.rules if (match := rule.match(asked))]
        wholly = [rule for rule, match in matches if match is Match.ALL]
        if forbidden := _first(rule for rule in wholly if rule.deny):
            return Decision(False, f"forbidden by {forbidden}", str(forbidden)), []
        allowing = [rule for rule, _match in matches if not rule.deny]
        rule = _first(wholly or allowing)
        if rule is None:
            return Decision(False, self._why_not(asked), None), []
        inspect = not wholly or any(each.deny for each, _match in matches)
        if inspect and asked.scheme is not None:
            return Decision(False, f"{rule}: the request's method or path is not known", None), []
        watched = ", each request in it looked at" if inspect else ""
        tcp = not inspect and any(one.any_protocol for one in wholly)
        return Decision(True, f"allowed by {_shown(rule)}{watched}", str(rule), inspect, tcp), allowing

    def _denying(self, asked: NormalizedRequest) -> list[Rule]:
        """Return the rules that deny the request, or might deny a request in the tunnel."""
        return [rule for rule in self.rules if rule.deny and rule.match(asked)]

    def _address_refused(self, asked: NormalizedRequest, address: Address, allowing: list[Rule]) -> str:
        """Return the reason an allowed request may not go to an address; empty if it may."""
        if asked.address is not None:
            return "" if asked.address == address else f"{asked.host} is not {address}"
        special = special_range(address)
        if is_loopback_name(asked.host):
            ours = address == _IPV6_LOOPBACK or (isinstance(address, IPv4Address) and address.is_loopback)
            return "" if ours else f"{asked.host} is loopback by its name, and {address} is not"
        if special is None or any(self._names(one, address, asked.port) for one in self.rules):
            return ""
        if special.kind in OWN and any(rule.may_lead_inside for rule in allowing):
            return ""
        return (
            f"{asked.host} resolves to {address}, which is {special.kind}, "
            "and no rule names that address as well"
        )

    @staticmethod
    def _names(rule: Rule, address: Address, port: int) -> bool:
        """Return True if a rule names an address itself, so that any allowed name may resolve to it."""
        return (
            not rule.deny
            and rule.scheme is None
            and rule.port in (None, port)
            and isinstance(rule.target, Network)
            and covers(rule.target.network, address)
        )

    def _why_not(self, asked: NormalizedRequest) -> str:
        shown = f"[{asked.host}]" if ":" in asked.host else asked.host
        near = _first(
            rule for rule in self.rules if not rule.deny and rule.target.includes(asked, deny=False)
        )
        if near is not None:
            return (
                f"{_shown(near)} does not allow this port, protocol, method or path of {shown}:{asked.port}"
            )
        if not any(not rule.deny for rule in self.rules):
            return f"no rule allows anything, so not {shown}:{asked.port}"
        special = special_range(asked.address) if asked.address else None
        kind = f", which is {special.kind} and must be named itself" if special else ""
        return f"no rule allows {shown}:{asked.port}{kind}"


def parse_rules(
    texts: Sequence[str], where: str, presets: Callable[[str], Sequence[Rule]] | None = None
) -> Policy:
    """Parse rules into a policy.

    Args:
        texts: Rules, and names of presets.
        where: The source of the texts, for errors.
        presets: Returns the rules of a preset; without it presets are accepted but yield no rules, which is
            enough to validate the texts.

    Raises:
        UsageError: A text is no rule.
    """
    rules: list[Rule] = []
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"{where}: {text!r} is not text", resolution="write a list of rules in quotes")
        deny, name = split_deny(text)
        if name in PRESETS:
            found = presets(name) if presets else ()
            rules += [rule.forbidding() if deny else rule for rule in found]
        else:
            rules.append(parse_rule(text, where))
    return Policy(tuple(dict.fromkeys(rules)))


def _is_within(rule: Rule, own: AddressNetwork) -> bool:
    """Return True if a rule's target is an address or network inside ``own``."""
    return isinstance(rule.target, Network) and is_subnet(rule.target.network, own)


def _first(rules: Iterable[Rule]) -> Rule | None:
    """Return the rule to report among several with the same decision, independent of their order."""
    return min(rules, key=_plainness, default=None)


def _plainness(rule: Rule) -> tuple[bool, str, bool, str]:
    wide = isinstance(rule.target, Everything) or (isinstance(rule.target, Name) and rule.target.subdomains)
    return (wide, rule.preset or "", not rule.is_partial, str(rule))


def _shown(rule: Rule) -> str:
    return f"{rule} (preset {rule.preset})" if rule.preset else str(rule)
