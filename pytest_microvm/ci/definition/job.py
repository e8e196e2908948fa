"""The values of a job: what the definition says about it, as frozen dataclasses."""

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
"""The folder of a job's files in its machine."""

DEFAULT_TIMEOUT = 3600.0
"""Default limit in seconds for all steps of a job together."""

DEFAULT_RETRIES = 1
"""Default number of retries of a job whose machine never reached its steps."""


@dataclass(frozen=True)
class Step:
    """One command of a job.

    Args:
        run: The command, for the machine's ``/bin/sh -e``, in the workspace.
        name: The step's name in reports.
        when: Run it after steps that succeeded, after one that failed, or always.
    """

    run: str
    name: str
    when: When = "success"


@dataclass(frozen=True)
class GrantedSecret:
    """A secret, and globs of the branches that may have it; if empty, only the default branch may."""

    secret: Secret
    branches: tuple[str, ...] = ()


@dataclass(frozen=True)
class GrantedCredential:
    """A credential, and globs of the branches that may use it; if empty, only the default branch may."""

    credential: CredentialSpec
    branches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One job, of one combination of its matrix.

    Args:
        key: The name of the job's table in the definition, as used in ``needs`` and ``--job``.
        name: The key with the matrix's values: ``test (python=3.12)``.
        steps: The steps that the job runs.
        spec: The machine's spec, with its network rules; secrets and credentials are separate, below.
        matrix: The values of this combination.
        prepare: Shell commands run once, before the sources are there; the result is cached.
        prepare_inputs: Files and folders of the commit that ``prepare`` needs.
        prepare_network: Network rules of ``prepare``.
        env: Environment variables of the job's commands.
        needs: Keys of the jobs that must succeed first.
        artifacts: Globs of files to copy back, relative to the workspace; ``**`` crosses folders.
        junit: Globs of JUnit files to copy back.
        timeout: Limit in seconds for all steps together.
        allow_failure: Whether the run may succeed if the job fails.
        retries: Number of retries if its machine never reached its steps.
        branches: Globs of the branches that the job runs for.
        secrets: Secrets that the machine may hold.
        credentials: Credentials that are added to the machine's requests.
        git: Whether it gets a repository with history instead of the commit's files alone.
        fail_on_denied: Whether the job fails if it makes a request that is denied.
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
        """Return True if the job runs for ``branch``."""
        return matches(branch, self.branches)

    @property
    def all_grants(self) -> MachineSpec:
        """The machine's spec with all secrets and credentials, whichever branches may have them."""
        return replace(
            self.spec,
            secrets=tuple(granted.secret for granted in self.secrets),
            credentials=tuple(granted.credential for granted in self.credentials),
        )

    def spec_for(self, branch: str, *, default: bool) -> MachineSpec:
        """Return the machine's spec with the secrets and credentials that a branch may have.

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
