"""What one call of the engine works on: padded prompts, limits, answers, and its statistics."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.tokenizer import Tokenizer
from infer.answer import Answer, Completion, TokenLogprob
from infer.params import SamplingParams, shown
from infer.programs import Programs
from infer.reading import ROOM, bucket, padded_batch, parts
from infer.sampling import Rows, seed_words
from infer.steps import IDLE, NOT_FINITE, Controls, Output


@dataclass
class Stats:
    """Seconds and tokens of the last call (of the engine's making: `load_s`).

    Attributes:
      load_s: opening the checkpoint.
      compile_s: making programs for shapes not met before; in none of the others.
      first_token_s: from the call to the first token of every row.
      prefill_tokens, prefill_s: prompt tokens read, and the time for them and the first token.
      reused_tokens: prompt tokens that a session did not have to read again.
      decode_tokens, decode_s: tokens after the first of each row, and the time for them.
      passes: forward passes for them, those without drafts included; 0 without `speculate`.
      drafted_tokens, accepted_tokens: in those passes, of all rows together.
      programs, programs_kept: how many were made, and how many of them had been kept from an
        earlier run and were not compiled.
    """

    load_s: float = 0.0
    compile_s: float = 0.0
    first_token_s: float = 0.0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    reused_tokens: int = 0
    decode_tokens: int = 0
    decode_s: float = 0.0
    passes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    programs: int = 0
    programs_kept: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, all rows together; 0 before there is a time."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second, all rows together; 0 before there is a time."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True)
class TokenEvent:
    """One step of one row.

    Attributes:
      row: the prompt's index in the call.
      token: the new token; None for an end token.
      text: text that is now certain, perhaps "".
      finish_reason: None until the row's last event.
      completion: the whole answer, in the last event.
    """

    row: int
    token: int | None
    text: str
    logprob: TokenLogprob | None = None
    finish_reason: str | None = None
    completion: Completion | None = None


class Job:
    """The prompts of a call, padded to a bucket on both axes, and their answers.

    Attributes:
      parts: what is to be read, at most `chunk` tokens of all rows at once. Of every prompt the
        first `reused` ids are left out: the cache has them.
      batch: B, rows, a multiple of the argument `rows`; those beyond the prompts are empty.
      cache_size: S, slots to begin with: a bucket that holds the prompts and the beginning of the
        answers.
      largest_cache: S that holds the longest answers.
      placed: `controls` as the programs take them; None before the first one does.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        tokenizer: Tokenizer,
        *,
        stop_ids: Sequence[int],
        vocab_size: int,
        max_length: int,
        row_ids: Sequence[int] | None,
        clean: bool,
        roles: bool = False,
        chunk: int,
        reused: int = 0,
        rows: int = 1,
    ):
        if not isinstance(sampling, SamplingParams):
            raise UsageError(f"sampling must be SamplingParams, not {shown(sampling)}")
        self.sampling = sampling
        prompts = [
            listed(ids, "a prompt must be a list of token ids")
            for ids in listed(prompts, "prompts must be a list of lists of token ids")
        ]
        check_prompts(prompts, vocab_size)
        ceiling = min(sampling.max_length or max_length, max_length)
        limits = [answer_limit(len(ids), row, sampling, ceiling) for row, ids in enumerate(prompts)]
        self.answers = [
            Answer(
                tokenizer, ids, sampling, limit=limit, stop_ids=stop_ids, clean=clean, roles=roles
            )
            for ids, limit in zip(prompts, limits, strict=True)
        ]
        self.batch = batch = padded_batch(len(prompts), rows)
        self.parts = parts(prompts, reused, batch, min(max(1, chunk // batch), max_length))
        self._prompts = prompts
        self._limits = limits
        self.cache_size = bucket(self._slots(range(len(prompts)), ROOM), max_length)
        self.largest_cache = bucket(self._slots(range(len(prompts)), max_length), max_length)
        self.controls = Controls(
            rows=Rows.full(batch, sampling),
            seed=seed_words(sampling.seed),
            row_ids=_padded(check_row_ids(row_ids, len(prompts)), batch),
            limit=_padded(limits, batch),
            stop_ids=np.array(stop_ids, np.int32),
            want_logprobs=np.array(sampling.logprobs is not None),
        )
        self.placed: Controls | None = None
        self._vocab_size = vocab_size
        self.steps_read = 0
        self.new_tokens = 0

    @property
    def prompt_tokens(self) -> int:
        """How many tokens are to be read, of all rows together."""
        return int(sum(part.lengths.sum() for part in self.parts))

    @property
    def seen(self) -> np.ndarray:
        """bool [B, V]: the tokens of each row's whole prompt."""
        seen = np.zeros((self.batch, self._vocab_size), bool)
        for row, ids in enumerate(self._prompts):
            seen[row, ids] = True
        return seen

    def slots(self, tokens: int) -> int:
        """The slots that the unfinished rows need until each has drawn `tokens` tokens."""
        going = [row for row, a in enumerate(self.answers) if a.finish_reason is None]
        return self._slots(going, tokens)

    def _slots(self, rows: Iterable[int], tokens: int) -> int:
        ends = (len(self._prompts[row]) + min(tokens, self._limits[row]) for row in rows)
        return max(ends, default=0)

    @property
    def drawn(self) -> int:
        """The most tokens that an unfinished row has drawn."""
        return max((a.drawn for a in self.answers if a.finish_reason is None), default=0)

    @property
    def keep(self) -> np.ndarray:
        """bool [B]: rows that the host has not ended."""
        going = np.zeros(self.batch, bool)
        going[: len(self.answers)] = [answer.finish_reason is None for answer in self.answers]
        return going

    @property
    def steps_wanted(self) -> int:
        """How many tokens the longest unfinished row may still come to; 0 when all have ended."""
        return max((a.limit for a in self.answers if a.finish_reason is None), default=0)

    def take(self, output: Output) -> Iterator[TokenEvent]:
        """Hands one step's output (NumPy arrays) to the answers.

        Raises:
          CheckpointError: the model produced NaN or Inf.
        """
        self.steps_read += 1
        for row, answer in enumerate(self.answers):
            token = int(output.tokens[row])
            if answer.finish_reason is not None or token == IDLE:
                continue
            if token == NOT_FINITE:
                raise CheckpointError(
                    f"the model produced NaN or Inf at step {answer.drawn + 1}"
                    f" of the answer to prompt {row + 1}",
                    "The weights are damaged, or their numbers do not fit the dtype.",
                    "Check the checkpoint's files, or load it as float32 or bfloat16.",
                )
            logprob = self._logprob(output, row)
            text = answer.push(token, logprob)
            self.new_tokens += 1
            done = answer.finish_reason is not None
            ended = token in self.controls.stop_ids
            yield TokenEvent(
                row,
                None if ended else token,
                text,
                None if ended else logprob,
                answer.finish_reason,
                answer.completion() if done else None,
            )

    def _logprob(self, output: Output, row: int) -> TokenLogprob | None:
        count = self.sampling.logprobs
        if count is None or output.logprobs is None:
            return None
        chosen, top, ids = (np.asarray(part)[row] for part in output.logprobs)
        pairs = zip(ids[:count].tolist(), top[:count].tolist(), strict=True)
        return TokenLogprob(int(output.tokens[row]), float(chosen), tuple(pairs))


class Clock:
    """Fills in `Stats` while a call runs; compiling is taken out of every time."""

    def __init__(self, stats: Stats, programs: Programs):
        self._stats, self._programs = stats, programs
        self._before = programs.seconds, programs.compiled, programs.cached
        self._start = time.perf_counter()
        self._prefill = self._start

    def _running(self) -> float:
        return time.perf_counter() - (self._programs.seconds - self._before[0])

    def prefill_starts(self) -> None:
        self._prefill = self._running()

    def read(self, job: Job) -> None:
        """A step's tokens have come; `job` has them already."""
        now, stats = self._running(), self._stats
        if stats.prefill_tokens == 0:
            stats.prefill_tokens = job.prompt_tokens
            stats.first_token_s = now - self._start
            stats.prefill_s = now - self._prefill
            self._first, self._first_tokens = now, job.new_tokens
        stats.decode_tokens = job.new_tokens - self._first_tokens
        stats.decode_s = now - self._first
        seconds, compiled, cached = self._before
        stats.compile_s = self._programs.seconds - seconds
        stats.programs = self._programs.compiled - compiled
        stats.programs_kept = self._programs.cached - cached

    def verified(self, rows: int, drafted: int, tokens: int) -> None:
        """One pass verified `drafted` tokens for each of `rows` rows, and gave `tokens` in all."""
        self._stats.passes += 1
        self._stats.drafted_tokens += rows * drafted
        self._stats.accepted_tokens += tokens - rows


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


def _padded(values: Sequence[int], batch: int) -> np.ndarray:
    return np.array([*values, *[0] * (batch - len(values))], np.int32)
