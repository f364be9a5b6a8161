"""Rows: checks of what a call asks for."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from glm2_jax.errors import InputError, UsageError, shown
from infer.engine.params import SamplingParams


def listed(value: Any, rule: str) -> list[Any]:
    """The items of a list, a generator, or an array; of an array as plain numbers.

    Raises:
      UsageError: it is none, against the `rule`. (Text and bytes are none, since their items are
        not what was meant.)
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | bytearray | Mapping):
        raise UsageError(f"{rule}, not {shown(value)}")
    return list(value)


def whole(name: str, value: Any, least: int, most: int = sys.maxsize) -> int:
    """The value of an option as an int; UsageError if it is none from `least` to `most`."""
    known = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not known or not least <= value <= most:
        bounds = f"{least} or more" if most == sys.maxsize else f"{least} to {most}"
        raise UsageError(f"{name} must be a whole number, {bounds}, not {shown(value)}")
    return int(value)


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises InputError for no prompts, an empty one, or ids that are not in the vocabulary."""
    if not prompts:
        raise InputError("no prompts were given")
    for row, ids in enumerate(prompts):
        if not len(ids):
            raise InputError(f"prompt {row + 1} is empty")
        bad = [i for i in ids if not isinstance(i, int | np.integer) or isinstance(i, bool)]
        bad = bad or [i for i in ids if not 0 <= i < vocab_size]
        if bad:
            raise InputError(
                f"prompt {row + 1} has the token id {shown(bad[0])}",
                f"The model's ids are whole numbers from 0 to {vocab_size - 1}.",
            )


def check_row_ids(row_ids: Sequence[int] | None, count: int) -> Sequence[int]:
    """The number that each prompt draws its random numbers by; UsageError for bad ones."""
    if row_ids is None:
        return range(count)
    if len(row_ids) != count:
        raise UsageError(f"there are {len(row_ids)} row_ids for {count} prompts")
    for number in row_ids:
        if not isinstance(number, int | np.integer) or not 0 <= number < 2**31:
            raise UsageError(f"row_ids must be whole numbers below 2**31, not {shown(number)}")
    return row_ids


def answer_limit(length: int, row: int, sampling: SamplingParams, ceiling: int) -> int:
    """Tokens that the answer to a prompt of `length` may have.

    Raises:
      InputError: there is no room for a single one.
    """
    room = ceiling - length
    if room < 1:
        raise InputError(
            f"prompt {row + 1} has {length} tokens, but prompt and answer together may have"
            f" {ceiling}",
            "The answer needs room for at least one token; nothing is cut off silently.",
            "Shorten the prompt, or raise max_length as far as the model goes.",
        )
    return room if sampling.max_new_tokens is None else min(room, sampling.max_new_tokens)
