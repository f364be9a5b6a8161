"""Statistics of a call: tokens, seconds, memory."""

import dataclasses
import time
from dataclasses import dataclass

from infer.engine.call import Job
from infer.engine.programs import Programs


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


def add_stats(total: Stats | None, stats: Stats) -> Stats:
    """The sum over calls: of one engine, so loading and the first token count once."""
    if total is None:
        return dataclasses.replace(stats)
    once = {"load_s", "first_token_s"}
    names = [field.name for field in dataclasses.fields(stats) if field.name not in once]
    sums = {name: getattr(total, name) + getattr(stats, name) for name in names}
    return dataclasses.replace(total, **sums)
