"""`python -m infer.fill`: the flags of filling blanks."""

from collections.abc import Sequence
from dataclasses import fields

from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.model_choice import add_model_options
from glm2_jax.cli.parser import Parser, add_flags, from_flags
from glm2_jax.errors import UsageError
from infer import options

PROG = "python -m infer.fill"
DESCRIPTION = """Fills the blanks of a text with a GLM base model (glm-large-chinese,
glm-10b-chinese): [MASK] is words, [sMASK] a sentence, [gMASK] a text of any length.
Several blanks of one kind are filled one after another, and each sees the answers before it.
With --choices, the most likely of some answers fills the one blank of the text.

The complete text goes to standard output, everything else to standard error.

Exit codes: 0 success, 1 unexpected, 2 usage, 3 bad input or data, 4 model or checkpoint, 5 out
of memory or device, 130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} --model THUDM/glm-large-chinese --prompt "中国的首都是[MASK]。"
  {PROG} --model THUDM/glm-large-chinese --prompt "中国的首都是[MASK]。" --choices 上海 北京"""

_WARM = "; no effect at temperature 0"
_SAMPLING = {  # where the help of other commands would not be true
    "preset": {
        "help": "defaults of the flags below: official = greedy, as the published example; api = "
        "the published HTTP server of ChatGLM2 (temperature 0.95, top-p 0.7, max-length 2048)"
    },
    "temperature": {"help": "sampling temperature (default: 0 = greedy)"},
    "top_k": {"help": f"sample from the N most likely tokens, 0 = all (default: 50{_WARM})"},
    "top_p": {"help": f"nucleus sampling: cumulative probability (default: 0.8{_WARM})"},
    "max_length": {"help": "text and answers, in tokens (default: what the model has)"},
}


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    add_model_options(result)
    options.add_adapter_options(result)
    prompt = {"help": "the text with its blanks; - reads it from standard input"}
    file = {"help": "a UTF-8 file with the text"}
    group = add_flags(result, "text", options.PromptFlags, prompt=prompt, prompt_file=file)
    group.add_argument(
        "--choices", nargs="+", metavar="A",
        help="fill the blank with the most likely of these answers: the one with the largest sum "
        "of the log-probabilities of its tokens; the sums are printed, too",
    )  # fmt: skip
    drawn = [field.name for field in fields(options.SamplingFlags) if field.name != "logprobs"]
    add_flags(result, "sampling", options.SamplingFlags, drawn, **_SAMPLING)
    options.add_performance_options(result, mesh=True)
    add = result.add_argument_group("output").add_argument
    add(
        "--json", action="store_true",
        help="print a JSON object: the text, and each answer, or each choice with its score",
    )  # fmt: skip
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for an expected error."""
    made = parser()
    args = made.parse_args(argv)
    if args.choices is not None:
        drawing = {field.name for field in fields(options.SamplingFlags)} - {"max_length"}
        for name in drawing & (given := made.given(args)).keys():
            raise UsageError(
                f"{given[name]} has no effect with --choices.",
                "The choices are scored; nothing is drawn.",
                "Leave one of them out.",
            )
    arguments.choose_platform(args.device)
    sampling = from_flags(options.SamplingFlags, args)
    from infer.fill import run

    return run.run(from_flags(run.Settings, args, sampling=sampling))


if __name__ == "__main__":
    interrupt.run(main)
