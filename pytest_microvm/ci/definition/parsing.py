"""Parse the jobs from ``[tool.pytest-microvm.ci]`` of pyproject.toml, or ``[ci]`` of microvm.toml."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_microvm.ci.definition.job import Job
from pytest_microvm.ci.definition.keys import JOB_NAME, KEYS, SPEC_KEYS
from pytest_microvm.ci.definition.matrix import MOST, Combination, parse_matrix, substituted
from pytest_microvm.ci.definition.values import check_keys, unknown_key
from pytest_microvm.errors import UsageError
from pytest_microvm.settings.spec import MachineSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = "pyproject.toml"
OWN_FILE = "microvm.toml"

NOT_DEFAULTS = ("matrix", "needs")
"""The keys that are set per job and have no common default."""

_EXAMPLE = '[ci.jobs.test]\nsteps = ["make test"]'


class NoJobs(UsageError):
    """The file defines no jobs."""


@dataclass(frozen=True)
class Definition:
    """The jobs of a project.

    Args:
        jobs: One for each combination of each matrix, ordered so that each follows the jobs that it needs.
        where: A readable name of the file that defines them.
        asked: Requests that need the user's trust, by the key's place, with the matrix's values substituted.
        branch: The branch that defines them, named as in :class:`pytest_microvm.ci.definition.task.Source`.
    """

    jobs: tuple[Job, ...]
    where: str
    asked: Mapping[str, Any] = field(default_factory=dict)
    branch: str = ""


class _Written(float):
    """A number that keeps its spelling, since ``3.10`` must not become ``3.1``."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


def parse_definition(text: str, where: str) -> Definition:
    """Return the jobs that a file defines.

    Args:
        text: The file's content.
        where: The file's name, for errors; a name with ``pyproject.toml`` in it selects that format, any
            other name that of ``microvm.toml``.

    Raises:
        NoJobs: The file defines no jobs.
        UsageError: The file is invalid; the error names the key.
    """
    written = ci_table(text, where)
    if written is None:
        raise NoJobs(f"{where}: no jobs are defined", resolution=f"write\n{_EXAMPLE}")
    table = check_keys(written, ("jobs", "defaults"), f"{where}: ci", "[ci.jobs.NAME]")
    defaults = _defaults(table.get("defaults", {}), where)
    jobs = table.get("jobs")
    if not isinstance(jobs, Mapping) or not jobs:
        raise UsageError(f"{where}: ci.jobs: there is no job", resolution=f"write\n{_EXAMPLE}")
    said = {name: _job_table(name, job, where) for name, job in jobs.items()}
    made: dict[str, list[Job]] = {}
    asked: dict[str, Any] = {}
    for name, own in said.items():
        made[name], wants = _expanded(name, own, defaults, where)
        asked.update(wants)
        if sum(map(len, made.values())) > MOST:
            raise UsageError(
                f"{where}: invalid ci.jobs: expected at most {MOST} jobs, got more",
                resolution="make a matrix smaller",
            )
    order = _ordered({name: one[0].needs for name, one in made.items()}, where)
    return Definition(tuple(job for name in order for job in made[name]), where, asked)


def ci_table(text: str, where: str) -> object | None:
    """Return the ``ci`` table of a file, ``None`` if it has none; see :func:`parse_definition`.

    Raises:
        UsageError: The file is not TOML, or a ``microvm.toml`` with other tables.
    """
    try:
        tables: object = tomllib.loads(text, parse_float=_Written)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(
            f"{where}: invalid TOML: {error}", resolution="correct the line that it names"
        ) from error
    if PYPROJECT not in where:
        return check_keys(tables, ("ci", "$schema"), where, "[ci.jobs.NAME]").get("ci")
    for key in ("tool", "pytest-microvm", "ci"):
        tables = tables.get(key) if isinstance(tables, Mapping) else None
    return tables


def _defaults(table: object, where: str) -> Mapping[str, Any]:
    known = [key for key in KEYS if key not in NOT_DEFAULTS]
    return check_keys(table, known, f"{where}: ci.defaults", "[ci.defaults]")


def _job_table(name: str, table: object, where: str) -> Mapping[str, Any]:
    if not re.fullmatch(JOB_NAME, name, re.ASCII):
        raise UsageError(
            f"{where}: ci.jobs: invalid name: expected at most 64 letters, digits, dots, dashes and "
            f"underscores, got {name!r}",
            resolution="rename the job",
        )
    return check_keys(table, KEYS, f"{where}: ci.jobs.{name}", f"[ci.jobs.{name}]")


def _expanded(
    name: str, own: Mapping[str, Any], defaults: Mapping[str, Any], where: str
) -> tuple[list[Job], dict[str, Any]]:
    """Return a job for each combination of its matrix, and the jobs' requests that need trust."""
    table = {**defaults, **own}
    place = {key: f"{where}: ci.{f'jobs.{name}' if key in own else 'defaults'}.{key}" for key in table}
    if "steps" not in table:
        raise UsageError(
            f"{where}: ci.jobs.{name}: invalid job: expected steps, got none",
            resolution='write steps = ["make test"]',
        )
    combinations: Sequence[Combination] = ((),)
    if "matrix" in table:
        combinations = parse_matrix(table["matrix"], place["matrix"])
    jobs = []
    asked: dict[str, list[Any]] = {}
    for combination in combinations:
        values = {
            key: substituted(value, combination, place[key]) if KEYS[key].matrix else value
            for key, value in table.items()
            if key != "matrix"
        }
        said = {key: KEYS[key].parse(value, place[key]) for key, value in values.items()}
        jobs.append(_job(name, combination, said))
        for key, value in values.items():
            seen = asked.setdefault(f"ci.jobs.{name}.{key}", []) if KEYS[key].trust and value else []
            if value not in seen:
                seen.append(value)
    return jobs, {key: seen[0] if len(seen) == 1 else seen for key, seen in asked.items()}


def _job(key: str, combination: Combination, said: Mapping[str, Any]) -> Job:
    shown = ", ".join(f"{name}={value}" for name, value in combination)
    rest = {each: value for each, value in said.items() if each not in SPEC_KEYS}
    return Job(
        key=key,
        name=f"{key} ({shown})" if shown else key,
        matrix=combination,
        spec=MachineSpec(**{each: value for each, value in said.items() if each in SPEC_KEYS}),
        **rest,
    )


def _ordered(needs: Mapping[str, Sequence[str]], where: str) -> list[str]:
    """Return the jobs' names sorted topologically, each after those that it needs.

    Raises:
        UsageError: A job needs one that is not defined, or directly or indirectly itself.
    """
    for name, others in needs.items():
        for other in others:
            if other not in needs:
                raise unknown_key(f"{where}: ci.jobs.{name}.needs: {other!r}", other, needs)
    order: list[str] = []
    while len(order) < len(needs):
        free = [name for name in needs if name not in order and set(needs[name]) <= set(order)]
        if not free:
            cycle = _cycle({name: others for name, others in needs.items() if name not in order})
            raise UsageError(
                f"{where}: ci.jobs.{cycle[0]}.needs: a job waits for itself: {' -> '.join(cycle)}",
                resolution="take one of these needs away",
            )
        order.append(free[0])
    return order


def _cycle(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a cycle among jobs each of which needs another of them."""
    path = [next(iter(needs))]
    while path.count(path[-1]) == 1:
        path.append(next(other for other in needs[path[-1]] if other in needs))
    return path[path.index(path[-1]) :]
