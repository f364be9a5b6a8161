"""What one call of the engine works on: padded prompts, limits, answers, and its statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from glm2_jax.errors import CheckpointError, UsageError, shown
from glm2_jax.runtime.buckets import bucket, padded_batch
from glm2_jax.text.tokenizer import Tokenizer
from infer.engine.answer import Answer, Completion, TokenLogprob
from infer.engine.params import SamplingParams
from infer.engine.parts import ROOM, parts
from infer.engine.rows import answer_limit, check_prompts, check_row_ids, listed
from infer.engine.sampling import Rows, seed_words
from infer.engine.steps import IDLE, NOT_FINITE, Controls, Output


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


def _padded(values: Sequence[int], batch: int) -> np.ndarray:
    return np.array([*values, *[0] * (batch - len(values))], np.int32)
