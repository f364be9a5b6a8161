"""`python -m infer.chat`: a conversation, on a terminal or through a pipe.

Only the flags are here; what they start is in `infer.chat.run`, which is imported after parsing.
"""

from collections.abc import Sequence

from glm2_jax.cli import arguments, flags, interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.parser import Parser
from glm2_jax.processes import join
from infer import options
from infer.engine.loops import LOOP_STOP_DEFAULT

PROG = "python -m infer.chat"
DESCRIPTION = """Holds a conversation with a ChatGLM2 or ChatGLM3 checkpoint. Lines come from a
terminal, or one question a line from a pipe; then only the answers are on standard output, one a
line, and after an answer of several lines an empty one (--json is exact). /help lists the commands.
Exit codes: 0 fine, 2 usage, 3 bad input or data, 4 model or checkpoint, 5 out of memory or device,
130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} --model chatglm2-6b --system 请用英文回答
  printf '你好\\n早上好\\n' | {PROG} --greedy"""


def parser() -> Parser:
    """The flags of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    flags.add_model_options(result)
    options.add_adapter_options(result)
    group = result.add_argument_group("conversation")
    group.add_argument(
        "--history",
        type=path_argument,
        metavar="F",
        help='go on from a saved conversation, or from [["question", "answer"], ...]',
    )
    group.add_argument(
        "--system",
        metavar="TEXT",
        help="instructions; ChatGLM2 has no system slot: the text is put before the first "
        "question, with a newline",
    )
    options.add_sampling_options(result, loop_stop=LOOP_STOP_DEFAULT)
    performance = options.add_performance_options(result)
    flags.add_mesh_options(performance)
    options.add_speculate(performance)
    join.refuse_host_options(result, "A conversation is held in one process.")
    group = result.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print a JSON object for each answer")
    group.add_argument(
        "--stats", action="store_true", help="times, speed and memory of each answer"
    )
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, raises GLMError for what the user can mend."""
    arguments.use_utf8()
    args = parser().parse_args(argv)
    arguments.choose_platform(args.device)
    from infer.chat import run

    return run.run(args)


if __name__ == "__main__":
    interrupt.run(main)
