"""What ratings say: win rates, Bradley-Terry strengths, mean scores, agreement, disagreements.

Marks become comparisons of two models on a prompt by a criterion: of one item with --scale ab, of
the scores that a rater gave to both with --scale 1-5. Intervals are percentiles of a bootstrap over
prompts, because the marks of one prompt depend on each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from glm2_jax.errors import UsageError
from glm2_jax.extras import pip_install
from infer.evaluate.rate.ratings import Rater
from infer.evaluate.rate.sheet import AB, CRITERIA, Item, Sheet

DRAWS = 1000  # bootstrap samples
OVERALL = "overall"  # all criteria together
_ELO = 400 / np.log(10)


class Comparison(NamedTuple):
    """How a rater compares two models on a prompt: `won` by the first, 0.5 = the same."""

    prompt: str
    criterion: str
    first: int
    second: int
    won: float


def compare(sheet: Sheet, raters: Sequence[Rater]) -> list[Comparison]:
    """Return all comparisons that the marks make, the checks left out; first < second."""
    found = []
    for rater in raters:
        rated = [(item, rater.marks[item.id]) for item in items_of(sheet) if item.id in rater.marks]
        if sheet.scale == AB:
            pairs = [(item.prompt, *item.models, marks, None) for item, marks in rated]
        else:
            pairs = [
                (one.prompt, one.models[0], two.models[0], marks, other)
                for (one, marks), (two, other) in itertools.combinations(rated, 2)
                if one.prompt == two.prompt and one.models != two.models
            ]
        for prompt, first, second, marks, other in pairs:
            for name in CRITERIA:
                better = marks[name] - (other[name] if other else 0)
                won = (1 + np.sign(better)) / 2
                if first > second:
                    found.append(Comparison(prompt, name, second, first, 1 - won))
                else:
                    found.append(Comparison(prompt, name, first, second, won))
    return found


def items_of(sheet: Sheet) -> list[Item]:
    """Return the items that are no checks."""
    return [item for item in sheet.items if item.kind == "item"]


def win_rates(sheet: Sheet, found: Sequence[Comparison], seed: int) -> list[dict[str, Any]]:
    """Return a row for each two models and criterion; a tie is half a win for both."""
    rows = []
    for first, second in itertools.combinations(range(len(sheet.models)), 2):
        own = [one for one in found if (one.first, one.second) == (first, second)]
        for name in (OVERALL, *CRITERIA):
            some = [one for one in own if name in (OVERALL, one.criterion)]
            if not some:
                continue
            won = np.array([one.won for one in some])
            low, high = _interval([one.prompt for one in some], won, seed)
            rows.append(
                {
                    "criterion": name,
                    "model": sheet.models[first],
                    "against": sheet.models[second],
                    "won": int((won == 1).sum()),
                    "same": int((won == 0.5).sum()),
                    "lost": int((won == 0).sum()),
                    "win_rate": float(won.mean()),
                    "low": low,
                    "high": high,
                }
            )
    return rows


def mean_scores(sheet: Sheet, raters: Sequence[Rater], seed: int) -> list[dict[str, Any]]:
    """Return the mean score of each model by each criterion."""
    rows = []
    for at, model in enumerate(sheet.models):
        own = [
            (item.prompt, rater.marks[item.id])
            for rater in raters
            for item in items_of(sheet)
            if item.models == (at,) and item.id in rater.marks
        ]
        for name in (OVERALL, *CRITERIA) if own else ():
            names = CRITERIA if name == OVERALL else (name,)
            scores = np.array([fmean(marks[one] for one in names) for _, marks in own])
            low, high = _interval([prompt for prompt, _ in own], scores, seed)
            mean = float(scores.mean())
            row = {"criterion": name, "model": model, "ratings": len(own), "mean_score": mean}
            rows.append(row | {"low": low, "high": high})
    return rows


def _resample(prompts: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the prompt of each value, int [values], and how often each prompt is in
    each bootstrap sample, float64 [DRAWS, prompts]."""
    numbers: dict[str, int] = {}
    which = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])
    share = np.full(len(numbers), 1 / len(numbers))
    counts = np.random.default_rng(seed).multinomial(len(numbers), share, DRAWS)
    return which, counts.astype(np.float64)


