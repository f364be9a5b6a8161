"""`python -m infer.explain`: how the model turns a prompt into an answer.

Only the flags are here; what they start is in `infer.explain.run`, which is imported after parsing.
"""

import argparse
import difflib
import re
from collections.abc import Sequence

from glm2_jax.cli import arguments, flags, interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.parser import Parser
from infer import options
from infer.engine.params import MAX_LOGPROBS
from infer.explain.facts import DEVICES, PROMPT
from infer.memory.cards import CARDS
from infer.memory.links import LINKS, MESHES

PROG = "python -m infer.explain"
LONGEST = 10**9  # of a prompt that is asked for
DESCRIPTION = """Shows every stage of the model with its shape, parameters, operations and bytes,
and the least time that devices could take (from the makers' figures, not measured). With weights
also the prompt as it is built, attention, the likeliest next tokens after each layer, and the
answer token by token. Standard output has the explanation, all else goes to standard error. Exit
codes: 0 fine, 2 usage, 3 bad input, 4 model or checkpoint, 5 out of memory or device, 130
interrupted, 143 terminated."""
EXAMPLE = f"""{PROG}
  {PROG} --config chatglm2-6b --batch 16 --length 128 --device a100 h200
  {PROG} --config chatglm2-6b --mesh tensor=8 --device v5e-8 --length 2048
  {PROG} --model chatglm2-6b --prompt 你好 --heads 0:0,27:31 --html explain.html"""


def parser() -> Parser:
    """The flags of the command."""
    # What --device means here takes the place of what it means where answers are computed.
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE, conflict_handler="resolve")
    flags.add_model_options(result)
    _add_what(result)
    _add_values(result)
    options.add_performance_options(result)
    devices = result.add_argument_group("devices")
    devices.add_argument(
        "--device", dest="cards", nargs="+", type=_card, metavar="NAME",
        help=f"to tell the least time of, any of {', '.join(CARDS)} (v5e is v5e-1); they need "
        f"not be here "
        f"(default: {', '.join(DEVICES)}; with --mesh: {', '.join(LINKS)})",
    )  # fmt: skip
    devices.add_argument(
        "--mesh", metavar="AXIS=N,...",
        help="instead of the stages: what each of several devices holds, moves and sends, such as "
        "--mesh data=2,tensor=4 --device v5e-8 v5p-8 8xh200; --length is that of the rows",
    )  # fmt: skip
    group = result.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    group.add_argument(
        "--html", type=path_argument, metavar="FILE",
        help="write a page, too, that a browser shows without a network; replaces the file",
    )  # fmt: skip
    group.add_argument(
        "--width", type=_width, metavar="N", help="columns to write (default: the terminal's)"
    )
    result.add_common()
    result.set_defaults(device="auto", max_length=None)  # `open_engine` asks for both
    return result


def _add_what(result: Parser) -> None:
    group = result.add_argument_group("what is explained")
    group.add_argument(
        "--config", type=path_argument, metavar="NAME|FILE",
        help="instead of --model: a published name such as chatglm2-6b, or a config.json; shapes "
        "and costs alone, in bfloat16 where --dtype and --quantize do not say otherwise",
    )  # fmt: skip
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", "-p", metavar="TEXT", help=f"the question (default: {PROMPT})")
    source.add_argument(
        "--length", type=_length, metavar="N",
        help="instead of a prompt: one of so many ids; shapes and costs alone",
    )  # fmt: skip
    group.add_argument(
        "--batch", type=arguments.positive, default=1, metavar="N",
        help="prompts together, in shapes and costs",
    )  # fmt: skip


def _add_values(result: Parser) -> None:
    group = result.add_argument_group("with weights")
    group.add_argument(
        "--top-k", type=_top_k, metavar="N",
        help=f"likeliest tokens to list, up to {MAX_LOGPROBS} (default: 5)",
    )  # fmt: skip
    group.add_argument(
        "--heads", type=_heads, metavar="LAYER:HEAD,...",
        help="whose attention is shown, counted from 0 (default: two heads of three layers)",
    )  # fmt: skip
    group.add_argument(
        "--max-new-tokens", "--max-tokens", type=arguments.positive, metavar="N",
        help="longest answer (default: 64)",
    )  # fmt: skip


def _card(text: str) -> str:
    """An argparse type: a device, or several that links join; "v5e" for one chip of them, too."""
    name = text.lower()
    if name in CARDS or f"{name}-1" in CARDS or re.fullmatch(MESHES, name):
        return name
    near = difflib.get_close_matches(text.lower(), CARDS, n=1)
    guess = f" (did you mean {near[0]}?)" if near else ""
    raise argparse.ArgumentTypeError(
        f"unknown device {text[:40]!r}{guess}; known: {', '.join(CARDS)}"
    )


def _heads(text: str) -> tuple[tuple[int, int], ...]:
    """An argparse type: "0:0,27:31"."""
    if not re.fullmatch(r"\d{1,6}:\d{1,6}(,\d{1,6}:\d{1,6})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is no list of heads; write LAYER:HEAD, for example 0:0,27:31"
        )
    pairs = (part.split(":") for part in text.split(","))
    return tuple(dict.fromkeys((int(layer), int(head)) for layer, head in pairs))


def _length(text: str) -> int:
    number = arguments.positive(text)
    if number > LONGEST:
        raise argparse.ArgumentTypeError(f"{text[:40]} ids are more than any model reads")
    return number


def _top_k(text: str) -> int:
    number = arguments.positive(text)
    if number > MAX_LOGPROBS:
        raise argparse.ArgumentTypeError(f"{number} is more than {MAX_LOGPROBS}")
    return number


def _width(text: str) -> int:
    number = arguments.positive(text)
    if number < 30:
        raise argparse.ArgumentTypeError(f"{number} columns are too few, 30 is the least")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, raises GLMError for what the user can mend."""
    arguments.use_utf8()
    args = parser().parse_args(argv)
    from infer.explain import meshes, run

    return run.run(args) if args.mesh is None else meshes.run(args)


if __name__ == "__main__":
    interrupt.run(main)
