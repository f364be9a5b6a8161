"""`python -m train.preference`: an adapter that prefers chosen answers to rejected ones."""

import argparse
import dataclasses
from collections.abc import Sequence

from glm2_jax.cli import interrupt
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.datasets import PREFERENCE
from glm2_jax.errors import UsageError
from train import lora
from train.command import make_parser, start
from train.options import PreferenceOptions
from train.recipe import Recipe

LR = 5e-6
PROG = "python -m train.preference"
DESCRIPTION = """Trains a LoRA adapter by pairs of a chosen and a rejected answer: DPO, whose
reference is the model without the adapter, or ORPO, which needs none.

A row has chosen and rejected, and the question as prompt, instruction (with input, history and
system), conversations or messages.

The log has the margin, by which the model prefers the chosen answer, and the share of pairs in
which it does. The result, resuming and the exit codes are those of train.lora."""
EXAMPLE = f"""{PROG} --data pairs.jsonl --model chatglm3-6b --output adapter
  {PROG} --data pairs.jsonl --model chatglm3-6b --loss orpo --output adapter"""


# Flags that pairs have no use for stay known, for recipes, but are not listed.
UNUSED = ("train_on_prompt", "mix_data", "mix_ratio", "stride", "guard_data")
CHANGES = {
    "format": {"choices": (PREFERENCE,), "default": PREFERENCE, "help": argparse.SUPPRESS},
    **{name: {"help": argparse.SUPPRESS} for name in UNUSED},
    "dropout": {"default": 0.0},  # the reference has none, either
}


def parser() -> Parser:
    """Return the parser of the command."""
    return make_parser(
        PROG, DESCRIPTION, EXAMPLE, lr=LR, output="adapter", adapter=lora.ADAPTER,
        preference=PreferenceOptions, changes=CHANGES,
    )  # fmt: skip


def make_recipe(args: argparse.Namespace) -> Recipe:
    """Return the settings that the flags of this command give."""
    if wrong := [f"--{name.replace('_', '-')}" for name in UNUSED if vars(args)[name]]:
        raise UsageError(
            f"{', '.join(wrong)} cannot be used by train.preference.",
            "It learns from pairs of answers alone.",
            "Leave it out.",
        )
    found = lora.make_recipe(args)
    preference = from_flags(PreferenceOptions, args)
    return dataclasses.replace(found, command=PROG, default_lr=LR, preference=preference)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; raises GLMError for what the user can fix."""
    return start(parser(), argv, make_recipe, "AdapterMethod")


if __name__ == "__main__":
    interrupt.run(main)
