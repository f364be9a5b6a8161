"""Cuts a text into the samples that the activations are computed of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm2_jax.cli.text_input import open_input, parse_object, read_lines, read_utf8
from glm2_jax.errors import InputError
from glm2_jax.text.tokenizer import Tokenizer

_NOT_TEXT = ("role", "from", "id")  # keys of rows whose strings the model does not read


def read_samples(path: str, tokenizer: Tokenizer, samples: int, length: int) -> np.ndarray:
    """Return int32 [samples, length]: pieces of a text at even distances, each after the ids that
    begin every prompt.

    The file is plain text, or has a JSON object a line (`.jsonl`, `.json`), of which all strings
    are read, in a row of conversation as in {"text"}. InputError: it cannot be read, or is too
    short.
    """
    start = tokenizer.start_ids
    room = length - len(start)
    if room < 1:
        raise InputError(
            f"--length must be at least {len(start) + 1}, got {length}",
            f"Every sample begins with {len(start)} special tokens.",
        )
    ids = [token for text in _texts(path) for token in tokenizer.encode(text)]
    if len(ids) < samples * room:
        raise InputError(
            f"{path} is too short: it has {len(ids)} tokens.",
            f"{samples} samples of {length} need {samples * room}.",
            f"Use more text, or --samples {max(len(ids) // room, 1)}"
            + ("." if len(ids) >= room else f" --length {len(ids) + len(start)}."),
        )
    begins = np.linspace(0, len(ids) - room, samples).astype(int)
    pieces = np.asarray(ids, np.int32)[begins[:, None] + np.arange(room)]
    return np.concatenate([np.tile(np.asarray(start, np.int32), (samples, 1)), pieces], axis=1)


def _texts(path: str) -> Iterator[str]:
    if Path(path).suffix not in (".jsonl", ".json"):
        yield read_utf8(path)
        return
    with open_input(path) as file:
        for number, line in read_lines(file, path):
            try:
                if isinstance(line, InputError):
                    raise line
                yield "\n".join(_strings(parse_object(line)))
            except InputError as error:
                what = f"{path}:{number}: {error.what}"
                raise InputError(what, error.why, error.fix) from None


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in a JSON value, in their order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key not in _NOT_TEXT:
                yield from _strings(entry)
