"""Statistics of answers: tokens and seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Stats:
    """Tokens and seconds of one row, or of several.

    Attributes:
        compile_s: waiting for programs to be compiled; in none of the other times.
        first_token_s: from the call to the first token.
        prefill_tokens, prefill_s: prompt tokens read, and the time for them and the first token.
        reused_tokens: prompt tokens whose keys and values a session had kept.
        decode_tokens, decode_s: tokens after the first, and the time for them.
        passes: forward passes for them, those without drafts included; 0 without `speculate`.
        drafted_tokens, accepted_tokens: draft tokens in those passes.
        programs, programs_kept: how many programs were made, and how many of them had been kept
            from an earlier run and were not compiled.
    """

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


_NAMES = [field.name for field in dataclasses.fields(Stats)]


def together(rows: Iterable[Stats]) -> Stats:
    """Return the statistics of rows of one call: tokens add up, all else is that of the longest."""
    total = Stats()
    for row in rows:
        for name in _NAMES:
            values = getattr(total, name), getattr(row, name)
            setattr(total, name, sum(values) if name.endswith("_tokens") else max(values))
    return total


def add_stats(total: Stats | None, stats: Stats) -> Stats:
    """Return the sum of calls, one after the other; the first token of the first call counts."""
    if total is None:
        return dataclasses.replace(stats)
    sums = {name: getattr(total, name) + getattr(stats, name) for name in _NAMES}
    return dataclasses.replace(total, **sums | {"first_token_s": total.first_token_s})
