"""The policy: what a guest may reach, decided from rules alone, without I/O.

Nothing is allowed unless a rule allows it, and what a rule forbids is not allowed by any other. Names are
decided upon before they are resolved (:meth:`Policy.decide`), and again with each address that they resolve
to, each time (:meth:`Policy.decide_address`).
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
from pytest_microvm.network.policy.matching import Asked, Everything, Match, Name, Network, Request, Rule
from pytest_microvm.network.policy.rule_text import PRESETS, parse_rule, split_deny

__all__ = ["PRESETS", "Decision", "Policy", "Request", "Rule", "canonical_host", "parse_rules"]

_IPV6_LOOPBACK = parse_address("::1")


@dataclass(frozen=True)
class Decision:
    """What comes of a request.

    Args:
        allowed: It may go out.
        reason: For people, in one line: which rule decided, or why none did. Nothing of the request's is in
            it but its host, in the one spelling, and its port.
        rule: The text of the rule that decided.
        inspect: A tunnel is allowed only if the requests in it are looked at one by one.
        tcp: Any protocol may be spoken; otherwise TLS on every port but 80, and HTTP there.
    """

    allowed: bool
    reason: str
    rule: str | None
    inspect: bool = False
    tcp: bool = False


@dataclass(frozen=True)
class Policy:
    """What a guest may reach.

    Args:
        rules: In any order: it makes no difference.
    """

    rules: tuple[Rule, ...] = ()

    @property
    def needs_inspection(self) -> bool:
        """Tell whether requests in TLS have to be looked at: a rule for https names a path or methods."""
        return any(rule.scheme == "https" and rule.is_partial for rule in self.rules)

    def decide(self, request: Request) -> Decision:
        """Decide on a request before its name is resolved."""
        try:
            asked = Asked.of(request)
        except ValueError as error:
            return Decision(False, f"not a request that could be allowed: {error}", None)
        return self._decide(asked)[0]

    def decide_address(self, request: Request, address: str) -> Decision:
        """Decide on a request again, now that it is known which address it would go to.

        Args:
            request: The same as before.
            address: One that its name resolved to, or its host itself if that is an address.
        """
        try:
            asked, found = Asked.of(request), parse_address(address)
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
        """Tell whether a request that is allowed may go to an address of this computer or of its links.

        It may if a rule names the address and no more than the network that it is in, if the address is not
        public (a rule has named its range then), and if the user's own configuration has the host.

        Args:
            request: What is asked for.
            address: Where it would go.
            own: The network.
        """
        asked, found = Asked.of(request), parse_address(address)
        if special_range(found) is not None:
            return True
        return any(
            self._names(rule, found, asked.port)
            if asked.address is None and not rule.may_lead_inside
            else rule.match(asked) is not Match.NOTHING
            for rule in self.rules
            if not rule.deny and (rule.may_lead_inside or _is_within(rule, own))
        )

    def _decide(self, asked: Asked) -> tuple[Decision, list[Rule]]:
        """Return the decision, and the rules that allow what is asked for."""
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

    def _denying(self, asked: Asked) -> list[Rule]:
        """Return the rules that forbid what is asked for, or might once it is known."""
        return [rule for rule in self.rules if rule.deny and rule.match(asked)]

    def _address_refused(self, asked: Asked, address: Address, allowing: list[Rule]) -> str:
        """Say why a request that is allowed may not go to an address; empty if it may."""
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
        """Tell whether a rule is there for an address itself: a name that may be asked for may lead to it."""
        return (
            not rule.deny
            and rule.scheme is None
            and rule.port in (None, port)
            and isinstance(rule.target, Network)
            and covers(rule.target.network, address)
        )

    def _why_not(self, asked: Asked) -> str:
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
    """Return the policy that was written.

    Args:
        texts: Rules, and names of presets.
        where: What they were written in, for errors.
        presets: Gives the rules of a preset; without it presets are known by name and come to nothing, which
            is enough to check what was written.

    Raises:
        UsageError: One is no rule.
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
    """Tell whether a rule is about addresses of one network, and no others."""
    return isinstance(rule.target, Network) and is_subnet(rule.target.network, own)


def _first(rules: Iterable[Rule]) -> Rule | None:
    """Return the rule to name among several that decide the same, whatever their order."""
    return min(rules, key=_plainness, default=None)


def _plainness(rule: Rule) -> tuple[bool, str, bool, str]:
    wide = isinstance(rule.target, Everything) or (isinstance(rule.target, Name) and rule.target.subdomains)
    return (wide, rule.preset or "", not rule.is_partial, str(rule))


def _shown(rule: Rule) -> str:
    return f"{rule} (preset {rule.preset})" if rule.preset else str(rule)
