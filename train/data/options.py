"""Flags that name the data of a training run. Imports no jax."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from glm2_jax.cli.arguments import above_zero, path_argument, positive, whole
from glm2_jax.cli.parser import flag
from glm2_jax.datasets import FORMATS, TEXT

MAX_LENGTH = 2048
MIX_RATIO = 0.1


def data_argument(text: str) -> str:
    """Check FILE or FILE=WEIGHT as an argparse type; the text stays as it is, for a recipe."""
    path, weight = split_weight(path_argument(text))
    if not path.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    if not 0 < weight < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: a weight must be a number above 0")
    return text


def split_weight(text: str) -> tuple[str, float]:
    """Split FILE[=WEIGHT]; text after the last = that is not a number belongs to the name."""
    path, equals, weight = text.rpartition("=")
    try:
        return (path, float(weight)) if equals else (text, 1.0)
    except ValueError:
        return text, 1.0


@dataclass(frozen=True)
class DataOptions:
    """The rows to learn from, and their layout."""

    data: Sequence[str] = flag(
        "training rows: JSON lines, a JSON array, .csv, .tsv or Parquet (with pyarrow), in UTF-8, "
        "also as .gz; may be repeated; WEIGHT is how often an epoch repeats each row of the file, "
        "0.5 = every other row",
        type=data_argument, action="append", required=True, metavar="FILE[=WEIGHT]",
    )  # fmt: skip
    format: str = flag(
        "keys of a row in --data: alpaca: instruction, input, output, history, system; sharegpt: "
        "conversations of from and value; messages: role and content; adgen: content, summary; "
        "prompt: prompt, response, history; text: plain text, a .txt file or rows with text, for "
        "continued pre-training; auto: detect one of the others from the first rows of each file. "
        "In other files the format is detected; where their rows fit several, this one is used",
        choices=("auto", *FORMATS, TEXT), default="auto",
    )  # fmt: skip
    max_length: int | None = flag(
        "longest sequence in tokens; longer ones are bad rows, nothing is truncated (default: "
        f"{MAX_LENGTH}, or the limit of the model)",
        type=positive, metavar="N",
    )  # fmt: skip
    stride: int | None = flag(
        "with --format text: tokens between the starts of two sequences of a text; those that the "
        "next one repeats are only its context (default: no overlap)",
        type=positive, metavar="N",
    )  # fmt: skip
    max_bad: int = flag("leave out up to N bad rows", type=whole, default=0, metavar="N")
    train_on_prompt: bool = flag(
        "compute the loss on questions, too, not only on answers and end tokens",
        action="store_true",
    )
    pack: bool = flag(
        "pack several sequences into a row of --max-length tokens; they do not attend to each "
        "other; --format text always does",
        action="store_true",
    )
    no_shuffle: bool = flag(
        "keep rows in the order of the files, without grouping them by length",
        action="store_true",
    )
    mix_data: str | None = flag(
        "general rows to mix in, against forgetting", type=path_argument, metavar="FILE"
    )
    mix_ratio: float | None = flag(
        f"share of an epoch taken from --mix-data (default: {MIX_RATIO})",
        type=above_zero, metavar="X",
    )  # fmt: skip
    data_cache: str | None = flag(
        "cache for the sequence lengths of large files, so that they are tokenized only once "
        "(default: the user's cache folder)",
        type=path_argument, metavar="DIR|off",
    )  # fmt: skip

    check_data: bool = flag(
        "read all rows, report what they hold, what is wrong with them and what validation shares "
        "with them, and stop; exit code 3 if there are bad rows",
        action="store_true",
    )
    print_sample: int | None = flag(
        "print the tokens of the first N sequences and mark those that are learned",
        type=positive, metavar="N",
    )  # fmt: skip

    @property
    def packs(self) -> bool:
        """Whether rows hold several sequences."""
        return self.pack or self.format == TEXT