def _interval(prompts: Sequence[str], values: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % percentiles of the mean over samples of prompts."""
    which, counts = _resample(prompts, seed)
    means = counts @ np.bincount(which, values) / (counts @ np.bincount(which))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Return the log-strengths of models, float64 [..., models] of mean 0, from wins [..., models,
    models] of the row over the column.

    Half a win is added to both sides of each pair, so that a model that never loses is finite. The
    iteration is the MM algorithm of Hunter, "MM algorithms for generalized Bradley-Terry models",
    Annals of Statistics 32 (2004), equation 3, repeated until nothing changes by 1e-9.
    """
    size = wins.shape[-1]
    wins = wins + 0.5 * (1 - np.eye(size))
    games = wins + np.swapaxes(wins, -1, -2)
    total, strength = wins.sum(axis=-1), np.ones(wins.shape[:-1])
    for _ in range(10_000):
        rates = games / (strength[..., :, None] + strength[..., None, :])
        new = total / rates.sum(axis=-1)
        new /= np.exp(np.log(new).mean(axis=-1, keepdims=True))
        done = np.abs(new - strength).max() < 1e-9
        strength = new
        if done:
            break
    return np.log(strength)


def strengths(sheet: Sheet, found: Sequence[Comparison], seed: int) -> list[dict[str, Any]]:
    """Return the models by their strength, in Elo points around 0, over all criteria; the criteria
    of one rating count as one comparison together."""
    size = len(sheet.models)
    if size < 2 or not found:
        return []
    which, counts = _resample([one.prompt for one in found], seed)
    wins = np.zeros((counts.shape[1], size, size))  # of each prompt
    for number, one in zip(which, found, strict=True):
        wins[number, one.first, one.second] += one.won / len(CRITERIA)
        wins[number, one.second, one.first] += (1 - one.won) / len(CRITERIA)
    samples = np.tensordot(counts, wins, 1)
    points = _ELO * bradley_terry(np.concatenate([wins.sum(axis=0)[None], samples]))
    low, high = np.percentile(points[1:], [2.5, 97.5], axis=0)
    rows = [
        {"model": name, "elo": float(points[0, at]), "low": float(low[at]), "high": float(high[at])}
        for at, name in enumerate(sheet.models)
    ]
    return sorted(rows, key=lambda row: -row["elo"])


def agreement(sheet: Sheet, raters: Sequence[Rater]) -> dict[str, float | None]:
    """Return Krippendorff's alpha of each criterion, of ordered marks; None where it is not
    defined: nothing was rated by two, or all marks are the same."""
    try:
        import krippendorff
    except ImportError as error:
        what = "krippendorff is not installed, and --rates needs it"
        raise UsageError(what, str(error), pip_install("rate")) from None
    found: dict[str, float | None] = {}
    for name in CRITERIA:
        items = items_of(sheet)
        rows = [[one.marks.get(item.id, {}).get(name, np.nan) for item in items] for one in raters]
        marks = np.array(rows, np.float64).reshape(len(raters), len(items))
        shared = marks[:, (~np.isnan(marks)).sum(axis=0) >= 2]
        several = len(np.unique(shared[~np.isnan(shared)])) > 1
        found[name] = (
            float(krippendorff.alpha(shared, level_of_measurement="ordinal")) if several else None
        )
    return found


def disagreements(sheet: Sheet, raters: Sequence[Rater]) -> list[dict[str, Any]]:
    """Return where marks are 2 or more apart: one prefers the first answer and one the second, or
    scores differ; the farthest first."""
    rows = []
    for item, name in itertools.product(items_of(sheet), CRITERIA):
        marks = {one.label: one.marks[item.id][name] for one in raters if item.id in one.marks}
        if marks and (apart := max(marks.values()) - min(marks.values())) >= 2:
            rows.append((apart, item, name, marks))
    rows.sort(key=lambda row: -row[0])
    return [_disagreement(sheet, item, name, marks) for _, item, name, marks in rows]


def _disagreement(sheet: Sheet, item: Item, name: str, marks: Mapping[str, int]) -> dict[str, Any]:
    shown = {
        rater: mark
        if sheet.scale != AB
        else (*(sheet.models[m] for m in item.models), "same")[{1: 0, -1: 1, 0: 2}[mark]]
        for rater, mark in marks.items()
    }
    models = [sheet.models[one] for one in item.models]
    return {
        "item": item.id, "criterion": name, "prompt": item.prompt, "models": models, "marks": shown
    }  # fmt: skip
