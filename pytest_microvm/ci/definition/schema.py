"""The definition's JSON Schema, for editors; generated from the parser's own table of keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_microvm.ci.definition.keys import JOB_NAME, KEYS, Key, whole
from pytest_microvm.ci.definition.parsing import NOT_DEFAULTS

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def definition_schema() -> dict[str, Any]:
    """Return the schema of ``microvm.toml``; its ``ci`` also describes that table of ``pyproject.toml``.

    Every value that the parser accepts is valid. Only the parser checks rules that involve several keys, such
    as the names in ``needs``.
    """
    properties = _described(KEYS)
    defaults = {key: fragment for key, fragment in properties.items() if key not in NOT_DEFAULTS}
    ci = {
        "type": "object",
        "description": "What `pytest-microvm ci run` does.",
        "properties": {
            "defaults": {
                "type": "object",
                "description": "What holds for each job that does not say the same key itself.",
                "properties": defaults,
                "additionalProperties": False,
            },
            "jobs": {
                "type": "object",
                "description": "The jobs, by name.",
                "minProperties": 1,
                "patternProperties": {whole(JOB_NAME): {"$ref": "#/$defs/job"}},
                "additionalProperties": False,
            },
        },
        "required": ["jobs"],
        "additionalProperties": False,
    }
    job = {
        "type": "object",
        "description": "A job; each branch runs it in a machine of its own.",
        "properties": properties,
        "additionalProperties": False,
    }
    return {
        "$schema": DIALECT,
        "title": "The jobs of pytest-microvm",
        "type": "object",
        "properties": {"ci": ci, "$schema": {"type": "string"}},
        "required": ["ci"],
        "additionalProperties": False,
        "$defs": {"job": job},
    }


def _described(keys: Mapping[str, Key]) -> dict[str, Any]:
    return {name: {"description": key.about, **key.schema} for name, key in keys.items()}
