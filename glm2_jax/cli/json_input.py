"""Reads JSON from outside, with limits."""

import json
from typing import Any

from glm2_jax.cli.text_input import bad_byte
from glm2_jax.errors import InputError, shorten

_MAX_DEPTH = 100


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; InputError also for a key twice and for deep nesting."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
        _check_depth(value)
        return value
    except RecursionError:
        raise InputError("cannot read this JSON", "it is nested too deeply") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text.strip() else ""
        raise InputError("not JSON", f"{error.msg}: {line}column {error.colno}") from None
    except ValueError as error:  # an immense number
        raise InputError("not JSON", str(error)) from None


def parse_line(line: bytes) -> Any:
    """Return the value of a line of JSON; InputError as `parse_json`, or if it is not UTF-8."""
    try:
        return parse_json(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8", bad_byte(error)) from None


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line; InputError as `parse_line`, or if it is not an object."""
    row = parse_line(line)
    if not isinstance(row, dict):
        raise InputError("not a JSON object", "write {...} with a value for each key")
    return row


def _check_depth(value: Any) -> None:
    """Raise RecursionError for a value so deep that writing it again could fail."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RecursionError


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = {}
    for key, value in pairs:
        if key in result:
            raise InputError(f"the key {shorten(key)} appears twice")
        result[key] = value
    return result
