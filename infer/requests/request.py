"""Requests: questions with history and system text, from flags and from batch files.

A batch file holds one JSON object per line: `prompt`, or for ChatGLM3 and GLM-4
`messages`; and optionally `id`, `history` ([[question, answer], ...]) and `system`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm2_jax.cli.text_input import parse_json, parse_object, read_utf8
from glm2_jax.errors import InputError, shorten
from glm2_jax.text.roles import Reply, Turns, parse_history

_HISTORY_FORM = 'write a list of pairs: [["question", "answer"], ...]'
_KEYS = ("prompt", "messages", "id", "history", "system")
_PLAIN_SPACES = str.maketrans({"\u3000": " ", "\u00a0": " "})


@dataclass(frozen=True)
class Request:
    """One question."""

    prompt: str = ""  # "" if there are messages
    history: Turns = ()  # (question, answer), oldest first; an answer may be messages
    system: str | None = None  # instructions
    messages: tuple[dict[str, Any], ...] | None = None  # in place of the three above
    id: str | int | None = None  # copied to the output

    def __post_init__(self) -> None:
        texts = (self.prompt, self.system, self.history, self.messages, self.id)
        try:
            json.dumps(texts, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                "The prompt is not valid text.",
                "It has half of a character (a lone surrogate), as bytes that are not UTF-8 leave.",
            ) from None
        if self.messages is None and not self.prompt.strip():
            raise InputError("The prompt is empty.", "There is nothing to answer.", "Write a text.")

    def cleaned(self) -> Request:
        """Return it with plain spaces instead of ideographic and no-break ones, everywhere."""
        return dataclasses.replace(
            self,
            prompt=_clean(self.prompt),
            history=tuple((_clean(q), _clean_reply(a)) for q, a in self.history),
            system=None if self.system is None else _clean(self.system),
            messages=None if self.messages is None else tuple(map(_clean_message, self.messages)),
        )


def _clean(text: str) -> str:
    return text.translate(_PLAIN_SPACES)


def _clean_reply(reply: Reply) -> Reply:
    return _clean(reply) if isinstance(reply, str) else [_clean_message(m) for m in reply]


def _clean_message(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": _clean(content) if isinstance(content, str) else content}


def read_prompt(path: str) -> str:
    """Read a question from a file or, for "-", standard input, without the last line's end."""
    return read_utf8(path).removesuffix("\n").removesuffix("\r")


def read_history(path: str) -> Turns:
    """Read a history file; InputError says what is wrong with it."""
    text = read_utf8(path)
    try:
        return parse_history(parse_json(text))
    except InputError as error:
        raise InputError(f"{path}: {error.what}", error.why, _HISTORY_FORM) from None


def parse_line(line: bytes, history: Turns = (), system: str | None = None) -> Request:
    """Read one line of a batch file; InputError says what is wrong with it."""
    row = parse_object(line)
    for key in row:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_KEYS)}"
            raise InputError(f"unknown key {shorten(key)}", hint)
    prompt, messages, name = row.get("prompt"), row.get("messages"), row.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise InputError("id is not a string or whole number")
    if messages is not None:
        keys = "prompt", "history", "system"
        if history or system or any(row.get(key) is not None for key in keys):
            raise InputError(
                "messages exclude prompt, history and system", "write them as messages, too"
            )
        objects = isinstance(messages, list) and all(isinstance(one, dict) for one in messages)
        if not objects or not messages:
            raise InputError("messages is not a list of objects with role and content")
        return Request(messages=tuple(messages), id=name)
    if prompt is None:
        raise InputError("no prompt", "a line needs a prompt or messages")
    if not isinstance(prompt, str):
        raise InputError("prompt is not a string")
    if not isinstance(row.get("system"), str | None):
        raise InputError("system is not a string")
    own = parse_history(row["history"]) if "history" in row else history
    return Request(prompt, own, row.get("system", system), id=name)
