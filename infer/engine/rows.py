"""The rows of a call: checks of what is asked, and one object for each sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from glm2_jax.errors import CheckpointError, InputError, UsageError, shorten
from infer.engine.answer import Answer, Completion, TokenLogprob
from infer.engine.params import SamplingParams, whole
from infer.engine.stats import Stats
from infer.engine.steps import NOT_FINITE


@dataclass(frozen=True)
class TokenEvent:
    """One step of one row.

    Attributes:
        row: the prompt's index in the call.
        token: the new token; None for an end token.
        text: text that is now certain, perhaps "".
        finish_reason: None until the row's last event.
        completion: the complete answer, in the last event.
    """

    row: int
    token: int | None
    text: str
    logprob: TokenLogprob | None = None
    finish_reason: str | None = None
    completion: Completion | None = None


@dataclass
class Row:
    """One sequence: a prompt, how it is answered, and the answer so far.

    Attributes:
        index: of its prompt in the call.
        ids: the prompt.
        sampling: its parameters, with the seed and the stop strings.
        draw: which of the answers that the seed stands for.
        answer: what has come of it, and how long it may be.
        stats: its tokens and seconds.
        tokens: how many it was given, the end token included.
    """

    index: int
    ids: Sequence[int]
    sampling: SamplingParams
    draw: int
    answer: Answer
    stats: Stats = field(default_factory=Stats)
    tokens: int = 0

    @property
    def ended(self) -> bool:
        return self.answer.finish_reason is not None

    def slots(self, tokens: int) -> int:
        """Return the cache slots that it needs until it has drawn `tokens` tokens."""
        return len(self.ids) + min(tokens, self.answer.limit)

    def completion(self) -> Completion:
        """Return the finished answer."""
        return self.answer.completion(self.stats)

    def take(self, token: int, logprobs: Sequence[Any] | None) -> TokenEvent:
        """Append the next token.

        Args:
            logprobs: float32 scalar of the token; float32 and int32 [a few] of the likeliest.

        Raises:
            CheckpointError: the model produced NaN or Inf.
        """
        if token == NOT_FINITE:
            raise CheckpointError(
                f"the model produced NaN or Inf at step {self.tokens + 1}"
                f" of the answer to prompt {self.index + 1}",
                "The weights are damaged, or their numbers do not fit the dtype.",
                "Check the checkpoint's files, or load it as float32 or bfloat16.",
            )
        logprob, count = None, self.sampling.logprobs
        if count is not None and logprobs is not None:
            chosen, top, ids = logprobs
            pairs = zip(ids[:count].tolist(), top[:count].tolist(), strict=True)
            logprob = TokenLogprob(token, float(chosen), tuple(pairs))
        self.tokens += 1
        text = self.answer.push(token, logprob)
        end = token in self.answer.stop_ids
        return TokenEvent(
            self.index,
            None if end else token,
            text,
            None if end else logprob,
            self.answer.finish_reason,
            self.completion() if self.ended else None,
        )


def make_rows(
    prompts: Any,
    sampling: SamplingParams | Sequence[SamplingParams],
    row_ids: Sequence[int] | None,
    make_answer: Callable[..., Answer],
    *,
    vocab_size: int,
    max_length: int,
) -> list[Row]:
    """Return a row for each prompt.

    Args:
        sampling: of all prompts, or of each.
        make_answer: `Answer` but for the prompt, its parameters and its limit.

    Raises:
        UsageError, InputError: as `Engine.run`.
    """
    prompts = [
        listed(ids, "a prompt must be a list of token ids")
        for ids in listed(prompts, "prompts must be a list of lists of token ids")
    ]
    _check_prompts(prompts, vocab_size)
    count = len(prompts)
    params: list[Any] = list(sampling) if isinstance(sampling, list | tuple) else [sampling] * count
    if len(params) != count or not all(isinstance(one, SamplingParams) for one in params):
        raise UsageError(
            f"sampling must be SamplingParams, or one for each prompt, got {shorten(sampling)}"
        )
    draws = range(count) if row_ids is None else row_ids
    if len(draws) != count:
        raise UsageError(f"expected {count} row_ids, one for each prompt, got {len(draws)}")
    rows = []
    for index, (ids, one, draw) in enumerate(zip(prompts, params, draws, strict=True)):
        limit = _answer_limit(len(ids), index, one, min(one.max_length or max_length, max_length))
        answer = make_answer(ids, one, limit=limit)
        rows.append(Row(index, ids, one, whole("row_ids", draw, 0, 2**31 - 1), answer))
    return rows


def listed(value: Any, rule: str) -> list[Any]:
    """Return the items of a list, a generator, or an array; of an array as plain numbers.

    Raises:
        UsageError: it is something else, against the `rule`. (Text and bytes are refused, since
            their items are not what was meant.)
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | bytearray | Mapping):
        raise UsageError(f"{rule}, got {shorten(value)}")
    return list(value)


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise InputError for no prompts, an empty one, or ids that are not in the vocabulary."""
    if not prompts:
        raise InputError("no prompts were given")
    for row, ids in enumerate(prompts):
        if not len(ids):
            raise InputError(f"prompt {row + 1} is empty")
        bad = [i for i in ids if not isinstance(i, int | np.integer) or isinstance(i, bool)]
        bad = bad or [i for i in ids if not 0 <= i < vocab_size]
        if bad:
            raise InputError(
                f"prompt {row + 1} has the token id {shorten(bad[0])}",
                f"The model's ids are whole numbers from 0 to {vocab_size - 1}.",
            )


def _answer_limit(length: int, row: int, sampling: SamplingParams, ceiling: int) -> int:
    """Return how many tokens the answer to a prompt of `length` may have.

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
