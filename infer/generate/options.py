"""The flags of `python -m infer.generate`. Nothing here imports jax."""

import argparse
from dataclasses import dataclass

from glm2_jax.cli.arguments import path_argument, positive
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice, add_model_options
from glm2_jax.cli.parser import Parser, add_flags, flag
from glm2_jax.processes import join
from infer import options
from infer.memory.cards import CARDS
from infer.options import Once, PromptFlags, SamplingFlags

PROG = "python -m infer.generate"
DESCRIPTION = """Answers a prompt with a checkpoint of the GLM family: ChatGLM, CodeGeeX2 or GLM-4.

The answer goes to standard output, everything else to standard error. Without a prompt, standard
input is read if it is not a terminal.

Exit codes: 0 success, 1 unexpected, 2 usage, 3 bad input or data, 4 model or checkpoint, 5 out
of memory or device, 130 interrupted, 141 output closed, 143 terminated."""
EXAMPLE = f"""{PROG} --prompt 你好 --greedy
  {PROG} --model chatglm2-6b --batch-file in.jsonl --output out.jsonl
  {PROG} --dry-run --config chatglm2-6b --device 3090"""


@dataclass(frozen=True)
class PromptOptions(PromptFlags):
    """What is answered."""

    batch_file: str | None = flag(
        'JSON lines: {"prompt": ...}, optionally with id, history, system; or {"messages": '
        "[...]} for ChatGLM3 and GLM-4; bad lines are reported, the others are answered",
        type=path_argument, action=Once, metavar="F", exclusive=True,
    )  # fmt: skip
    history: str | None = flag(
        'JSON file of earlier turns: [["question", "answer"], ...]',
        type=path_argument, action=Once, metavar="F",
    )  # fmt: skip
    system: str | None = flag(
        "system prompt; ChatGLM-6B and ChatGLM2 have no system role: it is put before the first "
        "question, with a newline",
        action=Once,
        metavar="TEXT",
    )
    clean_text: bool = flag(
        "replace ideographic and no-break spaces of the prompt by plain spaces",
        action="store_true",
    )
    truncate_prompt: int | None = flag(
        "cut a longer prompt to N tokens: the oldest turns first, then the end of the question; "
        "reported on standard error (default: a prompt that is too long is an error)",
        type=positive, metavar="N",
    )  # fmt: skip


@dataclass(frozen=True)
class OutputOptions:
    """Where the answers go, and in which form."""

    output: str | None = flag(
        "file for the answers to a batch file; until all are there, they are kept in F.partial, "
        "and the same command continues an interrupted run (default: standard output, each answer "
        "as soon as those before it are there; an interrupted run is not continued)",
        short=("-o",), type=path_argument, action=Once, metavar="F",
    )  # fmt: skip
    overwrite: bool = flag("replace an existing --output", action="store_true")
    restart: bool = flag("discard F.partial instead of continuing it", action="store_true")
    json: bool = flag("print a JSON object for each prompt", action="store_true")
    stream: bool | None = flag(
        "print the answer while it is generated (default: on a terminal)",
        action=argparse.BooleanOptionalAction,
    )
    stats: bool = flag("times, speed and memory on standard error", action="store_true")


@dataclass(frozen=True)
class Settings:
    """The flags of the command, but those of a dry run and of several processes."""

    choice: ModelChoice
    options: EngineOptions
    sampling: SamplingFlags
    asked: PromptOptions
    out: OutputOptions
    batch_size: int


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    add_model_options(result)
    options.add_adapter_options(result)
    add_flags(result, "prompt", PromptOptions)
    add_flags(result, "sampling", SamplingFlags)
    performance = options.add_performance_options(result, cards=CARDS, mesh=True, speculate=True)
    performance.add_argument(
        "--batch-size", type=positive, default=8, metavar="N",
        help="lines of a batch file that are answered together",
    )  # fmt: skip
    join.add_host_options(result)
    add_flags(result, "output", OutputOptions)
    add = result.add_argument_group("memory plan").add_argument
    add(
        "--dry-run", action="store_true",
        help="print the memory for weights, context and batch, what fits the device, and an upper "
        "bound of the speed (calculated, not measured); no weights are read, nothing is answered. "
        "Exit code 5 if nothing fits",
    )  # fmt: skip
    add(
        "--config", type=path_argument, metavar="NAME|FILE",
        help="with --dry-run, instead of --model: a published name or a config.json (default: "
        "chatglm2-6b)",
    )  # fmt: skip
    result.add_common()
    return result
