"""`python -m train.full`: fine-tunes all parameters of a model."""

import sys
from collections.abc import Sequence

from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import choose_platform, use_utf8
from glm2_jax.cli.flags import add_model_options
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.processes import join
from train import options, recipe
from train.data.options import add_data_options
from train.recipe import Recipe

LR = 1e-5
PROG = "python -m train.full"
DESCRIPTION = """Fine-tune all parameters of a model, in float32 with AdamW.

This takes 16 bytes per parameter and the activations: it is for small models; use train.lora for a
6B model. --output/model is the new model; the checkpoints for --resume auto are stored next to it.
Exit codes as those of train.lora."""
EXAMPLE = f"{PROG} --data data.jsonl --model SMALL --output trained"


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    recipe.add_config_flag(result)
    add_model_options(result)
    add_data_options(result)
    options.add_training_options(result, lr=LR, remat=False)
    options.add_evaluation_options(result)
    join.add_host_options(result)
    options.add_output_options(result, "trained")
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; raises GLMError for what the user can fix."""
    use_utf8()
    args = recipe.parse(parser(), sys.argv[1:] if argv is None else argv)
    choose_platform(args.device)
    with join.start(from_flags(join.Hosts, args), vars(args)):
        from train.methods import FullMethod
        from train.run import run

        settings = from_flags(Recipe, args, command=PROG, default_lr=LR, adapter=None)
        return run(settings, FullMethod)


if __name__ == "__main__":
    interrupt.run(main)
