"""`python -m train.lora`: fine-tunes a small adapter beside a model that stays as it is.

Only the flags are here; what they start is in `train.run`, which is imported after parsing.
"""

import argparse
import sys
from collections.abc import Sequence

from glm2_jax.choices import QUANTIZE
from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.arguments import choose_platform, path_argument, positive, use_utf8
from glm2_jax.cli.flags import add_model_options
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.processes import join
from glm2_jax.processes.join import add_host_options
from train import options, recipe
from train.data.options import add_data_options

NEW_ADAPTER = {"rank": 8, "alpha": 32, "target": "attn", "rslora": False}
PROG = "python -m train.lora"
DESCRIPTION = """Fine-tunes a LoRA adapter on instruction / input / output rows and others.

--output holds at its end an adapter that PEFT can read, too, and that infer.generate and infer.chat
take as --adapter; beside it what --resume auto needs to end bit for bit as if it had never been
stopped. Exit codes: 0 fine, 2 usage, 3 bad data, or loss not finite, 4 model or checkpoint, 5 out
of memory or device, 130 interrupted, 143 terminated (both after saving)."""
EXAMPLE = f"""{PROG} --data data.jsonl --model chatglm2-6b --output adapter
  {PROG} --data data.jsonl --model chatglm2-6b --output adapter --resume auto
  {PROG} --data data.jsonl --check-data"""


def parser() -> Parser:
    """The flags of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    recipe.add_config_flag(result)
    add_model_options(result)
    add_data_options(result)
    _add_adapter_options(result)
    options.add_training_options(result, lr=5e-5, remat=True)
    options.add_evaluation_options(result)
    add_host_options(result)
    options.add_output_options(result, "adapter")
    result.add_common()
    return result


def _add_adapter_options(result: Parser) -> None:
    group = result.add_argument_group("adapter")
    add = group.add_argument
    add("--rank", type=positive, metavar="N", help=f"its rank (default: {NEW_ADAPTER['rank']})")
    add(
        "--alpha", type=arguments.above_zero, metavar="X",
        help=f"its strength: alpha / rank (default: {NEW_ADAPTER['alpha']})",
    )  # fmt: skip
    add("--dropout", type=arguments.number, default=0.1, metavar="X", help="before A")
    add(
        "--target", metavar="NAMES",
        help="matrices, as published, or attn (query_key_value), attn+mlp, all-linear; several "
        f"with commas (default: {NEW_ADAPTER['target']})",
    )  # fmt: skip
    add("--rslora", action="store_const", const=True, help="strength alpha / sqrt(rank)")
    add(
        "--init-adapter", type=path_argument, metavar="DIR",
        help="start from an adapter, which keeps its rank, alpha, matrices and rsLoRA; flags that "
        "say otherwise are refused",
    )  # fmt: skip
    add(
        "--force-adapter", action="store_true",
        help="take --init-adapter though it was trained on another base model or prompt template",
    )  # fmt: skip
    add(
        "--quantize-base", choices=QUANTIZE,
        help="keep the matrices of the base as int8 or int4 (QLoRA); none = unpack what is stored "
        "quantized (default: as it is stored)",
    )  # fmt: skip


def fill_new_adapter(args: argparse.Namespace) -> None:
    """Fills the flags of a new adapter that are not given; one to start from has no defaults."""
    for name, value in NEW_ADAPTER.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, raises GLMError for what the user can mend."""
    return start(parser(), sys.argv[1:] if argv is None else argv, "AdapterMethod")


def start(parser: Parser, argv: Sequence[str], method: str) -> int:
    """Parses the flags and trains by a class of `train.methods`."""
    use_utf8()
    args = recipe.parse(parser, argv)
    if getattr(args, "init_adapter", ".") is None:
        fill_new_adapter(args)
    choose_platform(args.device)
    with join.start(from_flags(join.Hosts, args), vars(args)):
        from train import methods
        from train.run import run

        return run(parser, args, getattr(methods, method))


if __name__ == "__main__":
    interrupt.run(main)
