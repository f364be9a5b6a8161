"""Reads rows of the known formats as messages.

A conversation is a list of messages as `glm2_jax.text.prompt.build_messages` takes them: role
(system, user, assistant, observation), content, and optionally metadata and tools. A message that
must not be learned has `"loss": False`. The answers to the blanks of a text, which a row gives as a
list, are messages one after another, each with the key of the list: `"part_of": "output"`. A plain
text is one message of the role "text", with `"ends": False` if the next one continues it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from glm2_jax.cli.text_input import parse_json
from glm2_jax.datasets import TEXT
from glm2_jax.errors import InputError, shorten
from glm2_jax.text.roles import ROLES, parse_history, reply_messages

Message = dict[str, Any]
Fields = Mapping[str, Any]  # of a row, or of an entry of its conversation

_NEEDED = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "adgen": ("content", "summary"),
    "prompt": ("prompt", "response"),
}
_PAIRS = ("alpaca", "adgen", "prompt")  # a question and its answer under a key each
# Whether a row or an entry is learned: the keys of ms-swift and GLM, OpenAI, axolotl.
MARKS = ("loss", "weight", "train")
ORIGIN = "origin"  # a key that augmented rows have: {"source": "file:line", "method": ...}
CONTINUES = "continues"  # a key of the pieces of a long text: whether another one follows
_KNOWN = {
    name: (*_NEEDED[name], "input", "history", "system", "tools", ORIGIN, *MARKS) for name in _PAIRS
} | {
    "sharegpt": ("conversations", "system", "tools", ORIGIN, *MARKS),
    "messages": ("messages", "conversations", "tools", ORIGIN, *MARKS),
    TEXT: ("text", CONTINUES),
}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"} | {
    role: role for role in ("user", "assistant", "system", "observation")
}
_ENTRY_KEYS = {
    "sharegpt": ("from", "value", *MARKS),
    "messages": ("role", "content", "metadata", "tools", *MARKS),
}
_FLAGS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def absent(value: Any) -> bool:
    """Return whether the value of an optional field counts as missing: null, blank, empty or NaN
    (tables fill gaps with it)."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value or value == [] or value == {}


def detect(row: Fields, preferred: str | None = None) -> str | None:
    """Return the format whose keys a row has, if any; of several the one with values in them, or
    `preferred`. Raises InputError if it has the keys of several, none of them preferred."""
    there = [name for name, keys in _NEEDED.items() if all(key in row for key in keys)]
    # Tables that became JSON fill every column. The first key of a pair may be blank (with input).
    filled = [name for name in there if not absent(row[_NEEDED[name][-1]])]
    found = filled or [name for name in there if row[_NEEDED[name][-1]] is not None] or there
    entries = value_of(row, "conversations")
    first = entries[0] if isinstance(entries, list) and entries else None
    if isinstance(first, dict) and "role" in first:
        # As the published fine-tuning of ChatGLM3 writes them.
        found = list(dict.fromkeys("messages" if name == "sharegpt" else name for name in found))
    if len(found) > 1 and preferred not in found:
        fix = "choose one: --format"
        if preferred is not None:
            fix = f"--format {preferred} is none of them: leave out the columns of the others"
        raise InputError(f"it has the keys of {' and '.join(found)}", fix)
    if not found and preferred == TEXT and "text" in row:
        return TEXT
    return preferred if len(found) > 1 else next(iter(found), None)


def unknown_format(row: Fields) -> InputError:
    """Return the error for a row that has the keys of no format."""
    forms = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in _NEEDED.items())
    hint = "; plain texts are learned with --format text" if TEXT in row else ""
    why = f"known: {forms}{hint}"
    if "chosen" in row and "rejected" in row:
        why = "pairs of a chosen and a rejected answer are for python -m train.preference"
    return InputError(f"no known format, its keys are {_key_list(row)}", why)


def unused_keys(row: Fields, fmt: str) -> Iterator[str]:
    """Yield the keys of a row that `read_messages` accepts, and of its entries, that have a value
    but no effect, once each."""
    yield from (key for key in row if key not in _KNOWN[fmt] and not absent(row[key]))
    if fmt in (*_PAIRS, TEXT):
        return
    key, role = _list_key(row, fmt), "from" if fmt == "sharegpt" else "role"
    found: dict[str, None] = {}
    for entry in objects(row, key):
        for name in entry:
            if name not in _ENTRY_KEYS[fmt] and not absent(entry[name]):
                found[f"{name} in {key}"] = None
        if _SHAREGPT_ROLES[entry[role]] != "assistant":
            asked = [name for name in MARKS if _flag(entry.get(name)) is True]
            found |= dict.fromkeys(f"{name} of messages that are not answers" for name in asked)
    yield from found


def read_messages(row: Fields, fmt: str) -> list[Message]:
    """Return the conversation of a row, ignoring optional fields that are null or blank; InputError
    where a part is missing, of a wrong type, empty, or in a wrong order."""
    if fmt == TEXT:
        return [{"role": TEXT, "content": _text(row, "text"), "ends": not row.get(CONTINUES)}]
    if fmt in _PAIRS:
        messages = _pair(row, fmt)
    else:
        entries = enumerate(objects(row, _list_key(row, fmt)), 1)
        messages = [_message(entry, fmt, number) for number, entry in entries]
        if fmt == "sharegpt" and (system := _optional(row, "system")).strip():
            messages.insert(0, {"role": "system", "content": system})
    if not absent(value_of(row, "tools")):
        raise InputError(
            "the row has tools outside its messages", "write them into the system message"
        )
    kept = []
    for number, message in enumerate(messages, 1):
        role = message["role"]
        # These need no text: tools, a call of one and its result, an answer that is not learned.
        says = message["content"].strip() or message.get("tools") or message.get("metadata")
        unlearned = role == "assistant" and not message.get("loss", True)
        if not (says or unlearned or role == "observation"):
            if role == "system":
                continue
            raise InputError(f"message {number} ({role}) is empty")
        if role == "system" and number > 1:
            raise InputError(f"message {number} (system) is not the first")
        kept.append(message)
    roles = [message["role"] for message in kept if message["role"] != "system"]
    if not roles or roles[0] != "user":
        raise InputError("the conversation does not begin with a question")
    if roles[-1] != "assistant":
        raise InputError("the conversation does not end with an answer")
    return kept if _is_learned(row, "the row") else [message | {"loss": False} for message in kept]


