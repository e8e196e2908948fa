"""The keys of a job: one table with each key's parser, JSON Schema and description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pytest_microvm.ci.definition.job import DEFAULT_RETRIES, DEFAULT_TIMEOUT
from pytest_microvm.ci.definition.matrix import MOST, NAME, RESERVED, parse_matrix
from pytest_microvm.ci.definition.values import (
    MAX_RETRIES,
    MAX_STEPS,
    MAX_TEXT,
    MAX_TITLE,
    VARIABLE,
    WHENS,
    parse_branches,
    parse_command,
    parse_commands,
    parse_credentials,
    parse_duration,
    parse_hosts,
    parse_needs,
    parse_paths,
    parse_secrets,
    parse_steps,
    parse_title,
    parse_variables,
    parse_when,
    parse_with_minimum,
    without_quotes,
)
from pytest_microvm.settings.credentials import SCHEMES
from pytest_microvm.settings.options import BY_NAME, QUOTAS, Option
from pytest_microvm.settings.secret_values import KINDS, Delivery
from pytest_microvm.settings.spec import PARSERS, parse_count, parse_flag

JOB_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Key:
    """A key of a job's table.

    Args:
        parse: Returns the parsed value, from the written value and the key's place.
        schema: The values that the key accepts, as JSON Schema.
        about: A description in one line.
        matrix: Whether ``${matrix.NAME}`` is replaced in it.
        trust: Whether it requests access beyond the job's own files.
    """

    parse: Callable[[object, str], Any]
    schema: Schema
    about: str
    matrix: bool = False
    trust: bool = False


def whole(pattern: str) -> str:
    """Return a pattern that matches whole texts only, even where ``$`` also matches before a last newline."""
    return f"^(?:{pattern})$(?!\\n)"


_LINE = r"[^\u0000-\u001f\u007f]*[^\s\u0000-\u001f\u007f][^\u0000-\u001f\u007f]*"
_TEXT = {"type": "string", "pattern": r"\S"}
_TEXTS = {"type": "array", "items": {"type": "string", "minLength": 1}}
_RELATIVE = {
    "type": "array",
    "items": {
        "type": "string",
        "minLength": 1,
        "pattern": whole(r"(?!/)(?!([^\u0000]*/)?\.\.(/|$(?!\n)))[^\u0000]*"),
    },
}
_RULES = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_FLAG = {"type": "boolean"}
_BRANCHES = {**_TEXTS, "minItems": 1}
_COMMAND = {**_TEXT, "maxLength": MAX_TEXT}
_SOURCE_KEYS = {str(kind): _TEXT for kind in KINDS}
_ONE_SOURCE = [{"required": [kind]} for kind in KINDS]
_VALUE = {
    "anyOf": [{"type": "string", "pattern": whole(r"[^\u0000-\u001f\u007f]{1,200}")}, {"type": "number"}]
}
_SIZE_TEXT = {
    "type": "string",
    "pattern": whole(r"\s*0*[1-9][0-9]{0,17}\s*([KkMmGgTt][Ii]?)?[Bb]?\s*"),
}


def _whole(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _table(properties: Mapping[str, Schema], **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


def _quota(option: Option) -> Key:
    """Return the key of a quota: a size is a text or a number, any other quota a number without quotes."""
    if option.kind == "size":
        least = {"type": "integer", "minimum": max(1, option.least)}
        return Key(parse_with_minimum(option.name), {"anyOf": [least, _SIZE_TEXT]}, option.about)
    schema: Schema = {"type": "number", "exclusiveMinimum": 0}
    if option.kind == "count":
        schema = _whole(int(option.least), option.most)
    elif option.kind == "cpus":
        schema = {"type": "number", "minimum": option.least, "maximum": option.most}
    return Key(without_quotes(PARSERS[option.name]), schema, option.about)


_QUOTAS = {option.name: _quota(option) for option in QUOTAS if "ci" not in option.absent}

STEP_KEYS: dict[str, Key] = {
    "run": Key(parse_command, _COMMAND, "the command, for the machine's `/bin/sh -e`"),
    "name": Key(
        parse_title,
        {"type": "string", "pattern": whole(_LINE), "maxLength": MAX_TITLE},
        "what reports call it; default: the command",
    ),
    "when": Key(
        parse_when,
        {"enum": [*WHENS]},
        "`success`: unless a step before it failed (default); `failure`: only then; `always`",
    ),
}
"""The keys of a step that is written as a table."""

KEYS: dict[str, Key] = {
    "image": Key(
        PARSERS["image"],
        _TEXT,
        f"{BY_NAME['image'].about}; default `{BY_NAME['image'].default}`",
        matrix=True,
    ),
    "python": Key(
        PARSERS["python"],
        {"enum": [*BY_NAME["python"].choices]},
        f"{BY_NAME['python'].about}; default `image`",
    ),
    "nested": Key(PARSERS["nested"], _FLAG, BY_NAME["nested"].about, trust=True),
    "steps": Key(
        parse_steps,
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_STEPS,
            "items": {
                "anyOf": [_COMMAND, _table({k: key.schema for k, key in STEP_KEYS.items()}, required=["run"])]
            },
        },
        "what it does: commands, or tables with the keys below",
        matrix=True,
    ),
    "matrix": Key(
        parse_matrix,
        {
            "type": "object",
            "not": {"propertyNames": {"enum": [*RESERVED]}},
            "properties": {
                name: {"type": "array", "items": {"type": "object", "minProperties": 1}} for name in RESERVED
            },
            "patternProperties": {
                whole(f"(?!({'|'.join(RESERVED)})$){NAME}"): {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": MOST,
                    "uniqueItems": True,
                    "items": _VALUE,
                }
            },
            "additionalProperties": False,
        },
        "names and their values: the job runs for each combination of them",
    ),
    "needs": Key(parse_needs, {**_TEXTS, "uniqueItems": True}, "the jobs that have to succeed first"),
    "branches": Key(parse_branches, _BRANCHES, "globs of the branches that it is for; default: all"),
    "prepare": Key(
        parse_commands,
        {"type": "array", "items": _COMMAND},
        "commands run once, before the sources are there; the result is cached",
        matrix=True,
    ),
    "prepare_inputs": Key(
        parse_paths, _RELATIVE, "files and folders of the sources that these need", matrix=True
    ),
    "prepare_network": Key(
        PARSERS["network"], _RULES, "rules of what these may reach", matrix=True, trust=True
    ),
    "env": Key(
        parse_variables,
        {
            "type": "object",
            "patternProperties": {
                whole(VARIABLE): {"anyOf": [{"type": "string", "maxLength": MAX_TEXT}, {"type": "number"}]}
            },
            "additionalProperties": False,
        },
        "variables of its commands",
        matrix=True,
    ),
    "artifacts": Key(
        parse_paths, _RELATIVE, "globs of files to take back; `**` crosses folders", matrix=True
    ),
    "junit": Key(parse_paths, _RELATIVE, "globs of JUnit files to take back and to report", matrix=True),
    "timeout": Key(
        parse_duration,
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {
                    "type": "string",
                    "pattern": whole(r"(?=.*[1-9])([0-9]{1,4}h)?([0-9]{1,5}m)?([0-9]{1,7}s)?"),
                },
            ]
        },
        f"what its steps may take together: seconds, or a text such as `1h30m`; default {DEFAULT_TIMEOUT:g}",
    ),
    "allow_failure": Key(parse_flag, _FLAG, "whether the run may succeed without it; default `false`"),
    "retries": Key(
        without_quotes(parse_count(BY_NAME["retries"]._replace(most=MAX_RETRIES))),
        _whole(0, MAX_RETRIES),
        f"how often it is tried again if its machine never reached its steps; default {DEFAULT_RETRIES}",
    ),
    "git": Key(parse_flag, _FLAG, "whether it gets a repository with history; default: the files alone"),
    "fail_on_denied": Key(parse_flag, _FLAG, "whether it fails if one of its network requests was denied"),
    "network": Key(PARSERS["network"], _RULES, BY_NAME["network"].about, matrix=True, trust=True),
    "hosts": Key(
        parse_hosts,
        {"type": "object", "additionalProperties": {"type": "string"}},
        BY_NAME["hosts"].about,
        trust=True,
    ),
    "secrets": Key(
        parse_secrets,
        {
            "type": "object",
            "patternProperties": {
                whole(VARIABLE): _table(
                    {**_SOURCE_KEYS, "as": {"enum": [*get_args(Delivery)]}, "branches": _BRANCHES},
                    oneOf=_ONE_SOURCE,
                )
            },
            "additionalProperties": False,
        },
        f"{BY_NAME['secrets'].about}, and `branches`: which may hold it",
        trust=True,
    ),
    "credentials": Key(
        parse_credentials,
        {
            "type": "array",
            "items": _table(
                {
                    **dict.fromkeys(("host", "header", "query", "variable"), _TEXT),
                    "scheme": {"enum": [*SCHEMES]},
                    "value": _table(_SOURCE_KEYS, oneOf=_ONE_SOURCE),
                    "branches": _BRANCHES,
                },
                required=["host", "value"],
            ),
        },
        f"{BY_NAME['credentials'].about}, and `branches`: for which",
        trust=True,
    ),
    **_QUOTAS,
}
"""The keys of a job, in the order of the reference page."""

SPEC_KEYS = ("image", "python", "nested", "network", "hosts", *_QUOTAS)
"""The keys that are fields of the machine's spec."""
