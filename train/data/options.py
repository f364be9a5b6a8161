"""Flags that say what is learned. Needs no jax before a dataset is opened."""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import TYPE_CHECKING

from glm2_jax.cli.arguments import path_argument, positive, whole
from glm2_jax.cli.messages import Progress, human_size, note
from glm2_jax.cli.parser import Parser
from infer.datasets import FORMATS

if TYPE_CHECKING:
    from convert import Checkpoint
    from train.data.dataset import Dataset

MAX_LENGTH = 2048


def add_data_options(parser: Parser) -> None:
    """Which rows are learned, and how they are laid out."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        "--data", type=data_argument, action="append", required=True, metavar="FILE[=WEIGHT]",
        help="JSON lines, a JSON array, .csv, .tsv or Parquet (with pyarrow), UTF-8, also as .gz; "
        "may be given again; a weight is how often an epoch has each row of the file, 0.5 = every "
        "other",
    )  # fmt: skip
    add(
        "--format", choices=("auto", *FORMATS), default="auto",
        help="of --data: alpaca: instruction, input, output, history, system; sharegpt: "
        "conversations of from and value; messages: role and content; adgen: content, summary; "
        "prompt: prompt, response, history; auto: by the keys of a file's first rows. Other files "
        "are read by their keys; where those are of several formats, this one counts there, too",
    )  # fmt: skip
    add(
        "--max-length", type=positive, metavar="N",
        help=f"most tokens of a sequence; longer ones are bad rows, nothing is cut (default: "
        f"{MAX_LENGTH}, or what the model has)",
    )  # fmt: skip
    add(
        "--max-bad", type=whole, default=0, metavar="N",
        help="go on without bad rows where there are no more than N",
    )  # fmt: skip
    add(
        "--train-on-prompt", action="store_true",
        help="learn questions, too, not only answers and their end",
    )  # fmt: skip
    add(
        "--pack", action="store_true",
        help="several sequences in a row of --max-length tokens; none sees the others",
    )  # fmt: skip
    add(
        "--no-shuffle", action="store_true",
        help="rows in the order of the files, never regrouped",
    )  # fmt: skip
    add(
        "--mix-data", type=path_argument, metavar="FILE",
        help="general rows to mix in, so that the model does not forget",
    )  # fmt: skip
    add(
        "--mix-ratio", type=share_argument, metavar="X",
        help="the part of an epoch that they are (default: 0.1)",
    )  # fmt: skip
    add(
        "--data-cache", type=path_argument, metavar="DIR|off",
        help="where the lengths of large files' rows are kept, so that they are encoded once "
        "(default: the user's cache folder)",
    )  # fmt: skip
    add(
        "--check-data", action="store_true",
        help="read everything, say what is in it and what is wrong with it, and stop; exit code "
        "3 if there are bad rows",
    )  # fmt: skip
    add(
        "--print-sample", type=positive, metavar="N",
        help="show the tokens of the first N sequences, with what is learned marked",
    )  # fmt: skip


def open_dataset(
    args: argparse.Namespace, checkpoint: Checkpoint, other: str | None = None
) -> Dataset:
    """Opens what the flags of `add_data_options` name.

    With `--check-data` any number of bad rows is taken: they are what is asked for.

    Args:
        args: the flags.
        checkpoint: anything with `tokenizer`, `template` and `config` of the model.
        other: a file to open instead of those, such as `--val-data`. Its format is found out;
            where its rows have the keys of several, `--format` counts.

    Raises:
        InputError: bad data. UsageError: flags that make no sense.
    """
    from glm2_jax.cli.arguments import check_plot
    from glm2_jax.errors import UsageError
    from train.data.cache import ScanCache
    from train.data.dataset import Dataset

    if args.check_data and args.plot is not None:
        check_plot(args.plot)
    longest = checkpoint.config.seq_length
    max_length = min(MAX_LENGTH, longest) if args.max_length is None else args.max_length
    if max_length > longest:
        raise UsageError(f"--max-length {max_length} is more than the {longest} of the model")
    if args.mix_ratio is not None and args.mix_data is None:
        raise UsageError("--mix-ratio needs --mix-data", fix="name the file of general rows")
    files = [split_weight(text) for text in args.data] if other is None else [(other, 1.0)]
    ratio = 0.1 if args.mix_ratio is None else args.mix_ratio
    with Progress("reading data", show=human_size) as bar:
        return Dataset.open(
            [path for path, _ in files],
            tokenizer=checkpoint.tokenizer,
            template=checkpoint.template,
            max_length=max_length,
            fmt=args.format if other is None else "auto",
            preferred=None if args.format == "auto" else args.format,
            train_on_prompt=args.train_on_prompt,
            max_bad=None if args.check_data else args.max_bad,
            cache=ScanCache(args.data_cache, note),
            weights=[weight for _, weight in files],
            mix=None if args.mix_data is None or other is not None else (args.mix_data, ratio),
            on_note=note,
            progress=bar.update,
        )


def look_at(args: argparse.Namespace, dataset: Dataset) -> int | None:
    """Does what `--check-data` and `--print-sample` ask for, on standard output.

    Returns:
        The exit code of a run that ends with `--check-data`; None without.
    """
    from train.data.check import check, draw, print_sample

    if args.print_sample is not None:
        print(print_sample(dataset, args.print_sample))
    if not args.check_data:
        return None
    with Progress("comparing rows") as bar:
        report = check(dataset, bar.update)
    print(report.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    if args.plot is not None:
        draw(report, args.plot)
    return report.exit_code


def data_argument(text: str) -> str:
    """An argparse type: FILE or FILE=WEIGHT; the text stays as it is, for a recipe."""
    path, weight = split_weight(path_argument(text))
    if not path.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    if not 0 < weight < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: a weight is a number above 0")
    return text


def split_weight(text: str) -> tuple[str, float]:
    """FILE[=WEIGHT] in its two parts; what follows the last = and is no number is of the name."""
    path, equals, weight = text.rpartition("=")
    try:
        return (path, float(weight)) if equals else (text, 1.0)
    except ValueError:
        return text, 1.0


def share_argument(text: str) -> float:
    """An argparse type: a number above 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1")
    return value
