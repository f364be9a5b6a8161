"""`python -m infer.explain`: how the model turns a prompt into an answer."""

from collections.abc import Sequence

from glm2_jax.cli import interrupt
from glm2_jax.cli.model_choice import ModelChoice, add_model_options
from glm2_jax.cli.parser import Parser, add_flags, from_flags
from infer.explain.options import (
    DeviceOptions,
    OutputOptions,
    Settings,
    SubjectOptions,
    ValueOptions,
)
from infer.options import add_performance_options

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
    add_flags(result, "what is explained", SubjectOptions)
    add_flags(result, "with weights", ValueOptions)
    add_performance_options(result, kv=False)
    add_flags(result, "devices", DeviceOptions)
    add_flags(result, "output", OutputOptions)
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for what the user can fix."""
    args = parser().parse_args(argv)
    from infer.explain import run

    # Those of --mesh and --device are only planned for.
    choice = from_flags(ModelChoice, args, mesh=None, device="auto")
    return run.run(from_flags(Settings, args, choice=choice))


if __name__ == "__main__":
    interrupt.run(main)
