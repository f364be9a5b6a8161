"""Choosing one of several ways to compute the same: each is checked, then timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

Run = Callable[[], Any]  # computes it once and returns arrays, of which the first are compared
Clock = Callable[[str, Run], float]  # returns the seconds of a run of that name

ROUNDS, SECONDS = 15, 0.4  # at most; at least `_LEAST` rounds
_LEAST = 5
GAIN = 0.9  # a smaller gain of one part alone is lost in the complete step
_HOPELESS = 1.5  # times as long as the best: not timed any more


@dataclass(frozen=True)
class Choice:
    """What was measured of one computation.

    Attributes:
        name: the form that was chosen.
        usual: the one that is used without measuring.
        seconds: of each form that was timed, the best turn: other work can only make it longer.
        refused: why a form is out of the question: it failed, or computed something else.
    """

    name: str
    usual: str
    seconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """How many times as fast as the usual form the chosen one is."""
        return self.seconds[self.usual] / self.seconds[self.name] if self.seconds else 1.0


def wall_clock(name: str, run: Run) -> float:
    """Run, and return the seconds until the device is done."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def choose(
    forms: Mapping[str, Callable[[], Run]],
    usual: str,
    exact: np.ndarray | Sequence[np.ndarray],
    tolerance: float,
    clock: Clock = wall_clock,
    gain: float = GAIN,
) -> Choice:
    """Return the fastest form that computes what `exact` says.

    Args:
        forms: compiles a form and returns what runs it. That fails where a form does not exist.
        usual: the form among them that stays unless another one is clearly faster.
        exact: the right result, of which runs may differ by `tolerance` times the largest value;
            or several ones, each with its own largest value.
        gain: the share of the usual form's time that another one may take at most.
    """
    runs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for name, build in forms.items():
        try:
            run = build()
            problem = _difference(run(), exact, tolerance)
        except Exception as error:  # of a compiler, a kernel or a missing library: any kind
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if problem:
            refused[name] = problem
        else:
            runs[name] = run
    if usual not in runs:
        return Choice(usual, usual, {}, refused)
    times = _take_turns(runs, clock)
    seconds = {name: min(found) for name, found in times.items()}
    best = min(seconds, key=seconds.__getitem__)
    if not _is_faster(times[best], times[usual], gain):
        best = usual
    return Choice(best, usual, seconds, refused)


def _difference(result: Any, exact: np.ndarray | Sequence[np.ndarray], tolerance: float) -> str:
    """Say how far a result is from the right one; "" = near enough."""
    all_exact = [exact] if isinstance(exact, np.ndarray) else exact
    pairs = zip(jax.tree.leaves(result), all_exact, strict=False)
    return next(filter(None, (_difference_of(*pair, tolerance) for pair in pairs)), "")


def _difference_of(result: Any, exact: np.ndarray, tolerance: float) -> str:
    found = np.asarray(result, np.float32)
    if found.shape != exact.shape:
        return f"returned the shape {found.shape} in place of {exact.shape}"
    worst, largest = np.max(np.abs(found - exact)), np.max(np.abs(exact))
    near = bool(worst <= tolerance * largest)  # NaN is not
    return "" if near else f"wrong: differs by {worst:.2g} where the largest value is {largest:.2g}"


def _take_turns(runs: Mapping[str, Run], clock: Clock) -> dict[str, list[float]]:
    """Time all in turns, so that noise affects all alike, until the time is used up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    going, used = dict(runs), 0.0
    for turn in range(ROUNDS):
        for name, run in going.items():
            times[name].append(clock(name, run))
            used += times[name][-1]
        if turn + 1 >= _LEAST:
            best = min(min(found) for found in times.values())
            going = {n: run for n, run in going.items() if min(times[n]) <= _HOPELESS * best}
            if used > SECONDS * len(runs):
                break
    return times


def _is_faster(times: list[float], usual: list[float], gain: float) -> bool:
    """Return whether the first is faster by more than the noise: in the best turn, in the median,
    and in nearly every turn that both took."""
    pairs = list(zip(times, usual, strict=False))
    wins = sum(one < other for one, other in pairs)
    return wins >= 0.8 * len(pairs) and all(
        of(times) < gain * of(usual) for of in (min, statistics.median)
    )
