"""Outgoing connections: check the name, resolve it, check the addresses, connect to one of exactly these."""

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
"""Coroutine function that resolves a name, for a port, to addresses."""

_RESOLVE = 30.0  # seconds
_CONNECT = 15.0  # seconds for one address
_MAX_ADDRESSES = 16  # per name
# CA bundles of operating systems, for a Python that was built for another one.
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def trust_store() -> ssl.SSLContext:
    """Return a TLS context that trusts this computer's authorities: the system's and the company's."""
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
    """Gateway for a machine's connections to servers; it checks and logs each one.

    Args:
        access: The machine's policy and credentials.
        log: Records each request.
        meter: Counts the traffic.
        resolve: Resolves names to addresses.
        redact: Removes secrets from a text for the log.
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
        """Check a request by its host's name, before it is resolved.

        Raises:
            Refused: The request is not allowed.
        """
        decision = self.access.policy.decide(request)
        if not decision.allowed:
            raise Refused(403, decision.reason, decision.rule, _rule_for(request))
        return decision

    async def places(self, request: Request) -> list[Place]:
        """Resolve a request's host and return its allowed addresses, each with the port.

        Raises:
            Refused: No address is allowed, or the host does not resolve.
        """
        if request.host in self.access.hosts:
            address, port = self.access.hosts[request.host]
            decision = self.access.policy.decide_address(request, address)
            if decision.allowed or decision.rule is None:  # any range is fine: the user chose the address
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
        """Connect to the first address that accepts a connection.

        Args:
            request: The request.
            places: The result of :meth:`places` for the request.
            tls: Whether to use TLS and verify the host's certificate.

        Raises:
            Refused: No address accepts a connection, or the certificate is not valid for the host.
            QuotaReached: The machine has exceeded a quota.
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
        """Log a request with its decision; return its number in the log."""
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
        if is_loopback_name(request.host):  # RFC 6761, 6.3: no query is sent
            return ["127.0.0.1", "::1"]
        try:
            found = await asyncio.wait_for(self._resolve(request.host, request.port), _RESOLVE)
        except (OSError, UnicodeError, asyncio.TimeoutError):
            raise Refused(502, f"{request.host} does not resolve") from None
        return list(dict.fromkeys(found))

    async def _connect(self, request: Request, place: Place, *, tls: bool) -> ServerStream:
        if tls and self._trust is None:
            self._trust = trust_store()
        # The address is not resolved again, so the connection goes to the address that was checked.
        reader, writer = await asyncio.open_connection(
            *place,
            limit=CHUNK,
            ssl=self._trust if tls else None,
            server_hostname=request.host if tls else None,
        )
        return ServerStream(reader, writer, self.meter)


def _rule_for(request: Request) -> str:
    """Return the text of a rule that would allow a request's host."""
    host = f"[{request.host}]" if ":" in request.host else request.host
    return host if request.port in (80, 443) else f"{host}:{request.port}"
