"""`python -m train.full`: fine-tunes all parameters of a model."""

import sys
from collections.abc import Sequence

from glm2_jax.cli import interrupt
from glm2_jax.cli.flags import add_model_options
from glm2_jax.cli.parser import Parser
from glm2_jax.processes.join import add_host_options
from train import options, recipe
from train.data.options import add_data_options
from train.lora import start

PROG = "python -m train.full"
DESCRIPTION = """Fine-tunes all parameters of a model, in float32 with AdamW: 16 bytes a parameter
and the activations. For small models; a 6B one takes train.lora. --output/model is the new model,
beside it what --resume auto needs. Exit codes as those of train.lora."""
EXAMPLE = f"{PROG} --data data.jsonl --model SMALL --output trained"


def parser() -> Parser:
    """The flags of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    recipe.add_config_flag(result)
    add_model_options(result)
    add_data_options(result)
    options.add_training_options(result, lr=1e-5, remat=False)
    options.add_evaluation_options(result)
    add_host_options(result)
    options.add_output_options(result, "trained")
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, raises GLMError for what the user can mend."""
    return start(parser(), sys.argv[1:] if argv is None else argv, "FullMethod")


if __name__ == "__main__":
    interrupt.run(main)
