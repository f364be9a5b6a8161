"""The sampling parameters, `SamplingParams`, and their presets. Nothing here needs JAX."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from glm2_jax.cli.arguments import MAX_SEED
from glm2_jax.errors import UsageError, shorten

MAX_LOGPROBS = 20  # the compiled step always has room for this many alternatives
MAX_BIASES = 300  # as in the API of OpenAI
MAX_STOP_TOKEN_IDS = 16
MAX_ID = 2**31 - 1
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # the largest float32


@dataclass(frozen=True)
class SamplingParams:
    """Says how an answer is drawn; checked when made. The defaults are the reference `chat()`'s.

    Attributes:
        temperature: divides the logits; 0 = greedy (always the likeliest token).
        top_k: keep the k likeliest tokens (and those that tie with the k-th); 0 = all.
        top_p: keep the smallest set of likeliest tokens whose probability exceeds this, in (0, 1].
        repetition_penalty: divides positive and multiplies negative logits of every token that is
            already in the prompt or the answer; 1 = off.
        presence_penalty: subtracted from the logit of every token that is already in the answer,
            -2 to 2; 0 = off.
        frequency_penalty: the same, times how often the token is there, -2 to 2; 0 = off.
        logit_bias: what is added to the logits of some token ids before everything else, -100 to
            100: a mapping, or pairs, of at most 300 ids.
        max_new_tokens: longest answer in tokens; None = as far as `max_length` goes.
        max_length: prompt and answer together; None = the engine's limit, which also caps it.
        stop: strings that end the answer where its text, as it is shown, has them; they are not
            part of it. One string or a sequence.
        stop_token_ids: token ids that end the answer, as the model's end tokens do; at most 16.
        ignore_eos: the model's end tokens do not end the answer, and are part of it.
        seed: random seed; the same seed gives the same answer.
        logprobs: report log-probabilities of the token drawn and of this many alternatives.
        loop_stop: N > 0 ends an answer whose last tokens are one block repeated N times, a short
            block more often (see `infer.engine.loops`); 0 = off.

    Raises:
        UsageError: a value is of the wrong kind or out of range.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.8
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    max_new_tokens: int | None = None
    max_length: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    logprobs: int | None = None
    loop_stop: int = 0

    def __post_init__(self) -> None:
        rules: dict[str, tuple[Any, ...]] = {
            "temperature": (_number, 0.0),
            "top_k": (whole, 0),
            "top_p": (_number, _SMALLEST, 1.0),
            "repetition_penalty": (_number, _SMALLEST),
            "presence_penalty": (_number, -2.0, 2.0),
            "frequency_penalty": (_number, -2.0, 2.0),
            "logit_bias": (_biases,),
            "max_new_tokens": (whole, 1),
            "max_length": (whole, 1),
            "stop_token_ids": (_ids,),
            "ignore_eos": (_flag,),
            "seed": (whole, 0, MAX_SEED),
            "logprobs": (whole, 0, MAX_LOGPROBS),
            "loop_stop": (whole, 0),
        }
        for name, (check, *bounds) in rules.items():
            value = getattr(self, name)
            if value is not None or name not in ("max_new_tokens", "max_length", "logprobs"):
                object.__setattr__(self, name, check(name, value, *bounds))
        if self.loop_stop == 1:
            raise UsageError(
                "loop_stop must be 0 (off) or at least 2, got 1.",
                "With 1, every answer would be stopped.",
            )
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        stop = tuple(stop) if isinstance(stop, Iterable) else (None,)
        if not all(isinstance(text, str) and text for text in stop):
            raise UsageError(f"stop must be non-empty strings, got {shorten(self.stop)}.")
        for text in map(str, stop):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UsageError(
                    f"the stop string {shorten(text)} can never match",
                    "It has half of a character (a lone surrogate), which no answer has.",
                )
        object.__setattr__(self, "stop", stop)

    @classmethod
    def from_kwargs(cls, preset: str = "official", **kwargs: Any) -> SamplingParams:
        """Make parameters from a preset and keyword arguments, in the habits of `generate()`.

        `do_sample=False` means temperature 0, `num_beams` may only be 1.

        Raises:
            UsageError: unknown preset or name, beams, or a bad value.
        """
        beams, do_sample = kwargs.pop("num_beams", 1), kwargs.pop("do_sample", True)
        if not _is(numbers.Integral, beams) or beams != 1:
            raise UsageError(
                f"num_beams={beams!r}: beam search is not supported",
                fix="Leave num_beams out; temperature=0 gives the greedy answer.",
            )
        if not isinstance(do_sample, bool):
            raise UsageError(f"do_sample must be True or False, got {do_sample!r}.")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UsageError(f"unknown preset {preset!r}", fix=f"Known: {', '.join(PRESETS)}.")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            raise UsageError(
                f"unknown sampling option: {', '.join(unknown)}",
                f"Did you mean {near[0]}?" if near else "",
                fix=f"Known: {', '.join(known)}.",
            )
        greedy = {} if do_sample else {"temperature": 0.0}
        return dataclasses.replace(PRESETS[preset], **kwargs | greedy)


def whole(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """Return the value of an option as an int; UsageError if it is not one in this range."""
    if not _is(numbers.Integral, value) or not least <= value <= most:
        bounds = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise UsageError(f"{name} must be a whole number, {bounds}, got {shorten(value)}.")
    return int(value)


def _number(name: str, value: Any, least: float, most: float = _LARGEST) -> float:
    """Return the value of an option as a float that float32 can hold."""
    if not _is(numbers.Real, value) or not least <= value <= most:  # NaN is in no range
        bounds = f"{'above 0' if least == _SMALLEST else f'{least:g} or more'} and at most {most:g}"
        raise UsageError(f"{name} must be a finite number, {bounds}, got {shorten(value)}.")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    """Return the value of an option that is True or False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be True or False, got {shorten(value)}.")
    return value


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """Return different token ids in the order given."""
    ids = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    ids = tuple(dict.fromkeys(whole(name, token, 0, MAX_ID) for token in ids))
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise UsageError(f"{name} may have at most {MAX_STOP_TOKEN_IDS} ids, got {len(ids)}.")
    return ids


def _biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Return pairs of a token id and what is added to its logit, sorted by id."""
    value = value.items() if isinstance(value, Mapping) else value
    pairs = list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise UsageError(f"{name} must map token ids to numbers, got {shorten(value)}.")
    biases = {
        whole(name, token, 0, MAX_ID): _number(name, bias, -100.0, 100.0) for token, bias in pairs
    }
    if len(biases) < len(pairs):
        raise UsageError(f"{name} has a token id twice: {shorten(value)}")
    if len(biases) > MAX_BIASES:
        raise UsageError(f"{name} may have at most {MAX_BIASES} token ids, got {len(biases)}.")
    return tuple(sorted(biases.items()))


def _is(kind: type, value: Any) -> bool:
    """Return whether `value` is such a number, Python's or NumPy's; True and False are not."""
    return isinstance(value, kind) and not isinstance(value, bool)


PRESETS: Mapping[str, SamplingParams] = {
    "official": SamplingParams(max_length=8192),
    "api": SamplingParams(temperature=0.95, top_p=0.7, max_length=2048),
    "greedy": SamplingParams(temperature=0.0),
}
"""`official`: `chat()` of ChatGLM2, ChatGLM3 and GLM-4; `api`: the defaults of the HTTP server, and
`chat()` of ChatGLM-6B; `greedy`: the example of the GLM base models. Which of them is a model's own
is in the row of its template."""
