"""`python -m infer.chat`: the flags of a conversation, on a terminal or through a pipe."""

from collections.abc import Sequence

from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.model_choice import add_model_options
from glm2_jax.cli.parser import Parser, add_flags, from_flags
from infer import options
from infer.engine.loops import LOOP_STOP_DEFAULT

PROG = "python -m infer.chat"
DESCRIPTION = """Holds a conversation with a ChatGLM or GLM-4 checkpoint. Input comes from a
terminal, or one question a line from a pipe; then standard output holds only the answers, one a
line, and an empty line after an answer of several lines (--json is exact). /help lists the
commands.

Exit codes: 0 success, 2 usage, 3 bad input or data, 4 model or checkpoint, 5 out of memory or
device, 130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} --model chatglm2-6b --system 请用英文回答
  printf '你好\\n早上好\\n' | {PROG} --greedy"""


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    add_model_options(result)
    options.add_adapter_options(result)
    add = result.add_argument_group("conversation").add_argument
    add(
        "--history", type=path_argument, metavar="F",
        help='continue a saved conversation, or a history [["question", "answer"], ...]',
    )  # fmt: skip
    add(
        "--system", metavar="TEXT",
        help="system prompt; ChatGLM-6B and ChatGLM2 have no system role: it is put before the "
        "first question, with a newline",
    )  # fmt: skip
    default = {"default": LOOP_STOP_DEFAULT}
    add_flags(result, "sampling", options.SamplingFlags, loop_stop=default)
    options.add_performance_options(result, mesh=True, speculate=True)
    add = result.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print a JSON object for each answer")
    add("--stats", action="store_true", help="times, speed and memory of each answer")
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for an expected error."""
    args = parser().parse_args(argv)
    arguments.choose_platform(args.device)
    sampling = from_flags(options.SamplingFlags, args)
    from infer.chat import run

    return run.run(from_flags(run.Settings, args, sampling=sampling))


if __name__ == "__main__":
    interrupt.run(main)
