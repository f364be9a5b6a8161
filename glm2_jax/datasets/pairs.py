"""Rows of preferences: a question, the answer that is chosen, and one that is rejected.

The question is written as in the formats of `glm2_jax.datasets.formats`, without its answer, or as
a list of messages in `prompt`. An answer is a text, a message, or a list of one; `chosen` and
`rejected` may also be complete conversations that differ in their last answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm2_jax.datasets.formats import MARKS, Message, absent, need, objects, read_messages, value_of
from glm2_jax.errors import InputError

SIDES = ("chosen", "rejected")
_TEXTS = {"instruction": ("alpaca", "output"), "prompt": ("prompt", "response")}
_LISTS = ("conversations", "messages", "prompt")


def is_pair(row: Mapping[str, Any]) -> bool:
    """Return whether a row has the keys of this format."""
    return all(key in row for key in SIDES)


def read_pair(row: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
    """Return the two conversations of a row, of which only the last answers are learned; InputError
    where one is missing, empty, or not an answer to the same question, or both are the same."""
    chosen, rejected = (_conversation(row, key) for key in SIDES)
    if chosen == rejected:
        raise InputError("chosen and rejected are the same")
    if chosen[:-1] != rejected[:-1]:
        raise InputError(
            "chosen and rejected answer different questions",
            "their messages before the last ones must be the same",
        )
    before = [message | {"loss": False} for message in chosen[:-1]]
    return [*before, chosen[-1]], [*before, rejected[-1]]


def _conversation(row: Mapping[str, Any], key: str) -> list[Message]:
    """Return the question with the answer of a key."""
    need(row, key)
    answer = value_of(row, key)
    if absent(answer):
        raise InputError(f"{key} is empty")
    rest = {name: x for name, x in row.items() if name not in (*SIDES, *MARKS)}
    answer = [answer] if isinstance(answer, dict) else answer
    if isinstance(answer, list):
        answer = objects({key: answer}, key)
        if _role(answer[0]) not in ("assistant", "gpt"):
            return _read(answer, {})  # it has the question, too
    for name, (fmt, place) in _TEXTS.items():
        if name in rest and isinstance(value_of(rest, name), str | None):
            return read_messages(rest | {place: _text(answer, key)}, fmt)
    name = next((name for name in _LISTS if name in rest), None)
    if name is None:
        keys = ", ".join((*_TEXTS, *_LISTS[:2]))
        raise InputError("no question", f"it is one of the keys {keys}, or begins {key}")
    return _read([*objects(rest, name), *_as_entries(answer, rest, name)], rest)


def _read(entries: list[dict[str, Any]], rest: Mapping[str, Any]) -> list[Message]:
    others = {name: x for name, x in rest.items() if name not in _LISTS}
    if "from" in entries[0]:
        return read_messages(others | {"conversations": entries}, "sharegpt")
    return read_messages(others | {"messages": entries}, "messages")


def _as_entries(answer: Any, rest: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return an answer as entries of a list of messages, in the words of that list."""
    if not isinstance(answer, str):
        return answer
    question = next(iter(objects(rest, name)), {})
    words = ("from", "value", "gpt") if "from" in question else ("role", "content", "assistant")
    return [{words[0]: words[2], words[1]: answer}]


def _text(answer: Any, key: str) -> Any:
    """Return the text of an answer to a question that is a text."""
    if not isinstance(answer, list):
        if not isinstance(answer, str):
            raise InputError(f"{key} is not a text", f"it is of type {type(answer).__name__}")
        return answer
    if len(answer) > 1:
        raise InputError(f"{key} has {len(answer)} messages", "an answer is one message")
    text = answer[0].get("content", answer[0].get("value"))
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{key} has no text")
    return text


def _role(entry: Mapping[str, Any]) -> Any:
    return entry.get("role", entry.get("from"))
