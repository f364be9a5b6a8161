"""What a user may ask of the sampler: `SamplingParams` and its presets. Nothing here needs JAX."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from glm2_jax.errors import UsageError, shown

MAX_LOGPROBS = 20  # the compiled step always has room for this many alternatives
MAX_SEED = 2**63 - 1
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # the range of float32


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is drawn; checked when made. The defaults are those of the reference `chat()`.

    Attributes:
      temperature: divides the logits; 0 = greedy (always the likeliest token).
      top_k: keep the k likeliest tokens (and those that tie with the k-th); 0 = all.
      top_p: keep the smallest set of likeliest tokens whose probability exceeds this, in (0, 1].
      repetition_penalty: divides positive and multiplies negative logits of every token that is
        already in the prompt or the answer; 1 = off.
      max_new_tokens: longest answer in tokens; None = as far as `max_length` goes.
      max_length: prompt and answer together; None = the engine's own limit, which also caps it.
      stop: strings that end the answer where its text, as it is shown, has them; they are not part
        of it. One string or a sequence.
      seed: of the random numbers; the same seed gives the same answer.
      logprobs: also report log-probabilities, of the token drawn and of this many alternatives.
      loop_stop: N > 0 ends an answer whose last tokens are one block repeated N times, a short
        block more often (see `infer.engine.loops`); 0 = off.

    Raises:
      UsageError: a value is of the wrong kind or out of range.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.8
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    max_length: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int | None = None
    loop_stop: int = 0

    def __post_init__(self) -> None:
        self._number("temperature", low=0.0)
        self._number("top_p", low=0.0, high=1.0, low_open=True)
        self._number("repetition_penalty", low=_SMALLEST)
        self._integer("top_k", low=0)
        self._integer("seed", low=0, high=MAX_SEED)
        self._integer("loop_stop", low=0)
        self._integer("max_new_tokens", low=1, optional=True)
        self._integer("max_length", low=1, optional=True)
        self._integer("logprobs", low=0, high=MAX_LOGPROBS, optional=True)
        if self.loop_stop == 1:
            raise UsageError(
                "loop_stop must be 0 (off) or at least 2, not 1",
                "Every text repeats its own end once.",
            )
        object.__setattr__(self, "stop", _stop_strings(self.stop))

    @classmethod
    def from_kwargs(cls, preset: str = "official", **kwargs: Any) -> SamplingParams:
        """Makes parameters from a preset and keyword arguments, in the habits of `generate()`.

        `do_sample=False` means temperature 0, `num_beams` may only be 1.

        Raises:
          UsageError: unknown preset or name, beams, or a bad value.
        """
        values = dict(kwargs)
        _refuse_beams(values)
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UsageError(f"unknown preset {preset!r}", fix=f"Known: {', '.join(PRESETS)}.")
        greedy = _greedy_asked(values)
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            raise UsageError(
                f"unknown sampling option: {', '.join(unknown)}",
                f"Did you mean {near[0]}?" if near else "",
                fix=f"Known: {', '.join(known)}.",
            )
        if greedy:
            values["temperature"] = 0.0
        return dataclasses.replace(PRESETS[preset], **values)

    def _number(self, name: str, *, low: float, high: float = _LARGEST, low_open=False) -> None:
        value: Any = getattr(self, name)
        # NaN is in no range.
        ok = _is(numbers.Real, value) and (low < value if low_open else low <= value)
        if not ok or not value <= high:
            bounds = f"above {low:g}" if low_open else f"{low:g} or more"
            bounds += f" and at most {high:g}"
            raise UsageError(f"{name} must be a finite number, {bounds}, not {shown(value)}")
        object.__setattr__(self, name, float(value))

    def _integer(
        self, name: str, *, low: int, high: int | None = None, optional: bool = False
    ) -> None:
        value: Any = getattr(self, name)
        if optional and value is None:
            return
        number = int(value or 0) if _is(numbers.Integral, value) else low - 1
        if number < low or (high is not None and number > high):
            bounds = f"{low} or more" if high is None else f"between {low} and {high}"
            raise UsageError(f"{name} must be a whole number, {bounds}, not {shown(value)}")
        object.__setattr__(self, name, number)


def _is(kind: type, value: Any) -> bool:
    """Whether `value` is such a number, Python's or NumPy's; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Iterable):
        raise UsageError(f"stop must be non-empty strings, not {shown(value)}")
    strings = tuple(strings)
    if not all(isinstance(text, str) and text for text in strings):
        raise UsageError(f"stop must be non-empty strings, not {shown(value)}")
    for text in strings:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UsageError(
                f"the stop string {shown(text)} can never match",
                "It has half of a character (a lone surrogate), which no answer has.",
            )
    return strings


def _refuse_beams(values: dict[str, Any]) -> None:
    beams = values.pop("num_beams", 1)
    if not _is(numbers.Integral, beams) or beams != 1:
        raise UsageError(
            f"num_beams={beams!r}: beam search is not implemented",
            fix="Leave num_beams out; temperature=0 gives the greedy answer.",
        )


def _greedy_asked(values: dict[str, Any]) -> bool:
    do_sample = values.pop("do_sample", True)
    if not isinstance(do_sample, bool):
        raise UsageError(f"do_sample must be True or False, not {do_sample!r}")
    return not do_sample


PRESETS: Mapping[str, SamplingParams] = {
    "official": SamplingParams(max_length=8192),
    "api": SamplingParams(temperature=0.95, top_p=0.7, max_length=2048),
}
"""`official`: the reference's `chat()`; `api`: the defaults of its HTTP server."""
