"""Reads the answers to judge: JSON lines of `infer.generate --batch-file`, or of --predictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from glm2_jax.datasets.rows import checked_text, read_rows
from glm2_jax.errors import InputError, UsageError

_FORM = 'Write {"prompt": "...", "text": "..."}, as infer.generate --batch-file does.'
Key = tuple[str, int]  # a prompt, and how many rows before have the same one


class System(NamedTuple):
    """What answered: its name, and its answers in the order of the file."""

    name: str
    path: str
    answers: dict[Key, str]


def read_systems(named: Sequence[str]) -> list[System]:
    """Return the answers of all files, each FILE or NAME=FILE, to the same prompts.

    UsageError: two have one name. InputError: a bad row, or a prompt that a file lacks.
    """
    systems: list[System] = []
    for one in named:
        name, equals, path = one.partition("=")
        name, path = (name, path) if equals else (Path(one).stem, one)
        if not name.strip() or name in (system.name for system in systems):
            what = f"--answers {one}: the name {name!r} is empty or taken"
            raise UsageError(what, fix="Name each file: --answers NAME=FILE OTHER=FILE.")
        systems.append(System(name, path, _read(path)))
    first = systems[0]
    for other in systems[1:]:
        for one, two in ((first, other), (other, first)):
            if missing := [key for key in one.answers if key not in two.answers]:
                raise InputError(
                    f"{two.path} has no answer to {missing[0][0]!r}",
                    f"{one.path} has one; prompts that differ: {len(missing)}.",
                    "Let all models answer the same prompts.",
                )
    return systems


def _read(path: str) -> dict[Key, str]:
    seen: Counter[str] = Counter()
    found: dict[Key, str] = {}
    for where, row in read_rows(path):
        try:
            prompt, text = _parse(row)
        except InputError as error:
            raise InputError(f"{where}: {error.what}", error.why, error.fix) from None
        found[prompt, seen[prompt]] = text
        seen[prompt] += 1
    return found


def _parse(row: Any) -> tuple[str, str]:
    """Return the prompt and the answer of a row."""
    if isinstance(row, InputError):
        raise row
    row = row if isinstance(row, dict) else {}
    prompt, text = row.get("prompt"), row.get("text", row.get("predict"))
    messages = row.get("messages")
    if isinstance(messages, list) and all(isinstance(one, dict) for one in messages):
        prompt = "\n\n".join(f"{one.get('role')}: {one.get('content')}" for one in messages)
    if not isinstance(prompt, str) or not isinstance(text, str):
        raise InputError("no prompt with an answer", fix=_FORM)
    return checked_text(prompt), checked_text(text)
