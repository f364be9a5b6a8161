"""The log of a training: lines on stderr, JSON lines in a file, and a picture of the losses."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from glm2_jax.cli.messages import human_size, note
from glm2_jax.errors import InputError


class Log:
    """Lines for people every few of `total` steps, and JSON lines, which are appended to a file. A
    context manager; `taken` are the steps of the earlier run that is resumed."""

    def __init__(self, total: int, *, every: int, path: str | os.PathLike, taken: int = 0):
        self._total, self._every, self._first = total, every, taken
        self._last = time.perf_counter()
        self._seconds, self._tokens = 0.0, 0
        self._pending: tuple[int, int | None, dict[str, float]] | None = None
        try:
            self._file = open(path, "a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{os.fspath(path)} cannot be written", str(error)) from error

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # a failed write was reported; closing tries it again
            self._file.close()

    def step(self, step: int, tokens: int, memory: int | None, **figures: float) -> None:
        """Record a step, from 1; print it where one is due: the first, the last and every few.

        `tokens` are those of the step without padding, `memory` the peak so far in bytes.
        """
        self._tokens += tokens
        self._pending = step, memory, figures
        if step == 1 or step % self._every == 0 or step == self._total:
            self.finish()

    def finish(self) -> None:
        """Print the latest step, if it is not printed yet."""
        if self._pending is None:
            return
        step, memory, figures = self._pending
        self._pending = None
        now = time.perf_counter()
        rate = self._tokens / max(now - self._last, 1e-9)
        self._seconds += now - self._last
        left = self._seconds / (step - self._first) * (self._total - step)
        parts = [f"step {step}/{self._total}", *_texts(figures), f"{rate:.0f} tokens/s"]
        if memory:
            parts.append(f"memory {human_size(memory)}")
        note(", ".join([*parts, f"{timedelta(seconds=round(left))} left"]))
        values = figures | {"tokens_per_second": rate, "memory_bytes": memory, "split": "train"}
        self._write(step=step, **values)
        self._last, self._tokens = now, 0

    def evaluation(self, step: int, split: str, **figures: float) -> None:
        """Record the figures of a set that is not trained on."""
        note(", ".join([f"  {split} after step {step}", *_texts(figures)]))
        self._write(step=step, **figures, split=split)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Leave the time of the block out of the rates: it is not a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._last += time.perf_counter() - start

    def _write(self, **values: Any) -> None:
        known = {  # JSON has no NaN and no infinity
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        try:
            print(json.dumps(known), file=self._file, flush=True)
        except OSError as error:
            raise InputError(f"{self._file.name} cannot be written", str(error)) from error


def _texts(figures: Mapping[str, float]) -> list[str]:
    return [f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items()]


def losses(found: Mapping[str, Sequence[Sequence[Any]]]) -> list[str]:
    """Return lines about how far each loss of `train.loop.Position` fell."""
    lines = []
    for name in sorted(found, key=lambda name: name != "training"):
        (before, first), (after, last) = found[name]
        fall = ""
        if first and last is not None:
            share = 100 * (1 - last / first)
            fall = f", {abs(share):.0f} % {'lower' if share >= 0 else 'higher'}"
        texts = ["not finite" if loss is None else f"{loss:.4g}" for loss in (first, last)]
        lines.append(f"{name} loss {' -> '.join(texts)} (step {before} -> {after}){fall}")
    return lines


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the objects of a log, up to a line that a kill has cut."""
    return [line for line, _ in _lines(path)]


def cut_log(path: str | os.PathLike, taken: int) -> None:
    """Remove the steps beyond the first `taken` from a log: they are taken again. InputError where
    the file holds something else."""
    if not Path(path).is_file():
        return
    try:
        kept = [end for line, end in _lines(path) if line["step"] <= taken]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{os.fspath(path)} is not the log of a training", fix="Name another --log-jsonl."
        ) from error
    os.truncate(path, max(kept, default=0))


def _lines(path: str | os.PathLike) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the objects, and where each ends in the file."""
    end = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield json.loads(line), end


def draw(lines: Sequence[dict[str, Any]], path: str) -> None:
    """Draw the losses of a log over the steps as .png, .svg or .pdf (extra `plot`)."""
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
