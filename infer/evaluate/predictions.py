"""Files of answers (`--predictions`): JSON lines, as the official script writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glm2_jax.cli.files import cannot_write_file, real_path, replace_file, require_file_place
from glm2_jax.cli.interrupt import always
from glm2_jax.cli.messages import note
from glm2_jax.errors import InputError, UsageError
from glm2_jax.processes import join
from infer.evaluate.rows import BadRows, read_rows


def read_predictions(path: str, bad: BadRows) -> tuple[list[str], list[str]]:
    """Return the labels and the predictions of a file."""
    if not Path(path).exists():
        raise InputError(
            f"{path} not found, there is nothing to score",
            "Without --data, --predictions is a file of answers that is read.",
            "To write it, name the questions: --data F.",
        )

    def parse(where: str, row: Any) -> tuple[str, str]:
        row = row if isinstance(row, dict) else {}
        label, text = row.get("labels"), row.get("predict")
        if not isinstance(label, str) or not isinstance(text, str) or not label.strip():
            raise InputError("no prediction", 'write {"labels": "...", "predict": "..."}')
        return label, text

    found = bad.keep(read_rows(path), parse)
    bad.check(len(found))
    return [label for label, _ in found], [text for _, text in found]


def check_output(predictions: str | None, data: str | None, overwrite: bool) -> None:
    """Raise before any work if `--predictions` cannot be written."""
    if predictions is None or not join.is_first():
        return
    path = require_file_place(predictions)
    places = path, _partial(path)
    if data is not None and real_path(data) in places:
        raise UsageError(f"--predictions and --data are both {data}", fix="Name another file.")
    for place in places:
        if place.exists() and place.stat().st_size and not overwrite:
            raise UsageError(
                f"{place} exists already",
                "It holds the answers of another run, and only --overwrite replaces them.",
                "Name another file, or add --overwrite. Without --data it is read and scored.",
            )


def _partial(path: Path) -> Path:
    """Return the place of a file until it is complete."""
    return path.with_name(path.name + ".partial")


@contextmanager
def predictions_file(named: str | None) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """Give a function that writes a row: its number and an object.

    Each row is written to F.partial at once; when all are there, F gets them in the order of their
    numbers. After an interruption F.partial stays. Without a name, and in all but the first of
    several processes, nothing is written.
    """
    if named is None or not join.is_first():
        yield lambda number, row: None
        return
    path = real_path(named)
    partial, lines = _partial(path), dict[int, bytes]()

    def keep_partial() -> None:
        if lines and partial.exists():
            note(f"incomplete: {len(lines)} answers are in {partial}, which can be scored")
        else:
            partial.unlink(missing_ok=True)

    with always(keep_partial):
        with partial.open("wb", buffering=0) as file:

            def write(number: int, row: dict[str, Any]) -> None:
                line = left = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                complete = file.tell()
                try:
                    while left:
                        left = left[file.write(left) :]
                except OSError as error:
                    file.truncate(complete)
                    raise cannot_write_file(partial, error) from error
                lines[number] = line

            yield write
        replace_file(path, b"".join(lines[number] for number in sorted(lines)))
        partial.unlink()
    note(f"predictions are in {named}")
