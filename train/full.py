"""`python -m train.full`: fine-tunes all parameters of a model."""

import argparse
from collections.abc import Sequence

from glm2_jax.cli import interrupt
from glm2_jax.cli.parser import Parser, from_flags
from train.command import make_parser, start
from train.recipe import Recipe

LR = 1e-5
PROG = "python -m train.full"
DESCRIPTION = """Fine-tunes all parameters of a model, in float32 with AdamW.

This takes 16 bytes per parameter and the activations: it is for small models; use train.lora for
a 6B model. --output/model is the new model; the checkpoints for --resume auto are stored next to
it.

Exit codes are those of train.lora."""
EXAMPLE = f"{PROG} --data data.jsonl --model SMALL --output trained"


def parser() -> Parser:
    """Return the parser of the command."""
    return make_parser(PROG, DESCRIPTION, EXAMPLE, lr=LR, output="trained")


def make_recipe(args: argparse.Namespace) -> Recipe:
    """Return the settings that the flags of this command give."""
    return from_flags(Recipe, args, command=PROG, default_lr=LR, adapter=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; raises GLMError for what the user can fix."""
    return start(parser(), argv, make_recipe, "FullMethod")


if __name__ == "__main__":
    interrupt.run(main)
