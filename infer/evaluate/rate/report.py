"""The figures of all ratings, as JSON and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from glm2_jax.cli.tables import columns, fold, table
from glm2_jax.errors import InputError
from glm2_jax.escape import escape_controls
from infer.evaluate.rate.figures import (
    agreement,
    compare,
    disagreements,
    items_of,
    mean_scores,
    strengths,
    win_rates,
)
from infer.evaluate.rate.ratings import MODEL, PERSON, Rater, attention
from infer.evaluate.rate.sheet import AB, Sheet

_SHOWN = 10  # disagreements on a terminal
_TITLES = {
    "raters": "raters",
    "mean_scores": "mean scores, with 95 % bootstrap intervals over prompts",
    "win_rates": "win rates; the same = half a win; 95 % bootstrap intervals over prompts",
    "strengths": "Bradley-Terry strengths in Elo points, with 95 % bootstrap intervals",
}
_PERCENT = ("win_rate", "low", "high")


def result(sheet: Sheet, raters: Sequence[Rater], drop: bool, seed: int) -> dict[str, Any]:
    """Return all figures: for people together, and for each model that rated.

    With `drop`, inattentive raters count nowhere. InputError: no rater is left.
    """
    rows, kept = [], []
    for rater in raters:
        seen = attention(sheet, rater)
        dropped = drop and seen.inattentive
        kept += [] if dropped else [rater]
        done = sum(item.id in rater.marks for item in items_of(sheet))
        rows.append(
            {
                "rater": rater.name,
                "kind": rater.kind,
                "rated": done,
                **asdict(seen),
                "inattentive": seen.inattentive,
                "left_out": dropped,
            }
        )
    if not any(rater.marks for rater in kept):
        raise InputError("no ratings are left", "All raters were left out, or rated nothing.")
    people = [rater for rater in kept if rater.kind == PERSON]
    groups = [("people", people)] if people else []
    groups += [(rater.label, [rater]) for rater in kept if rater.kind == MODEL]
    found = []
    for name, own in groups:
        compared = compare(sheet, own)
        scores = {} if sheet.scale == AB else {"mean_scores": mean_scores(sheet, own, seed)}
        found.append(
            {"by": name}
            | scores
            | {
                "win_rates": win_rates(sheet, compared, seed),
                "strengths": strengths(sheet, compared, seed),
            }
        )
    return {
        "task": "rate",
        "sheet": sheet.id,
        "scale": sheet.scale,
        "models": list(sheet.models),
        "items": len(items_of(sheet)),
        "identical_pairs": sheet.identical,
        "raters": rows,
        "results": found,
        "alpha_people": agreement(sheet, people),
        "alpha_all": agreement(sheet, kept),
        "disagreements": disagreements(sheet, kept),
    }


def report(found: Mapping[str, Any]) -> list[str]:
    """Return the lines that show the figures."""
    lines = [f"sheet {found['sheet']}: {found['items']} items, scale {found['scale']}"]
    lines += _rows("raters", found["raters"])
    if found["raters"] and any(r["inattentive"] and not r["left_out"] for r in found["raters"]):
        lines.append("inattentive raters count; --drop-inattentive leaves them out")
    for group in found["results"]:
        for kind in _TITLES:
            lines += _rows(kind, group.get(kind, ()), f" (by {group['by']})")
    lines += ["", "Krippendorff's alpha, ordinal: 1 = raters agree, 0 = as by chance"]
    alphas = [("criterion", "people", "people and models")]
    for name, people in found["alpha_people"].items():
        alphas.append((name, _alpha(people), _alpha(found["alpha_all"][name])))
    lines += table(alphas, texts=1)
    listed = found["disagreements"]
    lines += ["", f"disagreements: {len(listed)}{_more(len(listed))}"]
    for one in listed[:_SHOWN]:
        marks = ", ".join(f"{rater}: {mark}" for rater, mark in one["marks"].items())
        prompt = one["prompt"] if len(one["prompt"]) <= 60 else one["prompt"][:59] + "…"
        line = f"{one['item']} {one['criterion']}, {prompt!r}: {marks}"
        lines += fold(escape_controls(line), columns())
    return lines


def _alpha(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _more(count: int) -> str:
    return f", of which {_SHOWN} are shown; --json has all" if count > _SHOWN else ""


def _rows(kind: str, rows: Sequence[Mapping[str, Any]], of: str = "") -> list[str]:
    """Return the lines of a table with its title, none without rows."""
    if not rows:
        return []
    texts = sum(isinstance(value, str) for value in rows[0].values())
    cells = [[name.replace("_", " ") for name in rows[0]]]
    for row in rows:
        cells.append([_cell(name, value, "win_rate" in row) for name, value in row.items()])
    return ["", _TITLES[kind] + of, *table(cells, texts)]


def _cell(name: str, value: Any, share: bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if share and name in _PERCENT:
        return f"{100 * value:.1f} %"
    return f"{value:.4g}" if isinstance(value, float) else escape_controls(str(value))
