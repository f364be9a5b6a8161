"""The flags of `python -m infer.lab`. No jax here."""

import argparse
import re
from dataclasses import dataclass

from glm2_jax.cli.arguments import path_argument, positive, whole
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.parser import flag
from glm2_jax.extras import pip_install


def _assignment(text: str) -> tuple[str, str]:
    """Parse NAME=VALUE, for argparse."""
    found = re.fullmatch(r"((?:[^=]+\.)?[^\W\d]\w*)=(.*)", text, re.DOTALL)  # a stem is any text
    if found is None:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return found[1], found[2]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of the command."""

    ideas: tuple[str, ...]
    choice: ModelChoice
    options: EngineOptions
    given: list[tuple[str, str]] | None = flag(
        "an option of the ideas, a keyword argument of their function `idea`; STEM.NAME=VALUE for "
        "the file STEM.py alone; may be repeated",
        name="set", type=_assignment, action="append", metavar="NAME=VALUE",
    )  # fmt: skip
    prompts: str | None = flag(
        "plain text, or rows as infer.evaluate reads them (default: 45 bundled questions with "
        "answers that are new to the demo model)",
        type=path_argument, metavar="F",
    )  # fmt: skip
    max_bad: int = flag("bad rows that may be left out", type=whole, default=0, metavar="N")
    batch_size: int = flag("rows per batch", type=positive, default=8, metavar="N")
    context: int = flag(
        "tokens in the cache when decode steps are timed and their bytes counted",
        type=positive, default=512, metavar="N",
    )  # fmt: skip
    steps: int = flag("steps per repetition", type=positive, default=16, metavar="N")
    repeat: int = flag("repetitions; the best one counts", type=positive, default=5, metavar="N")
    max_new_tokens: int = flag(
        "longest answer, where drafts are counted", type=positive, default=64, metavar="N"
    )
    json: bool = flag("print one JSON object instead of a table", action="store_true")
    plot: str | None = flag(
        f"draw quality against speed, .png, .svg or .pdf; needs {pip_install('plot')}",
        type=path_argument, metavar="F",
    )  # fmt: skip
