"""Conversations in files, written atomically and read with care."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm2_jax.cli.files import replace_file, require_file_place
from glm2_jax.cli.text_input import parse_json, read_utf8
from glm2_jax.errors import GLMError, InputError
from glm2_jax.text.roles import Turns, parse_history
from infer.engine.params import SamplingParams
from infer.requests.conversation import Conversation
from infer.requests.request import Request

FORMAT, VERSION = "glm2-jax chat", 1


@dataclass(frozen=True)
class Saved:
    """What a file holds; in a plain history file only the turns, oldest first."""

    history: Turns
    system: str | None = None
    sampling: SamplingParams | None = None
    fingerprint: str | None = None
    template: str | None = None
    ids: tuple[int, ...] | None = None  # what the model had read and written


def save(name: str, conversation: Conversation) -> Path:
    """Write the conversation; returns the path, links followed.

    InputError: it cannot be written, or the file exists and is not a saved conversation.
    """
    path = require_file_place(os.path.expanduser(name))
    if path.exists() and not _is_saved(path):
        raise InputError(
            f"{path} exists and is not a saved conversation",
            "only a saved conversation is replaced",
            "name another file",
        )
    value = {
        "format": FORMAT,
        "version": VERSION,
        "model": conversation.engine.checkpoint.fingerprint,
        "template": conversation.engine.template,
        "system": conversation.system,
        "sampling": dataclasses.asdict(conversation.sampling),
        "history": conversation.history,
        "ids": conversation.ids,
    }
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    replace_file(path, text.encode("utf-8"))
    return path


def _is_saved(path: Path) -> bool:
    try:
        return _has_format(parse_json(read_utf8(path)))
    except InputError:
        return False


def _has_format(value: Any) -> bool:
    return isinstance(value, dict) and value.get("format") == FORMAT


def load(name: str) -> Saved:
    """Read a saved conversation, or a plain history: [["question", "answer"], ...].

    InputError: the file cannot be read, or is neither.
    """
    path = os.path.expanduser(name)
    text = read_utf8(path)
    try:
        return _parse(parse_json(text))
    except GLMError as error:
        raise InputError(f"{path}: {error.what}", error.why, error.fix) from None


def _parse(value: Any) -> Saved:
    if isinstance(value, list):
        return Saved(_history(value, None))
    if not _has_format(value):
        raise InputError(
            "neither a saved conversation nor a history",
            fix='a history is a list of pairs: [["question", "answer"], ...]',
        )
    if value.get("version") != VERSION:
        raise InputError(f"saved by another version of this program ({value.get('version')!r})")
    for key in ("system", "model", "template"):
        if not isinstance(value.get(key), str | None):
            raise InputError(f"{key} is not a string")
    sampling, system, ids = (value.get(key) for key in ("sampling", "system", "ids"))
    if not isinstance(sampling, dict):
        raise InputError("sampling is not an object")
    if ids is not None:
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise InputError("ids is not a list of token ids")
        ids = tuple(ids)
    history = _history(value.get("history"), system)
    drawn = SamplingParams.from_kwargs(**sampling)
    return Saved(history, system, drawn, value.get("model"), value.get("template"), ids)


def _history(value: Any, system: str | None) -> Turns:
    history = parse_history(value)
    Request("?", history, system)  # refuses half of a character
    return history
