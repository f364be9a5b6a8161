"""Rows of the known formats as messages.

A conversation is a list of messages in the form that `glm2_jax.prompt.build_messages` takes: role
(system, user, assistant, observation), content, and where there are any, metadata and tools.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from glm2_jax.errors import InputError
from glm2_jax.prompt import ROLES
from infer.params import shown
from infer.requests import parse_history

Message = dict[str, Any]

_NEEDED = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "adgen": ("content", "summary"),
}
_KNOWN = {
    "alpaca": ("instruction", "input", "output", "history", "system"),
    "sharegpt": ("conversations", "system"),
    "messages": ("messages", "conversations"),
    "adgen": ("content", "summary", "history"),
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "observation",
}
_MESSAGE_KEYS = ("role", "content", "metadata", "tools")


def detect(row: Mapping[str, Any]) -> str | None:
    """The format of a row that has all the keys that one needs; None where there is no such.

    Raises:
        InputError: it has the keys of two.
    """
    found = [name for name, keys in _NEEDED.items() if all(key in row for key in keys)]
    if len(found) > 1:
        raise InputError(f"it has the keys of {' and '.join(found)}", "name the one: --format")
    if found == ["sharegpt"] and _has_role_messages(row["conversations"]):
        return "messages"  # as the published fine-tuning of ChatGLM3 writes them
    return found[0] if found else None


def _has_role_messages(conversations: Any) -> bool:
    first = conversations[0] if isinstance(conversations, list) and conversations else None
    return isinstance(first, dict) and "role" in first


def unknown_format(row: Mapping[str, Any]) -> InputError:
    """What is wrong with a row that has the keys of no format."""
    forms = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in _NEEDED.items())
    return InputError(f"no known format, its keys are {_key_list(row)}", f"there are {forms}")


def unused_keys(row: Mapping[str, Any], fmt: str) -> Iterator[str]:
    """The keys of a row that its format does not know."""
    return (key for key in row if key not in _KNOWN[fmt])


def read_messages(row: Mapping[str, Any], fmt: str) -> list[Message]:
    """The conversation of a row.

    Raises:
        InputError: something of it is missing, of a wrong type, empty, or in a wrong order.
    """
    messages = _READERS[fmt](row)
    if "tools" in row:
        raise InputError("tools stand beside the messages", "write them into the system message")
    for number, message in enumerate(messages, 1):
        if not message["content"].strip():
            raise InputError(f"message {number} ({message['role']}) is empty")
        if message["role"] == "system" and number > 1:
            raise InputError(f"message {number} (system) is not the first")
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if not roles or roles[0] != "user":
        raise InputError("the conversation does not begin with a question")
    if roles[-1] != "assistant":
        raise InputError("the conversation does not end with an answer")
    return messages


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    instruction, more = _text(row, "instruction", blank=True), _optional(row, "input")
    query = "\n".join(part for part in (instruction, more) if part.strip())
    if not query:
        raise InputError("instruction is empty")
    return _rounds(row, query, _text(row, "output"), _optional(row, "system"))


def _adgen(row: Mapping[str, Any]) -> list[Message]:
    return _rounds(row, _text(row, "content"), _text(row, "summary"))


def _rounds(row: Mapping[str, Any], query: str, answer: str, system: str = "") -> list[Message]:
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for question, reply in (*parse_history(row.get("history")), (query, answer)):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": reply})
    return messages


def _sharegpt(row: Mapping[str, Any]) -> list[Message]:
    messages = []
    system = _optional(row, "system")
    if system.strip():
        messages.append({"role": "system", "content": system})
    for number, entry in enumerate(_objects(row, "conversations"), 1):
        where = f"message {number}"
        role, content = entry.get("from"), entry.get("value")
        if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
            known = ", ".join(_SHAREGPT_ROLES)
            raise InputError(f"{where} is from {shown(role)}", f"there are {known}")
        if not isinstance(content, str):
            raise InputError(f"{where} has no text in its value")
        messages.append({"role": _SHAREGPT_ROLES[role], "content": content})
    return messages


def _messages(row: Mapping[str, Any]) -> list[Message]:
    messages = _objects(row, "messages" if "messages" in row else "conversations")
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        unknown = [key for key in message if key not in _MESSAGE_KEYS]
        if unknown:
            raise InputError(f"{where} has an unknown key", shown(unknown[0]))
        if message.get("role") not in ROLES:
            raise InputError(
                f"{where} has the role {shown(message.get('role'))}",
                f"there are {', '.join(ROLES)}",
            )
        if not isinstance(message.get("content"), str):
            raise InputError(f"{where} ({message['role']}) has no text in its content")
    return messages


_READERS = {"alpaca": _alpaca, "sharegpt": _sharegpt, "messages": _messages, "adgen": _adgen}


def _text(row: Mapping[str, Any], key: str, *, blank: bool = False) -> str:
    if key not in row:
        near = difflib.get_close_matches(key, row, n=1)
        hint = f"is {near[0]} meant?" if near else f"its keys are {_key_list(row)}"
        raise InputError(f"no {key}", hint)
    value = row[key]
    if not isinstance(value, str):
        raise InputError(f"{key} is not a string", f"it is of type {type(value).__name__}")
    if not blank and not value.strip():
        raise InputError(f"{key} is empty")
    return value


def _optional(row: Mapping[str, Any], key: str) -> str:
    """The text of a key that may be missing or null: both are the same as an empty one."""
    return "" if row.get(key) is None else _text(row, key, blank=True)


def _objects(row: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise InputError(f"{key} is not a list of objects")
    return value


def _key_list(row: Mapping[str, Any]) -> str:
    keys = [shown(key) for key in row]
    return ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "") if keys else "none"
