"""The rows of a call: checks of what is asked, and one object for each sequence."""

from __future__ import annotations

import dataclasses
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
    """One sequence: a prompt, how it is answered, and the answer so far."""

    index: int  # of its prompt in the call
    ids: Sequence[int]  # the prompt
    sampling: SamplingParams
    draw: int  # which of the answers that the seed stands for
    answer: Answer
    stats: Stats = field(default_factory=Stats)
    tokens: int = 0  # how many it was given, the end token included

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

        `logprobs` are those of the token, float32 scalar, and of the likeliest, float32 and int32
        [a few]. CheckpointError: the model produced NaN or Inf.
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


def _without(sampling: SamplingParams, banned: Sequence[int]) -> SamplingParams:
    """Return parameters that never draw the banned ids."""
    if not banned:
        return sampling
    bias = dict(sampling.logit_bias) | dict.fromkeys(banned, -100.0)
    return dataclasses.replace(sampling, logit_bias=tuple(bias.items()))


def make_rows(
    prompts: Any,
    sampling: SamplingParams | Sequence[SamplingParams],
    row_ids: Sequence[int] | None,
    make_answer: Callable[..., Answer],
    *,
    vocab_size: int,
    max_length: int,
    banned: Sequence[int] = (),
) -> list[Row]:
    """Return a row for each prompt; arguments and errors are those of `Engine.run`.

    `make_answer` is `Answer` but for the prompt, its parameters and its limit; the `banned` ids are
    never drawn.
    """
    prompts = [
        listed(ids, "a prompt must be a list of token ids")
        for ids in listed(prompts, "prompts must be a list of lists of token ids")
    ]
    if not prompts:
        raise InputError("no prompts were given")
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
        name = f"prompt {index + 1}"
        if not ids:
            raise InputError(f"{name} is empty")
        _check_ids(name, ids, vocab_size)
        _check_ids(f"logit_bias of {name}", [token for token, _ in one.logit_bias], vocab_size)
        _check_ids(f"stop_token_ids of {name}", one.stop_token_ids, vocab_size)
        one = _without(one, banned)
        limit = _answer_limit(name, len(ids), one, max_length)
        answer = make_answer(ids, one, limit=limit)
        rows.append(Row(index, ids, one, whole("row_ids", draw, 0, 2**31 - 1), answer))
    return rows


def listed(value: Any, rule: str) -> list[Any]:
    """Return the items of a list, a generator, or an array (as plain numbers).

    Anything else is a UsageError, against the `rule`; so are text and bytes, whose items are not
    what was meant.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | bytearray | Mapping):
        raise UsageError(f"{rule}, got {shorten(value)}")
    return list(value)


def _check_ids(name: str, ids: Sequence[Any], vocab_size: int) -> None:
    """Raise InputError for ids that are not in the vocabulary."""
    for token in ids:
        number = isinstance(token, int | np.integer) and not isinstance(token, bool)
        if not number or not 0 <= token < vocab_size:
            raise InputError(
                f"{name} has the token id {shorten(token)}",
                f"The model's ids are whole numbers from 0 to {vocab_size - 1}.",
            )


def _answer_limit(name: str, length: int, sampling: SamplingParams, max_length: int) -> int:
    """Return how many tokens the answer to a prompt of `length` may have; InputError for none."""
    ceiling = min(sampling.max_length or max_length, max_length)
    room = ceiling - length
    if room < 1:
        raise InputError(
            f"{name} has {length} tokens, but prompt and answer together may have {ceiling}",
            "The answer needs room for at least one token; nothing is cut off silently.",
            "Shorten the prompt, or raise max_length as far as the model goes.",
        )
    return room if sampling.max_new_tokens is None else min(room, sampling.max_new_tokens)
