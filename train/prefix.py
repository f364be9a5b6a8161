"""`python -m train.prefix`: trains a P-Tuning v2 prefix of a model whose parameters stay frozen."""

import argparse
import dataclasses
from collections.abc import Sequence

from glm2_jax.cli import interrupt
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags
from train.command import make_parser, start
from train.options import PrefixOptions
from train.recipe import Recipe

LR = 2e-2
STEPS, MICRO_BATCHES = 3000, 16
PROG = "python -m train.prefix"
DESCRIPTION = f"""Trains a P-Tuning v2 prefix: keys and values that every layer reads before the
text.

The defaults are those of the official recipe: {STEPS} steps of {MICRO_BATCHES} rows, one per
micro-batch, a linear decay without warm-up.

At the end --output holds the prefix as the official training saves it, for --prefix of
infer.generate, infer.chat and infer.evaluate, and the checkpoints for --resume auto.

Exit codes are those of train.lora."""
EXAMPLE = f"""{PROG} --data data.jsonl --model chatglm2-6b --quantize-base int4 --output prefix
  {PROG} --data data.jsonl --steps 300 --grad-accum 1 --batch-size 4 --output prefix"""
# What differs from the defaults of `TrainingOptions`, or is not chosen by data and model.
CHANGES = {
    "lr": {"help": "highest learning rate", "default": LR},
    "schedule": {"default": "linear"},
    "warmup": {"default": 0.0},
    "batch_size": {"default": 1},
    "grad_accum": {"help": "micro-batches per optimizer step", "default": MICRO_BATCHES},
    "epochs": {"help": "passes over the data, instead of --steps"},
    "steps": {"help": f"optimizer steps (default: {STEPS})"},
}


def parser() -> Parser:
    """Return the parser of the command."""
    adapter = ("prefix", PrefixOptions)
    return make_parser(
        PROG, DESCRIPTION, EXAMPLE, output="prefix", adapter=adapter, changes=CHANGES
    )


def make_recipe(args: argparse.Namespace) -> Recipe:
    """Return the settings that the flags of this command give."""
    adapter = from_flags(PrefixOptions, args)
    choice = from_flags(ModelChoice, args, quantize=args.quantize_base)
    found = from_flags(Recipe, args, command=PROG, default_lr=LR, adapter=adapter, choice=choice)
    if found.training.steps is None and found.training.epochs is None:
        training = dataclasses.replace(found.training, steps=STEPS)
        found = dataclasses.replace(found, training=training)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; raises GLMError for what the user can fix."""
    return start(parser(), argv, make_recipe, "PrefixMethod")


if __name__ == "__main__":
    interrupt.run(main)
