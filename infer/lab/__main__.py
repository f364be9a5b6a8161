"""`python -m infer.lab`: try acceleration ideas, each a file of its own, on a model."""

import argparse
from collections.abc import Sequence
from typing import Any

from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.model_choice import add_model_options
from glm2_jax.cli.parser import Parser, add_flags, from_flags
from infer.lab.options import Settings
from infer.options import add_performance_options

PROG = "python -m infer.lab"
DESCRIPTION = """Measures acceleration ideas on a model, next to the model without them: perplexity
and distance of the logits on the same prompts, speed, and the bytes of a decode step and of the
cache. An idea is a Python file with a function `idea`, which is run: see docs/learn/lab.md, and
examples/lab for some. Results go to standard output, everything else to standard error.

Exit codes: 0 success, 2 usage, 3 bad input or data, 4 model or checkpoint, 5 out of memory or
device, 130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} examples/lab/layer_skip.py --set skip=2
  {PROG} examples/lab/*.py --plot lab.png
  {PROG} examples/lab/window_sinks.py --model chatglm2-6b --prompts dev.jsonl"""


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    result.add_argument(
        "ideas", nargs="+", type=path_argument, metavar="IDEA.py", help="files of ideas"
    )
    add_flags(result, "what is measured", Settings)
    add_model_options(result)
    # What an idea may change is not for flags: the form of the cache, the layout of the layers.
    add_performance_options(result, kv=False, layout=False)
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for an expected error."""
    args: argparse.Namespace = parser().parse_args(argv)
    arguments.choose_platform(args.device)
    from infer.lab import run

    more: dict[str, Any] = {"ideas": tuple(args.ideas)}
    return run.run(from_flags(Settings, args, **more))


if __name__ == "__main__":
    interrupt.run(main)
