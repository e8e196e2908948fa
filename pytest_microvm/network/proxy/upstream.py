"""The only way out: decide by name, resolve, decide on the addresses, connect to one of exactly these."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from pytest_microvm.network.policy.hosts import as_address, is_loopback_name
from pytest_microvm.network.policy.rules import Decision, Request
from pytest_microvm.network.proxy.access import Access
from pytest_microvm.network.proxy.company_authorities import company_certificates
from pytest_microvm.network.proxy.log import NetworkLog, NetworkRequest
from pytest_microvm.network.proxy.meter import CHUNK, Meter
from pytest_microvm.network.proxy.own_addresses import decide_here
from pytest_microvm.network.proxy.refusal import Refused
from pytest_microvm.network.proxy.relaying import ServerStream

Place = tuple[str, int]
"""An address and a port."""

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Gives the addresses of a name, for a port."""

_RESOLVE = 30.0  # seconds
_CONNECT = 15.0  # seconds for one address
_MAX_ADDRESSES = 16  # of one name
# Where the systems keep what a Python that was built elsewhere does not know of.
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def trust_store() -> ssl.SSLContext:
    """Return what decides whom this computer trusts: its system's and its company's authorities."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if company := company_certificates():
        context.load_verify_locations(cadata=company)
    known = ssl.get_default_verify_paths()
    bundle = next((path for path in map(Path, _BUNDLES) if path.is_file()), None)
    if bundle and not (known.cafile or known.capath):
        context.load_verify_locations(bundle)
    return context


class Outbound:
    """What a machine's connections go out by; each one is decided upon and written down here.

    Args:
        access: What may be reached.
        log: Where it is written down.
        meter: Counts what moves.
        resolve: Gives the addresses of names.
        redact: Takes out of a text for the log what nobody may see.
    """

    def __init__(
        self, access: Access, log: NetworkLog, meter: Meter, resolve: Resolver, redact: Callable[[str], str]
    ) -> None:
        self.access = access
        self.log = log
        self.meter = meter
        self._resolve = resolve
        self._redact = redact
        self._trust: ssl.SSLContext | None = None

    def decide(self, request: Request) -> Decision:
        """Decide by name.

        Raises:
            Refused: It is not allowed.
        """
        decision = self.access.policy.decide(request)
        if not decision.allowed:
            raise Refused(403, decision.reason, decision.rule, _rule_for(request))
        return decision

    async def places(self, request: Request) -> list[Place]:
        """Resolve a name, and return those of its addresses that are allowed, with the port.

        Raises:
            Refused: None is.
        """
        if request.host in self.access.hosts:
            address, port = self.access.hosts[request.host]
            decision = self.access.policy.decide_address(request, address)
            if decision.allowed or decision.rule is None:  # its range does not matter: the user chose it
                return [(address, port or request.port)]
            raise Refused(403, decision.reason, decision.rule)
        found = await self._lookup(request)
        refused = None
        allowed: list[Place] = []
        for address in found[:_MAX_ADDRESSES]:
            decision = decide_here(self.access.policy, request, address)
            if decision.allowed:
                allowed.append((address, request.port))
            else:
                refused = refused or decision
        if allowed:
            return allowed
        if refused is None:
            raise Refused(502, f"{request.host} has no address")
        raise Refused(403, refused.reason, refused.rule)

    async def connect(self, request: Request, places: list[Place], *, tls: bool) -> ServerStream:
        """Connect to the first of the addresses that answers.

        Args:
            request: What for.
            places: What :meth:`places` returned for it.
            tls: Speak TLS, and verify that it is the host that was asked for.

        Raises:
            Refused: None answers, or it is somebody else.
            QuotaReached: The machine may make no more connections.
        """
        await self.meter.connection()
        problem: Exception | None = None
        for place in places:
            try:
                return await asyncio.wait_for(self._connect(request, place, tls=tls), _CONNECT)
            except ssl.SSLCertVerificationError as error:
                raise Refused(502, f"{request.host} could not be verified: {error.verify_message}") from None
            except (OSError, asyncio.TimeoutError) as error:
                problem = error
        why = (problem.strerror if isinstance(problem, OSError) else None) or type(problem).__name__
        raise Refused(502, f"{request.host}:{request.port} cannot be reached: {why}")

    def note(self, request: Request, verdict: Decision | Refused) -> int:
        """Write down what was decided; return its number in the log."""
        refused = verdict if isinstance(verdict, Refused) else None
        return self.log.add(
            NetworkRequest(
                at=time.time(),
                allowed=refused is None or not refused.denied,
                method=request.method or "CONNECT",
                host=self._redact(request.host),
                port=request.port,
                path=self._redact(request.path or ""),
                rule=verdict.rule,
                reason=self._redact(verdict.reason),
                status=refused.status if refused else None,
            )
        )

    async def _lookup(self, request: Request) -> list[str]:
        if as_address(request.host) is not None:
            return [request.host]
        if is_loopback_name(request.host):  # RFC 6761, 6.3: nobody is asked
            return ["127.0.0.1", "::1"]
        try:
            found = await asyncio.wait_for(self._resolve(request.host, request.port), _RESOLVE)
        except (OSError, UnicodeError, asyncio.TimeoutError):
            raise Refused(502, f"{request.host} does not resolve") from None
        return list(dict.fromkeys(found))

    async def _connect(self, request: Request, place: Place, *, tls: bool) -> ServerStream:
        if tls and self._trust is None:
            self._trust = trust_store()
        # An address is not looked up again: it is the one that was decided upon.
        reader, writer = await asyncio.open_connection(
            *place,
            limit=CHUNK,
            ssl=self._trust if tls else None,
            server_hostname=request.host if tls else None,
        )
        return ServerStream(reader, writer, self.meter)


def _rule_for(request: Request) -> str:
    """Return the rule to write that would allow a request's host."""
    host = f"[{request.host}]" if ":" in request.host else request.host
    return host if request.port in (80, 443) else f"{host}:{request.port}"
