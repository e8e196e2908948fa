"""Grants: secrets, credentials and network access, read once on this computer, prepared for each machine.

Images and templates contain none of them: they arrive in the message that resumes a copy.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_microvm.network.policy.hosts import by_canonical_host
from pytest_microvm.network.policy.rules import Policy, parse_rules
from pytest_microvm.network.proxy.access import Access
from pytest_microvm.network.proxy.company_authorities import company_certificates
from pytest_microvm.settings.secret_values import Secret, SecretValue
from pytest_microvm.untrusted.redaction import Redactor

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_microvm.network.policy.rules import Rule
    from pytest_microvm.network.proxy.credentials import Credential
    from pytest_microvm.settings.spec import MachineSpec

PROXY = "http://127.0.0.1:3128"
"""The URL of the proxy for programs in a machine."""

TRUST = "/etc/ssl/certs/ca-certificates.crt"
"""The certificates that programs in a machine trust, including the company's and the machine's own."""

_PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
_DIRECT_VARIABLES = ("NO_PROXY", "no_proxy")
_DIRECT = "localhost,127.0.0.1,::1"
# Node's fetch reads the proxy variables only if this is set (since Node 22.21 and 24.0).
_OTHER = {"NODE_USE_ENV_PROXY": "1"}
# Programs that bundle their own certificates each have a variable for others.
_TRUST_VARIABLES = (
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT", "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS", "NPM_CONFIG_CAFILE", "AWS_CA_BUNDLE",
)  # fmt: skip


@dataclass(frozen=True)
class Given:
    """The grants of one machine.

    Args:
        access: Network access through its proxy, and the credentials that the proxy adds.
        environment: Variables of its commands and tests.
        files: Path, mode and content of each file in its memory.
        trust: PEM certificates that it trusts besides its image's.
        redactor: Removes secrets from its output.
        secret: Whether it holds a value that must not be written to a disk.
    """

    access: Access = field(default_factory=lambda: Access(Policy()))
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    files: tuple[tuple[str, int, bytes], ...] = field(default=(), repr=False)
    trust: str = field(default="", repr=False)
    redactor: Redactor = field(default_factory=Redactor, repr=False)
    secret: bool = False

    def message(self) -> dict[str, Any]:
        """Return the grants part of the resume message for a copy; see ``guest/resume.py``."""
        told: dict[str, Any] = {}
        if self.environment:
            told["environment"] = dict(self.environment)
        if self.trust:
            told["trust"] = self.trust
        if self.files:
            told["files"] = [[path, mode, base64.b64encode(data).decode()] for path, mode, data in self.files]
        return told


NOTHING = Given()


@dataclass(frozen=True)
class Grants:
    """The grants shared by all machines of a spec.

    Args:
        policy: Its network policy.
        environment: Variables that point its tools to the servers that the policy's presets allow.
        credentials: Credentials added to its requests.
        secrets: Its secrets with their values.
        hosts: Addresses for host names: an address, and a port if it differs from the requested one.
        trust: PEM certificates of the company's authorities.
    """

    policy: Policy
    environment: Mapping[str, str] = field(default_factory=dict)
    credentials: tuple[Credential, ...] = ()
    secrets: tuple[tuple[Secret, SecretValue], ...] = ()
    hosts: Mapping[str, tuple[str, int | None]] = field(default_factory=dict)
    trust: str = ""

    def for_machine(self, name: str) -> Given:
        """Return the grants for the machine ``name``, with its own certificate authority and placeholders.

        Raises:
            UsageError: Requests must be inspected, but a package needed for that is not installed.
        """
        if not self.policy.rules and not self.secrets:
            return NOTHING
        environment = {variable: value.reveal() for (secret, value), variable in self._variables()}
        files = tuple(
            (secret.path, 0o400, value.reveal().encode(errors="surrogateescape"))
            for secret, value in self.secrets
            if secret.delivery == "file"
        )
        redactor = self._redactor
        if not self.policy.rules:
            return Given(environment=environment, files=files, redactor=redactor, secret=True)
        credentials = tuple(credential.for_machine() for credential in self.credentials)
        authority = None
        trust = self.trust
        if credentials or self.policy.needs_inspection:
            from pytest_microvm.network.proxy.authority import new_authority  # noqa: PLC0415 - where it is needed

            authority = new_authority(name)
            trust += authority.certificate_pem
        return Given(
            access=Access(self.policy, credentials, authority, self.hosts),
            environment={
                **network_environment(trusted=bool(trust)),
                **self.environment,
                **{each.variable: each.placeholder for each in credentials if each.variable},
                **environment,
            },
            files=files,
            trust=trust,
            redactor=redactor,
            secret=bool(self.secrets),
        )

    @cached_property
    def _redactor(self) -> Redactor:
        """The redactor for all secret values; cached because a long key takes a moment to prepare."""
        values = [value for _secret, value in self.secrets] + [each.value for each in self.credentials]
        return Redactor([value.reveal() for value in values])

    def _variables(self) -> list[tuple[tuple[Secret, SecretValue], str]]:
        return [(pair, pair[0].name) for pair in self.secrets if pair[0].delivery == "env"]


NO_GRANTS = Grants(Policy())


def network_environment(*, trusted: bool) -> dict[str, str]:
    """Return the variables that point programs to the proxy and, if ``trusted``, to its certificates."""
    found = dict.fromkeys(_PROXY_VARIABLES, PROXY) | dict.fromkeys(_DIRECT_VARIABLES, _DIRECT) | _OTHER
    return found | (dict.fromkeys(_TRUST_VARIABLES, TRUST) if trusted else {})


def resolve(
    spec: MachineSpec,
    rules: Sequence[str],
    where: str,
    *,
    project: Path,
    own: Path | None = None,
    file_systems: tuple[Path, ...] = (),
    say: Callable[[str], None] = lambda _line: None,
) -> Grants:
    """Resolve the grants for machines of ``spec``, reading its secrets and credentials once.

    Args:
        spec: The requested spec.
        rules: The network rules of the spec, or of its image's kit.
        where: The place that the rules come from, for errors.
        project: The user's project, whose git remotes the preset ``git`` allows.
        own: The folder whose files commands that print secrets must not use; ``None``: there is none.
        file_systems: The layers of the image's root file system, whose apt sources the preset ``apt`` allows.
        say: Called with hints for the user.

    Raises:
        UsageError: A rule, a secret or a credential is invalid.
        HostError: A tool's index did not answer.
    """
    environment: dict[str, str] = {}

    def preset(name: str) -> Sequence[Rule]:
        from pytest_microvm.network.policy import presets  # noqa: PLC0415 - runs the tools, which takes seconds

        found = presets.read_preset(name, project, file_systems)
        if name in presets.named_presets(rules):  # not if it is only forbidden
            environment.update(found.environment)
            for hint in found.hints:
                say(hint)
        return found.rules

    policy = parse_rules(rules, where, preset)
    secrets = tuple((secret, secret.source.read(f"secret {secret.name}", own)) for secret in spec.secrets)
    return Grants(
        policy=policy,
        environment=environment,
        credentials=_resolved(spec, own),
        secrets=secrets,
        hosts=by_canonical_host(spec.hosts),
        trust=company_certificates() if policy.rules else "",
    )


def _resolved(spec: MachineSpec, own: Path | None) -> tuple[Credential, ...]:
    if not spec.credentials:
        return ()
    from pytest_microvm.network.proxy.credentials import resolve_credential  # noqa: PLC0415 - where there are any

    return tuple(resolve_credential(each, own) for each in spec.credentials)
