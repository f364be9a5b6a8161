"""Pictures of a sweep: its history, the importance of its settings, parallel coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.sweep.space import Range, Space, text

PICTURES = ("history.png", "importance.png", "parallel.png")


def draw(found: dict[str, Any], space: Space, folder: Path) -> list[str]:
    """Draw the pictures of a summary for which there are figures, and return their paths."""
    complete = [one for one in found["trials"] if one["value"] is not None]
    figures = (
        _history(found, complete),
        _importance(found["importance"]) if found["importance"] else None,
        _parallel(found, complete, space) if len(complete) > 1 else None,
    )
    paths = []
    for name, figure in zip(PICTURES, figures, strict=True):
        path = folder / name
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        figure.savefig(path, dpi=150)
        paths.append(str(path))
    return paths


def _history(found: dict[str, Any], complete: Sequence[dict[str, Any]]) -> Figure:
    """Every trial in the order of their numbers, and the best so far."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    own = sorted(complete, key=lambda one: one["number"])
    numbers, values = [x["number"] for x in own], [x["value"] for x in own]
    errors = [x["standard_error"] or 0 for x in own]
    axes.errorbar(numbers, values, errors, fmt="o", capsize=3, label="complete")
    best = list(accumulate(values, max if found["better"] == "higher" else min))
    axes.step(numbers, best, where="post", label="best so far")
    for state in ("pruned", "fail"):
        others = [x["number"] for x in found["trials"] if x["state"] == state]
        if others:
            low = axes.get_ylim()[0]
            axes.plot(others, [low] * len(others), "x", color="0.6", clip_on=False, label=state)
    axes.set(xlabel="trial", ylabel=found["metric"], title=f"{found['search']} search")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, alpha=0.3)
    axes.legend()
    return figure


def _importance(importance: dict[str, float]) -> Figure:
    """A bar for each setting, the most important at the top."""
    figure = Figure(figsize=(8, 1 + 0.5 * len(importance)), layout="constrained")
    axes = figure.subplots()
    names = sorted(importance, key=lambda name: importance[name])
    bars = axes.barh(names, [importance[name] for name in names])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(xlabel="importance (PED-ANOVA)", xlim=(0, 1.1 * max(1e-9, *importance.values())))
    return figure


def _parallel(found: dict[str, Any], complete: Sequence[dict[str, Any]], space: Space) -> Figure:
    """A line for each complete trial through its settings to its value; the best are darkest."""
    figure = Figure(figsize=(3 + 1.6 * len(space), 5.5), layout="constrained")
    axes = figure.subplots()
    columns = [_places(space[name], [x["settings"][name] for x in complete]) for name in space]
    values = [x["value"] for x in complete]
    low, high = min(values), max(values)
    ends = [(place, f"{value:.4g}") for place, value in ((0.0, low), (1.0, high))]
    columns.append(([(x - low) / (high - low or 1) for x in values], ends))
    colors = colormaps["viridis"]
    best = high if found["better"] == "higher" else low
    for at, value in reversed(list(enumerate(values))):
        line = [places[at] for places, _ in columns]
        away = abs(value - best) / (high - low or 1)
        axes.plot(line, color=colors(0.95 * away), linewidth=1 + 2 * (1 - away))
    for column, (_, marks) in enumerate(columns):
        axes.axvline(column, color="0.3", linewidth=0.8)
        for place, label in marks:
            axes.annotate(label, (column, place), xytext=(4, 0), textcoords="offset points")
    axes.set_xticks(range(len(columns)), [*space, found["metric"]])
    axes.set_yticks([])
    axes.set(title="complete trials, the best darkest", xlim=(-0.1, len(columns) - 0.6))
    axes.spines[:].set_visible(False)
    return figure


def _places(axis: Any, values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Return where values are on an axis from 0 to 1, and its marks with their labels."""
    if isinstance(axis, Range):
        scale = LogNorm if axis.log else Normalize
        norm = scale(axis.low, axis.high)
        marks = [(0.0, text(axis.low)), (1.0, text(axis.high))]
        return [float(norm(value)) for value in values], marks
    last = max(len(axis.values) - 1, 1)
    where = {value: number / last for number, value in enumerate(axis.values)}
    return [where[value] for value in values], [(at, value) for value, at in where.items()]
