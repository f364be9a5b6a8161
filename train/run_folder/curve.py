"""Draws the loss curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def draw(lines: Sequence[dict[str, Any]], path: str) -> None:
    """Write a picture of the training, evaluation and guard loss over the steps.

    Args:
        lines: of `train.run_folder.log.read_log`.
        path: ends in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for split in dict.fromkeys(line["split"] for line in lines):
        own = [line for line in lines if line["split"] == split]
        marker = "" if len(own) > 60 else "."
        axes.plot([x["step"] for x in own], [x["loss"] for x in own], marker=marker, label=split)
    axes.set(xlabel="step", ylabel="loss (nats per learned token)", title="Loss")
    axes.grid(True, alpha=0.3)
    axes.legend()
    rates = [line for line in lines if "lr" in line]
    other = axes.twinx()
    other.plot([x["step"] for x in rates], [x["lr"] for x in rates], color="0.75", linewidth=1)
    other.set_ylabel("learning rate (grey)")
    figure.savefig(path, dpi=150)
