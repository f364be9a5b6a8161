"""Cuts a text into the samples that the activations are computed of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from glm2_jax.cli.text_input import read_utf8
from glm2_jax.datasets.encode import Encoder
from glm2_jax.datasets.formats import detect
from glm2_jax.datasets.rows import is_table, parse_conversation, read_rows
from glm2_jax.errors import InputError
from glm2_jax.text.tokenizer import Tokenizer

_NOT_TEXT = ("role", "from", "id")  # keys of rows whose strings the model does not read


def read_samples(
    path: str, tokenizer: Tokenizer, template: str, samples: int, length: int
) -> np.ndarray:
    """Return int32 [samples, length]: pieces of a text at even distances, each after the ids that
    begin every prompt.

    The file is plain text or, by its name, rows in any format that training reads. A conversation
    becomes what the model reads and writes of it by the template; of other rows all strings are
    read. InputError: it cannot be read, a row is not valid, or there is too little.
    """
    start = tokenizer.start_ids
    room = length - len(start)
    if room < 1:
        raise InputError(
            f"--length must be at least {len(start) + 1}, got {length}",
            f"Every sample begins with {len(start)} special tokens.",
        )
    ids = [token for piece in _read(path, tokenizer, template) for token in piece]
    if not ids:
        raise InputError(f"{path} has no text.", fix="Give texts like those of the model's use.")
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


def _read(path: str, tokenizer: Tokenizer, template: str) -> Iterator[list[int]]:
    """Yield the ids of each row."""
    encoder = Encoder(tokenizer, template)
    for where, row in read_rows(path) if is_table(path) else [(path, read_utf8(path))]:
        try:
            if isinstance(row, InputError):
                raise row
            if isinstance(row, str) or (isinstance(row, dict) and detect(row) is None):
                yield tokenizer.encode("\n".join(_strings(row)))
                continue
            messages = parse_conversation(row)
            if answers := encoder.count(messages):
                yield encoder.encode(messages, answers - 1)[0]  # the last has all before it
        except InputError as error:
            raise InputError(f"{where}: {error.what}", error.why, error.fix) from None


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