def _pair(row: Fields, fmt: str) -> list[Message]:
    """Return the messages of a question and its answer, with the rounds before."""
    asked, answered = _NEEDED[fmt]
    need(row, asked)
    parts = (_optional(row, asked), _optional(row, "input"))
    query = "\n".join(part for part in parts if part.strip())
    if not query:
        raise InputError(f"{asked} is empty")
    answers, system = _answers(row, answered), _optional(row, "system")
    messages = [{"role": "system", "content": system}] if system.strip() else []
    history = value_of(row, "history")
    rounds = () if absent(history) else parse_history(history)
    for question, reply in rounds:
        messages.append({"role": "user", "content": question})
        for entry in reply_messages(reply):
            messages.append(_message(entry, "messages", len(messages) + 1))
    return [*messages, {"role": "user", "content": query}, *answers]


def _answers(row: Fields, key: str) -> list[Message]:
    """Return the answer of a row, or of a list the answer to each blank."""
    texts = row.get(key)
    if not isinstance(texts, list):
        return [{"role": "assistant", "content": _text(row, key)}]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{key} has an answer that is not a text", f"it is answer {number}")
    if not texts:
        raise InputError(f"{key} is empty")
    return [{"role": "assistant", "content": text, "part_of": key} for text in texts]


def _message(entry: Fields, fmt: str, number: int) -> Message:
    """Return the message of an entry, marked if it must not be learned."""
    where, extra = f"message {number}", {}
    if fmt == "sharegpt":
        role, content, key = entry.get("from"), entry.get("value"), "value"
        if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
            known = ", ".join(_SHAREGPT_ROLES)
            raise InputError(f"{where} is from {shorten(role)}", f"known: {known}")
        role = _SHAREGPT_ROLES[role]
    else:
        given = {name: value for name, value in entry.items() if not absent(value)}
        unknown = [name for name in given if name not in _ENTRY_KEYS["messages"]]
        if unknown:
            raise InputError(f"{where} has an unknown key", shorten(unknown[0]))
        role, content, key = entry.get("role"), entry.get("content"), "content"
        if role not in ROLES:
            raise InputError(f"{where} has the role {shorten(role)}", f"known: {', '.join(ROLES)}")
        extra = {x: given[x] for x in ("metadata", "tools") if not absent(value_of(given, x))}
    if content is None and role == "system":
        content = ""
    if not isinstance(content, str):
        raise InputError(f"{where} ({role}) has no text in its {key}")
    unlearned = {} if _is_learned(entry, where) else {"loss": False}
    return {"role": role, "content": content, **extra, **unlearned}


def _is_learned(entry: Fields, where: str) -> bool:
    """Return what the marks of an entry or row say; InputError for one that is not yes or no."""
    learned = True
    for key in MARKS:
        if absent(value := entry.get(key)):
            continue
        flag = _flag(value)
        if flag is None:
            raise InputError(
                f"{key} of {where} is {shorten(value)}",
                "write 1 or true to learn the answer, 0 or false to leave it out",
            )
        learned &= flag
    return learned


def _flag(value: Any) -> bool | None:
    """Return yes or no, also from a number or a text (of a table); None for anything else."""
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    return _FLAGS.get(value.strip().lower()) if isinstance(value, str) else None


def need(row: Fields, key: str) -> None:
    """Raise InputError for a row without a key."""
    if key not in row:
        near = difflib.get_close_matches(key, row, n=1)
        hint = f"is {near[0]} meant?" if near else f"its keys are {_key_list(row)}"
        raise InputError(f"no {key}", hint)


def _text(row: Fields, key: str) -> str:
    need(row, key)
    value = row[key]
    if not isinstance(value, str):
        raise InputError(f"{key} is not a string", f"it is of type {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{key} is empty")
    return value


def _optional(row: Fields, key: str) -> str:
    """Return the text of a key that may be missing, null or empty: "" for all of them."""
    return "" if absent(row.get(key)) else _text(row, key)


def value_of(row: Fields, key: str) -> Any:
    """Return a list or object, which tables hold as JSON text; other text stays text."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return parse_json(value)
    except InputError:
        return value


def origin_source(row: Fields) -> str | None:
    """Return which row an augmented row was made of, as it says itself; None for other rows."""
    origin = value_of(row, ORIGIN)
    source = origin.get("source") if isinstance(origin, dict) else None
    return source if isinstance(source, str) else None


def _list_key(row: Fields, fmt: str) -> str:
    """Return the key that holds the entries of a conversation."""
    other = fmt == "sharegpt" or (absent(row.get("messages")) and "conversations" in row)
    return "conversations" if other else "messages"


def objects(row: Fields, key: str) -> list[dict[str, Any]]:
    """Return the list of objects of a key, or InputError."""
    value = value_of(row, key)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise InputError(f"{key} is not a list of objects")
    return value


def _key_list(row: Fields) -> str:
    keys = [shorten(key) for key in row]
    return ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "") if keys else "none"
