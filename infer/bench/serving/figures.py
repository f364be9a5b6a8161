"""What the outcomes of a measurement say: percentiles, rates, errors by kind."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from infer.bench.serving.client import Outcome


@dataclass(frozen=True)
class Times:
    """Seconds: the mean, and percentiles."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times | None:
        """Return those of a list, or None of an empty one."""
        if not len(seconds):
            return None
        return cls(float(np.mean(seconds)), *map(float, np.percentile(seconds, (50, 90, 99))))


@dataclass(frozen=True)
class Figures:
    """What the clients of a server saw; latencies are of the requests that were answered.

    A gap between two parts of an answer is quiet if no request was sent, and none waited for its
    first token, while it lasted: then the server only decoded, with all slots in use.
    """

    requests: int
    errors: dict[str, int]  # kind -> number
    seconds: float  # from the first request to the last answer
    output_tokens: int
    ttft: Times | None  # until the first token
    inter_token: Times | None  # all gaps between two parts of an answer, one token each
    quiet: Times | None  # of these, the quiet ones
    end_to_end: Times | None
    good: int  # requests within both limits

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def requests_per_s(self) -> float:
        """Answered requests per second."""
        return (self.requests - sum(self.errors.values())) / self.seconds

    @property
    def goodput(self) -> float:
        """The share of all requests that were answered within both limits."""
        return self.good / self.requests

    @property
    def jitter(self) -> float | None:
        """How many quiet gaps, as their median, the 99th percentile of all gaps takes."""
        if self.inter_token is None or self.quiet is None:
            return None
        return self.inter_token.p99 / self.quiet.p50


def figures(outcomes: Sequence[Outcome], *, ttft_limit: float, itl_limit: float) -> Figures:
    """Return the figures of at least one outcome; the limits are in seconds."""
    answered = [outcome for outcome in outcomes if not outcome.error]
    gaps = [end - begin for outcome in answered for begin, end in pairwise(outcome.times)]
    errors = collections.Counter(outcome.error for outcome in outcomes if outcome.error)
    begin, end = min(o.start for o in outcomes), max(o.end for o in outcomes)

    def is_good(outcome: Outcome) -> bool:
        first, last = outcome.times[0], outcome.times[-1]
        mean = (last - first) / max(outcome.tokens - 1, 1)
        return first - outcome.start <= ttft_limit and mean <= itl_limit

    return Figures(
        requests=len(outcomes),
        errors=dict(errors.most_common()),
        seconds=max(end - begin, 1e-9),
        output_tokens=sum(outcome.tokens for outcome in answered),
        ttft=Times.of([outcome.times[0] - outcome.start for outcome in answered]),
        inter_token=Times.of(gaps),
        quiet=Times.of(list(quiet_gaps(outcomes))),
        end_to_end=Times.of([outcome.end - outcome.start for outcome in answered]),
        good=sum(map(is_good, answered)),
    )


def quiet_gaps(outcomes: Sequence[Outcome]) -> Iterator[float]:
    """Yield the gaps of answered requests during which no request waited for a first token."""
    waits = sorted((o.start, o.times[0] if o.times else o.end) for o in outcomes)
    starts = np.array([start for start, _ in waits])
    # The latest end of all waits that began no later: one of these decides for a gap.
    ends = np.maximum.accumulate([end for _, end in waits])
    for outcome in outcomes:
        if outcome.error:
            continue
        for begin, end in pairwise(outcome.times):
            before = int(np.searchsorted(starts, end))  # waits that began before the gap ended
            if not before or ends[before - 1] <= begin:
                yield end - begin
