"""Flags that name the data of a training run. Imports no jax before a dataset is opened."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from glm2_jax.cli.arguments import path_argument, positive, whole
from glm2_jax.cli.messages import Progress, human_size, note
from glm2_jax.cli.parser import Parser
from infer.datasets import FORMATS

if TYPE_CHECKING:
    from convert.loading.folder import Folder
    from train.data.dataset import Dataset

MAX_LENGTH = 2048
MIX_RATIO = 0.1


@dataclass(frozen=True)
class DataOptions:
    """The flags of `add_data_options`, by their names."""

    data: Sequence[str]
    format: str
    max_length: int | None
    max_bad: int
    train_on_prompt: bool
    pack: bool
    no_shuffle: bool
    mix_data: str | None
    mix_ratio: float | None
    data_cache: str | None
    check_data: bool
    print_sample: int | None


def add_data_options(parser: Parser) -> None:
    """Add the flags for the rows to learn from and their layout."""
    add = parser.add_argument_group("data").add_argument
    add(
        "--data", type=data_argument, action="append", required=True, metavar="FILE[=WEIGHT]",
        help="training rows: JSON lines, a JSON array, .csv, .tsv or Parquet (with pyarrow), in "
        "UTF-8, also as .gz; may be repeated; WEIGHT is how often an epoch repeats each row of the "
        "file, 0.5 = every other row",
    )  # fmt: skip
    add(
        "--format", choices=("auto", *FORMATS), default="auto",
        help="keys of a row in --data: alpaca: instruction, input, output, history, system; "
        "sharegpt: conversations of from and value; messages: role and content; adgen: content, "
        "summary; prompt: prompt, response, history; auto: detect from the first rows of each "
        "file. In other files the format is detected; where their rows fit several, this one is "
        "used",
    )  # fmt: skip
    add(
        "--max-length", type=positive, metavar="N",
        help="longest sequence in tokens; longer ones are bad rows, nothing is truncated (default: "
        f"{MAX_LENGTH}, or the limit of the model)",
    )  # fmt: skip
    add("--max-bad", type=whole, default=0, metavar="N", help="leave out up to N bad rows")
    add(
        "--train-on-prompt", action="store_true",
        help="compute the loss on questions, too, not only on answers and end tokens",
    )  # fmt: skip
    add(
        "--pack", action="store_true",
        help="pack several sequences into a row of --max-length tokens; they do not attend to "
        "each other",
    )  # fmt: skip
    add(
        "--no-shuffle", action="store_true",
        help="keep rows in the order of the files, without grouping them by length",
    )  # fmt: skip
    add(
        "--mix-data", type=path_argument, metavar="FILE",
        help="general rows to mix in, against forgetting",
    )  # fmt: skip
    add(
        "--mix-ratio", type=share_argument, metavar="X",
        help=f"share of an epoch taken from --mix-data (default: {MIX_RATIO})",
    )  # fmt: skip
    add(
        "--data-cache", type=path_argument, metavar="DIR|off",
        help="cache for the sequence lengths of large files, so that they are tokenized only once "
        "(default: the user's cache folder)",
    )  # fmt: skip
    add(
        "--check-data", action="store_true",
        help="read all rows, report what they hold and what is wrong with them, and stop; exit "
        "code 3 if there are bad rows",
    )  # fmt: skip
    add(
        "--print-sample", type=positive, metavar="N",
        help="print the tokens of the first N sequences and mark those that are learned",
    )  # fmt: skip


def open_dataset(options: DataOptions, folder: Folder, other: str | None = None) -> Dataset:
    """Open the dataset that the flags name, with any number of bad rows for `--check-data`.

    Args:
        options: the flags.
        folder: the model: its tokenizer, template and context length are used.
        other: a file to open instead of `--data`, such as `--val-data`.

    Raises:
        InputError: bad data.
        UsageError: flags that contradict each other or the model.
    """
    from glm2_jax.errors import UsageError
    from train.data.cache import cached_scan
    from train.data.dataset import Dataset

    longest = folder.config.seq_length
    max_length = options.max_length or min(MAX_LENGTH, longest)
    if max_length > longest:
        raise UsageError(f"--max-length {max_length} is more than the {longest} of the model.")
    if options.mix_ratio is not None and options.mix_data is None:
        raise UsageError("--mix-ratio needs --mix-data.", fix="Name the file of general rows.")
    mix = None
    if options.mix_data is not None and other is None:
        mix = options.mix_data, options.mix_ratio or MIX_RATIO
    files = [split_weight(text) for text in options.data] if other is None else [(other, 1.0)]
    with Progress("reading data", show=human_size) as bar:
        return Dataset.open(
            [path for path, _ in files],
            tokenizer=folder.tokenizer,
            template=folder.template,
            max_length=max_length,
            fmt=options.format if other is None else "auto",
            preferred=None if options.format == "auto" else options.format,
            train_on_prompt=options.train_on_prompt,
            max_bad=None if options.check_data else options.max_bad,
            weights=[weight for _, weight in files],
            mix=mix,
            scan=partial(cached_scan, folder=options.data_cache, warn=note),
            on_note=note,
            progress=bar.update,
        )


def print_checks(options: DataOptions, dataset: Dataset, plot: str | None = None) -> int | None:
    """Print on standard output what `--check-data` and `--print-sample` ask for.

    Args:
        options: the flags.
        dataset: the rows.
        plot: picture of the lengths to draw with `--check-data`.

    Returns:
        The exit code of a run that ends with `--check-data`; None without that flag.
    """
    from train.data.check import check, draw, print_sample

    if options.print_sample is not None:
        print(print_sample(dataset, options.print_sample))
    if not options.check_data:
        return None
    with Progress("comparing rows") as bar:
        report = check(dataset, bar.update)
    print(report.text())
    if plot is not None and len(dataset):
        draw(dataset.lengths, dataset.max_length, plot)
    return report.exit_code


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


def share_argument(text: str) -> float:
    """Read a number above 0 and below 1 as an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and below 1, got {text!r}")
    return value
