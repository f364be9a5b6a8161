"""What a training says of itself: lines on stderr, an object a line in a file, a picture."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.cli import human_size, note
from glm2_jax.errors import InputError


class Log:
    """Lines for people, and JSON lines for programs. A context manager.

    Args:
        total: steps of the whole run.
        every: steps between two lines.
        path: of the JSON lines; None = none.
        taken: steps taken by an earlier run that goes on; what its file says of later ones, which
            were lost with it and are taken again, is cut off.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, total: int, *, every: int, path: str | None = None, taken: int = 0):
        self._total, self._every, self._first = total, every, taken
        self._last = time.perf_counter()
        self._seconds, self._tokens = 0.0, 0
        self._file = None
        if path is not None:
            try:
                _cut(Path(path), taken)
                self._file = open(path, "a", encoding="utf-8")
            except (OSError, ValueError) as error:
                raise InputError(f"{path} cannot be written", str(error)) from error

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def step(self, step: int, tokens: int, memory: int | None, **figures: float) -> None:
        """One step; says it where it is due.

        Args:
            step: from 1.
            tokens: how many it read, padding not counted.
            memory: most bytes used so far.
            **figures: loss, lr, grad_norm, ...
        """
        self._tokens += tokens
        if step % self._every and step != self._total:
            return
        now = time.perf_counter()
        rate = self._tokens / max(now - self._last, 1e-9)
        self._seconds += now - self._last
        left = self._seconds / (step - self._first) * (self._total - step)
        parts = [f"step {step}/{self._total}", *_texts(figures), f"{rate:.0f} tokens/s"]
        if memory:
            parts.append(f"memory {human_size(memory)}")
        note(", ".join([*parts, f"{_duration(left)} left"]))
        values = figures | {"tokens_per_second": rate, "memory_bytes": memory, "split": "train"}
        self._write(step=step, **values)
        self._last, self._tokens = now, 0

    def evaluation(self, step: int, split: str, **figures: float) -> None:
        """The figures of a set that is not trained on."""
        note(", ".join([f"  {split}", *_texts(figures)]))
        self._write(step=step, **figures, split=split)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """What is done inside takes no part in the rates: it is no step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._last += time.perf_counter() - start

    def _write(self, **values: Any) -> None:
        if self._file is None:
            return
        try:
            print(json.dumps(values), file=self._file, flush=True)
        except OSError as error:
            raise InputError(f"{self._file.name} cannot be written", str(error)) from error


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects of a log; a line that a kill has torn ends it."""
    result = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                result.append(json.loads(line))
            except ValueError:
                break
    return result


def _cut(path: Path, taken: int) -> None:
    """Leaves the lines of the first `taken` steps in a log."""
    kept = [line for line in read_log(path) if line["step"] <= taken] if path.exists() else []
    text = "".join(json.dumps(line) + "\n" for line in kept)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _texts(figures: Mapping[str, float]) -> list[str]:
    return [f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items()]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
