"""`python -m infer.explain`: how the model turns a prompt into an answer. Only flags are here."""

import argparse
import difflib
import re
from collections.abc import Sequence

from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import path_argument, positive
from glm2_jax.cli.model_choice import ModelChoice, add_model_options
from glm2_jax.cli.parser import Parser, from_flags
from infer import options
from infer.engine.params import MAX_LOGPROBS
from infer.explain.facts import DEVICES, PROMPT
from infer.memory.cards import CARDS, LINKS, MESHES

PROG = "python -m infer.explain"
DESCRIPTION = """Shows every stage of the model with its shape, parameters, operations and bytes,
and the minimum time on chosen devices (from the makers' figures, not measured). With weights
also the prompt as it is built, attention, the most probable next tokens after each layer, and
the answer token by token.

Standard output has the explanation, everything else goes to standard error.

Exit codes: 0 success, 2 usage, 3 bad input, 4 model or checkpoint, 5 out of memory or device,
130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG}
  {PROG} --config chatglm2-6b --batch 16 --length 128 --device a100 h200
  {PROG} --config chatglm2-6b --mesh tensor=8 --device v5e-8 --length 2048
  {PROG} --model chatglm2-6b --prompt 你好 --heads 0:0,27:31 --html explain.html"""


def parser() -> Parser:
    """Return the parser of the flags."""
    # --device here replaces the one that says where answers are computed.
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE, conflict_handler="resolve")
    add_model_options(result)
    _add_explained(result)
    options.add_performance_options(result)
    add = result.add_argument_group("devices").add_argument
    add(
        "--device", dest="cards", nargs="+", type=_card, metavar="NAME",
        help=f"devices to show the minimum time for, any of {', '.join(CARDS)} (v5e is v5e-1); "
        f"this machine need not have them "
        f"(default: {', '.join(DEVICES)}; with --mesh: {', '.join(LINKS)})",
    )  # fmt: skip
    add(
        "--mesh", metavar="AXIS=N,...",
        help="instead of the stages: what each of several devices holds, moves and sends, such as "
        "--mesh data=2,tensor=4 --device v5e-8 v5p-8 8xh200; --length is that of the rows",
    )  # fmt: skip
    add = result.add_argument_group("output").add_argument
    add("--json", action="store_true", help="one JSON object instead of tables")
    add(
        "--html", type=path_argument, metavar="FILE",
        help="also write a page that a browser shows without a network; overwrites the file",
    )  # fmt: skip
    add(
        "--width", type=positive, metavar="N",
        help="width of the output in columns, at least 30 (default: the terminal's)",
    )  # fmt: skip
    result.add_common()
    return result


def _add_explained(result: Parser) -> None:
    group = result.add_argument_group("what is explained")
    group.add_argument(
        "--config", type=path_argument, metavar="NAME|FILE",
        help="instead of --model: a published name such as chatglm2-6b, or a config.json; only "
        "shapes and costs, in bfloat16 unless --dtype or --quantize say otherwise",
    )  # fmt: skip
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", "-p", metavar="TEXT", help=f"the question (default: {PROMPT})")
    source.add_argument(
        "--length", type=positive, metavar="N",
        help="instead of a prompt: its number of ids; only shapes and costs",
    )  # fmt: skip
    group.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="batch size, in shapes and costs"
    )
    add = result.add_argument_group("with weights").add_argument
    add(
        "--top-k", type=int, choices=range(1, MAX_LOGPROBS + 1), metavar="N",
        help=f"most probable tokens to list, up to {MAX_LOGPROBS} (default: 5)",
    )  # fmt: skip
    add(
        "--heads", type=_heads, metavar="LAYER:HEAD,...",
        help="heads whose attention is shown, counted from 0 (default: two heads of three layers)",
    )  # fmt: skip
    add(
        "--max-new-tokens", "--max-tokens", type=positive, metavar="N",
        help="longest answer (default: 64)",
    )  # fmt: skip


def _card(text: str) -> str:
    """Parse a device, or several joined by links ("v5e" is one chip), for argparse."""
    name = text.lower()
    if name in CARDS or f"{name}-1" in CARDS or re.fullmatch(MESHES, name):
        return name
    near = difflib.get_close_matches(name, CARDS, n=1)
    guess = f" (did you mean {near[0]}?)" if near else ""
    raise argparse.ArgumentTypeError(
        f"unknown device {text[:40]!r}{guess}; known: {', '.join(CARDS)}"
    )


def _heads(text: str) -> tuple[tuple[int, int], ...]:
    """Parse heads such as "0:0,27:31", for argparse."""
    if not re.fullmatch(r"\d{1,6}:\d{1,6}(,\d{1,6}:\d{1,6})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a list of heads; write LAYER:HEAD, for example 0:0,27:31"
        )
    pairs = (part.split(":") for part in text.split(","))
    return tuple(dict.fromkeys((int(layer), int(head)) for layer, head in pairs))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for what the user can fix."""
    args = parser().parse_args(argv)
    from infer.explain import run

    choice = from_flags(ModelChoice, args, mesh=None)  # the one of --mesh is only planned for
    return run.run(from_flags(run.Settings, args, choice=choice))


if __name__ == "__main__":
    interrupt.run(main)
