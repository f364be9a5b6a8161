"""Conversations in files: saved whole and in one go, read with care."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm2_jax.cli.files import real_path
from glm2_jax.cli.text_input import read_utf8
from glm2_jax.errors import GLMError, InputError
from infer.engine.params import SamplingParams
from infer.requests.conversation import Conversation
from infer.requests.request import Turns, parse_history

FORMAT, VERSION = "glm2-jax chat", 1


@dataclass(frozen=True)
class Saved:
    """What a file holds; a plain history file has nothing but the turns.

    Attributes:
      history: (question, answer) pairs, oldest first.
      system: instructions, or None.
      sampling, fingerprint, template: of the conversation that was saved, or None.
      ids: what the model had read and written, or None.
    """

    history: Turns
    system: str | None = None
    sampling: SamplingParams | None = None
    fingerprint: str | None = None
    template: str | None = None
    ids: tuple[int, ...] | None = None


def save(name: str, conversation: Conversation) -> Path:
    """Writes the conversation under a temporary name and renames it; returns where it is.

    Raises:
      InputError: it cannot be written there, or the file is something else than a conversation.
    """
    path = real_path(os.path.expanduser(name))  # the file behind a link, not the link
    if path.exists():
        _require_save(path)
    checkpoint = conversation.engine.checkpoint
    value = {
        "format": FORMAT,
        "version": VERSION,
        "model": checkpoint.fingerprint,
        "template": conversation.engine.template,
        "system": conversation.system,
        "sampling": dataclasses.asdict(conversation.sampling),
        "history": conversation.history,
        "ids": conversation.ids,
    }
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    try:
        _write(path, text.encode("utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot write {path}", error.strerror or str(error), "name another file"
        ) from error
    return path


def load(name: str) -> Saved:
    """Reads a saved conversation, or a plain history: [["question", "answer"], ...].

    Raises:
      InputError: the file cannot be read, or is neither.
    """
    path = os.path.expanduser(name)
    try:
        value = json.loads(read_utf8(path))
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"{path} is not valid text", "it has half of a character (a lone surrogate)"
        ) from None
    except RecursionError:
        raise InputError(f"{path} cannot be read", "it is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON", str(error)) from None
    try:
        return _parse(value)
    except GLMError as error:
        raise InputError(f"{path}: {error.what}", error.why, error.fix) from None


def _parse(value: Any) -> Saved:
    if isinstance(value, list):
        return Saved(parse_history(value))
    if not _is_save(value):
        raise InputError(
            "neither a saved conversation nor a history",
            fix='a history is a list of pairs: [["question", "answer"], ...]',
        )
    if value.get("version") != VERSION:
        raise InputError(f"saved by another version of this program ({value.get('version')!r})")
    for key in ("system", "model", "template"):
        if not isinstance(value.get(key), str | None):
            raise InputError(f"{key} is not a string")
    sampling = value.get("sampling")
    if not isinstance(sampling, dict):
        raise InputError("sampling is not an object")
    return Saved(
        parse_history(value.get("history")),
        value.get("system"),
        SamplingParams.from_kwargs(**sampling),
        value.get("model"),
        value.get("template"),
        _ids(value.get("ids")),
    )


def _ids(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise InputError("ids is not a list of token ids")
    return tuple(value)


def _is_save(value: Any) -> bool:
    return isinstance(value, dict) and value.get("format") == FORMAT


def _require_save(path: Path) -> None:
    """Raises unless the file is a saved conversation, which a new one may replace."""
    try:
        if path.is_file() and _is_save(json.loads(read_utf8(path))):
            return
    except (ValueError, RecursionError, InputError):
        pass
    raise InputError(
        f"{path} is there and is not a saved conversation",
        "only such a file is replaced",
        "name another file",
    )


def _write(path: Path, data: bytes) -> None:
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
