"""The flags of `python -m train.augment`. Imports no jax."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from glm2_jax.cli.arguments import number, path_argument, positive, random_seed, whole
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.parser import flag
from glm2_jax.datasets import FORMATS, PREFERENCE

TYPO, HOMOPHONE, WIDTH, SCRIPT = "typo", "homophone", "width", "script"
TEMPLATE, SYNONYM, SWAP, DELETE = "template", "synonym", "swap", "delete"
PARAPHRASE, BACK_TRANSLATION = "paraphrase", "back-translation"
WITH_MODEL = (PARAPHRASE, BACK_TRANSLATION)
METHODS = (TYPO, HOMOPHONE, WIDTH, SCRIPT, TEMPLATE, SYNONYM, SWAP, DELETE, *WITH_MODEL)
LOW, HIGH = 0.2, 0.9  # of --similarity
_MOST = 0.5  # of a text that changes


def methods(text: str) -> tuple[str, ...]:
    """Parse methods such as "typo,template" for argparse."""
    found = tuple(dict.fromkeys(name.strip().replace("_", "-") for name in text.split(",")))
    unknown = [name for name in found if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown method {unknown[0]!r}; known: {', '.join(METHODS)}"
        )
    return found


def share(text: str, most: float = 1.0) -> float:
    """Parse a number from 0 to `most` for argparse."""
    if (value := number(text)) > most:
        raise argparse.ArgumentTypeError(f"must be at most {most:g}, got {text!r}")
    return value


@dataclass(frozen=True)
class DataOptions:
    """The rows to augment."""

    data: Sequence[str] = flag(
        "rows to augment, in every format that train.lora and train.preference read; - is standard "
        "input; may be repeated",
        type=path_argument, action="append", required=True, metavar="FILE",
    )  # fmt: skip
    format: str = flag(
        "format of --data, as in train.lora; auto = by the keys of each row",
        choices=("auto", *FORMATS, PREFERENCE), default="auto",
    )  # fmt: skip
    max_bad: int = flag("leave out up to N bad rows", type=whole, default=0, metavar="N")


@dataclass(frozen=True)
class MethodOptions:
    """How new wordings are made."""

    methods: Sequence[str] = flag(
        "typo = letters swapped, dropped, repeated; homophone = characters of the same sound; "
        "width = full and half width; script = simplified and traditional; template = the question "
        "in other words around it; synonym, swap, delete = words replaced, swapped, left out; "
        "paraphrase, back-translation = by --model. All but typo, width, template and those by "
        "--model need the extra augment",
        type=methods, default=f"{TYPO},{TEMPLATE}", metavar="A,B,...",
    )  # fmt: skip
    per_row: int = flag(
        "new rows for each row, by the methods in turn", type=positive, default=2, metavar="N"
    )
    rate: float = flag(
        f"share of the characters (typo, homophone) or words (synonym, swap, delete) to change, at "
        f"least one of each text, up to {_MOST:g}",
        type=partial(share, most=_MOST), default=0.1, metavar="X",
    )  # fmt: skip
    templates: str | None = flag(
        "templates, one a line, {} is the question (default: 23 bundled, Chinese and English)",
        type=path_argument, metavar="FILE",
    )  # fmt: skip
    synonyms: str | None = flag(
        "synonyms, a line of words of one meaning separated by commas (default: a small bundled "
        "table)",
        type=path_argument, metavar="FILE",
    )  # fmt: skip
    seed: int = flag("random seed; the same seed gives the same rows", type=random_seed, default=0,
                     metavar="N")  # fmt: skip


@dataclass(frozen=True)
class AnswerOptions:
    """How a model writes, and what of it is kept."""

    similarity: Sequence[float] | None = flag(
        "keep what the model writes only if it has at least LOW and at most HIGH of its pairs of "
        f"neighboring characters in common with the question (default: {LOW} {HIGH})",
        type=share, nargs=2, metavar=("LOW", "HIGH"),
    )  # fmt: skip
    temperature: float = flag("sampling temperature", type=number, default=0.8, metavar="X")
    top_p: float = flag("nucleus sampling", type=share, default=0.8, metavar="X")
    max_new_tokens: int = flag("longest answer", type=positive, default=256, metavar="N")
    batch_size: int = flag("rows per batch", type=positive, default=8, metavar="N")


@dataclass(frozen=True)
class OutputOptions:
    """Where the rows go."""

    output: str | None = flag(
        "JSON lines: the rows of --data, then the new ones, each with its origin; - is standard "
        "output",
        short=("-o",), type=path_argument, metavar="FILE.jsonl",
    )  # fmt: skip
    overwrite: bool = flag("replace --output", action="store_true")
    dry_run: bool = flag(
        "show what becomes of the first five rows, and write nothing", action="store_true"
    )
    json: bool = flag("print the report as one JSON object", action="store_true")


@dataclass(frozen=True, kw_only=True)
class Settings(DataOptions, MethodOptions, AnswerOptions, OutputOptions):
    """All flags of the command."""

    choice: ModelChoice
    options: EngineOptions
