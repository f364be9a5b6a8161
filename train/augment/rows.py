"""The user's texts of a row, in every format that training reads. Imports no jax."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from glm2_jax.datasets import PREFERENCE, TEXT
from glm2_jax.datasets.formats import (
    ORIGIN,
    absent,
    detect,
    objects,
    origin_source,
    read_messages,
    unknown_format,
    value_of,
)
from glm2_jax.datasets.pairs import is_pair, read_pair
from glm2_jax.datasets.rows import checked_text
from glm2_jax.errors import InputError

_TEXTS = {  # the keys of the question, of which a row uses the first that it has
    "alpaca": ("instruction",), "adgen": ("content",), "prompt": ("prompt",),
    PREFERENCE: ("instruction", "prompt"),
}  # fmt: skip
_LISTS = {  # the keys of lists of messages
    "sharegpt": ("conversations",), "messages": ("messages", "conversations"),
    PREFERENCE: ("conversations", "messages", "prompt", "chosen", "rejected"),
}  # fmt: skip
_USER = ("user", "human")


class Row(NamedTuple):
    """A row that can be augmented."""

    where: str  # "file:line"
    fields: dict[str, Any]
    format: str
    texts: list[str]  # those of the user, without repetitions, the question last


def read_row(where: str, value: Any, fmt: str = "auto") -> Row:
    """Return a row; InputError where it cannot be learned from, or has no text of the user.

    `fmt` is one of `glm2_jax.datasets.FORMATS`, "preference", or "auto": by its keys.
    """
    fields = {TEXT: value} if isinstance(value, str) else value
    if not isinstance(fields, dict):
        raise InputError("not a JSON object", "write {...} with a value for each key")
    found = (PREFERENCE if is_pair(fields) else detect(fields)) if fmt == "auto" else fmt
    if isinstance(value, str) and not value.strip():
        raise InputError("it is empty")
    if found is None and TEXT in fields:
        raise InputError("a plain text has no question", "the texts of users are augmented")
    if found is None:
        raise unknown_format(fields)
    read_pair(fields) if found == PREFERENCE else read_messages(fields, found)
    texts: list[str] = [holder[key] for holder, key in _places(_opened(fields, found), found)]
    checked_text("".join(texts))
    return Row(where, fields, found, list(dict.fromkeys(reversed(texts)))[::-1])


def origin_of(row: Row) -> dict[str, str]:
    """Return where a row comes from, and the methods that made it: "" for none."""
    source = origin_source(row.fields)
    if source is None:
        return {"source": row.where, "method": ""}
    return {"source": source, "method": str(value_of(row.fields, ORIGIN).get("method") or "")}


def with_texts(row: Row, texts: Mapping[str, str], method: str = "") -> dict[str, Any]:
    """Return the fields of a copy of a row with other texts of the user, by the old ones, and with
    its origin."""
    fields = _opened(row.fields, row.format)
    for holder, key in _places(fields, row.format):
        holder[key] = texts.get(holder[key], holder[key])
    origin = origin_of(row)
    methods = [name for name in (origin["method"], method) if name]
    return fields | {ORIGIN: origin | {"method": "+".join(methods)}}


def _opened(fields: Mapping[str, Any], fmt: str) -> dict[str, Any]:
    """Return a copy whose lists are lists, which tables hold as JSON text."""
    found = copy.deepcopy(dict(fields))
    for key in ("history", *_LISTS.get(fmt, ())):
        if isinstance(value := value_of(found, key), list):
            found[key] = value
    return found


def _places(fields: dict[str, Any], fmt: str) -> list[tuple[Any, Any]]:
    """Return the objects that hold the user's texts, with the keys, the question last."""
    texts = [key for key in _TEXTS.get(fmt, ()) if key in fields]
    keys = [key for key in texts if absent(fields[key]) or isinstance(fields[key], str)][:1]
    found: list[tuple[Any, Any]] = []
    if fmt in _TEXTS and isinstance(history := fields.get("history"), list):
        found += [(turn, 0) for turn in history]
    found += [(fields, key) for key in ("input", *keys) if keys and not absent(fields.get(key))]
    for key in _LISTS.get(fmt, ()):
        if isinstance(fields.get(key), list):
            for entry in objects(fields, key):
                if entry.get("role", entry.get("from")) in _USER:
                    found.append((entry, "value" if "from" in entry else "content"))
    return found
