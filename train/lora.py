"""`python -m train.lora`: fine-tunes a LoRA adapter of a model whose parameters stay frozen."""

import argparse
import dataclasses
from collections.abc import Sequence

from glm2_jax.cli import interrupt
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags
from train.command import make_parser, start
from train.options import NEW_ADAPTER, AdapterOptions
from train.recipe import Recipe

LR = 5e-5
ADAPTER = ("adapter", AdapterOptions)
PROG = "python -m train.lora"
DESCRIPTION = """Fine-tunes a LoRA adapter.

At the end --output holds an adapter in the format of PEFT, for --adapter of infer.generate,
infer.chat and infer.evaluate, and the checkpoints for --resume auto, which continues a stopped
run with bit-identical results.

Exit codes: 0 success, 2 usage, 3 bad data, or a loss that is not finite or diverges, 4 model or
checkpoint, 5 out of memory or device, 130 interrupted, 143 terminated (both after saving)."""
EXAMPLE = f"""{PROG} --data data.jsonl --model chatglm2-6b --output adapter
  {PROG} --data data.jsonl --model chatglm2-6b --output adapter --resume auto
  {PROG} --data data.jsonl --check-data"""


def parser() -> Parser:
    """Return the parser of the command."""
    return make_parser(PROG, DESCRIPTION, EXAMPLE, lr=LR, output="adapter", adapter=ADAPTER)


def make_recipe(args: argparse.Namespace) -> Recipe:
    """Return the settings that the flags of this command give."""
    adapter = from_flags(AdapterOptions, args)
    if adapter.init_adapter is None:
        unset = {name: x for name, x in NEW_ADAPTER.items() if getattr(adapter, name) is None}
        adapter = dataclasses.replace(adapter, **unset)
    choice = from_flags(ModelChoice, args, quantize=args.quantize_base)
    return from_flags(Recipe, args, command=PROG, default_lr=LR, adapter=adapter, choice=choice)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; raises GLMError for what the user can fix."""
    return start(parser(), argv, make_recipe, "AdapterMethod")


if __name__ == "__main__":
    interrupt.run(main)
