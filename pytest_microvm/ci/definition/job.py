"""What a job is: values, as the definition says them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Literal

from pytest_microvm.git.checkout import matches
from pytest_microvm.settings.credentials import CredentialSpec
from pytest_microvm.settings.secret_values import Secret
from pytest_microvm.settings.spec import MachineSpec

When = Literal["success", "failure", "always"]

WORKSPACE = PurePosixPath("/workspace")
"""Where a job's files are, in its machine."""

DEFAULT_TIMEOUT = 3600.0
"""Seconds that a job's steps may take together where its definition does not say."""

DEFAULT_RETRIES = 1
"""How often a job whose machine never reached its steps is tried again."""


@dataclass(frozen=True)
class Step:
    """One command of a job.

    Args:
        run: For the machine's ``/bin/sh -e``, in the workspace.
        name: What reports call it.
        when: Whether it runs after steps that succeeded, after one that failed, or always.
    """

    run: str
    name: str
    when: When = "success"


@dataclass(frozen=True)
class GrantedSecret:
    """A secret, and the globs of the branches that may have it; none: the default branch alone."""

    secret: Secret
    branches: tuple[str, ...] = ()


@dataclass(frozen=True)
class GrantedCredential:
    """A credential, and the globs of the branches that may use it; none: the default branch alone."""

    credential: CredentialSpec
    branches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One job, of one combination of its matrix.

    Args:
        key: Its table's name in the definition, which ``needs`` and ``--job`` name.
        name: The same with the matrix's values: ``test (python=3.12)``.
        steps: What it does.
        spec: What its machine is made of and may reach; secrets and credentials are below.
        matrix: The values of this combination.
        prepare: Shell commands run once, before the sources are there; the result is cached.
        prepare_inputs: Files and folders of the commit that these need.
        prepare_network: What these may reach.
        env: Variables of its commands.
        needs: Keys of the jobs that have to succeed first.
        artifacts: Globs of files to take back, relative to the workspace; ``**`` crosses folders.
        junit: Globs of JUnit files to take back.
        timeout: Seconds that its steps may take together.
        allow_failure: Whether the run may succeed without it.
        retries: How often it is tried again if its machine never reached its steps.
        branches: Globs of the branches it is for.
        secrets: What it may hold.
        credentials: What is added to its requests.
        git: Whether it gets a repository with history, not only the commit's files.
        fail_on_denied: Whether it fails if it tries to reach what it may not.
    """

    key: str
    name: str
    steps: tuple[Step, ...]
    spec: MachineSpec = field(default_factory=MachineSpec)
    matrix: tuple[tuple[str, str], ...] = ()
    prepare: tuple[str, ...] = ()
    prepare_inputs: tuple[str, ...] = ()
    prepare_network: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, ...] = ()
    artifacts: tuple[str, ...] = ()
    junit: tuple[str, ...] = ()
    timeout: float = DEFAULT_TIMEOUT
    allow_failure: bool = False
    retries: int = DEFAULT_RETRIES
    branches: tuple[str, ...] = ("*",)
    secrets: tuple[GrantedSecret, ...] = ()
    credentials: tuple[GrantedCredential, ...] = ()
    git: bool = False
    fail_on_denied: bool = False

    def is_for(self, branch: str) -> bool:
        """Whether it runs for a branch."""
        return matches(branch, self.branches)

    @property
    def all_grants(self) -> MachineSpec:
        """The spec of its machine with the secrets and credentials that any branch may have."""
        return replace(
            self.spec,
            secrets=tuple(granted.secret for granted in self.secrets),
            credentials=tuple(granted.credential for granted in self.credentials),
        )

    def spec_for(self, branch: str, *, default: bool) -> MachineSpec:
        """Return the spec of its machine with the secrets and credentials that a branch may have.

        Args:
            branch: The branch's name.
            default: Whether it is the default branch.
        """

        def may(branches: tuple[str, ...]) -> bool:
            return matches(branch, branches) if branches else default

        return replace(
            self.spec,
            secrets=tuple(granted.secret for granted in self.secrets if may(granted.branches)),
            credentials=tuple(granted.credential for granted in self.credentials if may(granted.branches)),
        )
