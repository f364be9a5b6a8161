"""`python -m infer.bench`: how fast this device, or a mesh of them, computes a model.

Only the flags are here; what they start is in `infer.bench.run`, which is imported after parsing.
"""

from collections.abc import Sequence

from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.model_choice import add_mesh_options
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.errors import UsageError
from infer.bench import options

PROG = "python -m infer.bench"
DESCRIPTION = """Measures prefill and decode speed by dtype and quantization, as percentages of
the measured memory bandwidth and matrix product rate. Ctrl-C stops and shows what was measured
so far.

Exit codes: 0 success, 2 usage, 3 bad input, 4 model or checkpoint, 5 out of memory or device,
130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} --random chatglm2-6b --quantize none,int8,int4 --batches 1,64
  {PROG} --model chatglm2-6b --dtypes float32,bfloat16 --peer transformers
  {PROG} --random chatglm2-6b --mesh data=2,tensor=4"""
PEER = """alternate with transformers' GlmForCausalLM in the same shapes, with random weights:
eager, and on a GPU also compiled with a static cache (not tested on a GPU); needs torch and a
source checkout"""


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    options.add_model(result)
    group = options.add_measured(result, layout=None, steps=16, peer="transformers", peer_help=PEER)
    group.add_argument(
        "--preset", choices=("consumer",), metavar="consumer",
        help="a 6B model on a consumer card: planned and measured memory and speed; "
        "measured only on a GPU, or with --device cpu",
    )  # fmt: skip
    add_mesh_options(group)
    for flag, default, what in (
        ("--prompts", "128,512", "lengths of prompts to prefill, one row each; or none"),
        ("--batches", "1,8", "batch sizes of decode steps; or none"),
        ("--contexts", "128,512", "tokens in the cache before decoding, for each batch size"),
    ):
        group.add_argument(flag, type=_numbers, default=default, metavar="N,N", help=what)
    output = result.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    output.add_argument(
        "--plot", type=path_argument, metavar="F",
        help="draw a roofline picture, .png, .svg or .pdf; needs pip install 'glm2-jax[plot]'",
    )  # fmt: skip
    result.add_common()
    return result


def _numbers(text: str) -> tuple[int, ...]:
    """Parse whole numbers of 1 or more, separated by commas, or "none", for argparse."""
    if text.strip() == "none":
        return ()
    return tuple(sorted({arguments.positive(part) for part in text.split(",")}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for what the user can fix."""
    args, values = options.parse(parser(), argv, "preset")
    alone = {"--preset": args.preset, "--peer": args.peer}
    refused = [flag for flag, value in alone.items() if value is not None]
    if refused and args.mesh is not None:
        raise UsageError(
            f"{' and '.join(refused)}: not supported on a mesh.",
            "They measure one device.",
            "Leave --mesh or --tp out.",
        )
    from infer.bench import run

    return run.run(from_flags(run.Settings, args, **values))


if __name__ == "__main__":
    interrupt.run(main)
