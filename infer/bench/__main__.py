"""`python -m infer.bench`: how fast this device, or a mesh of them, computes a model.

Only the flags are here; what they start is in `infer.bench.run`, which is imported after parsing.
"""

from collections.abc import Sequence

from glm2_jax.cli import interrupt
from glm2_jax.cli.model_choice import add_mesh_options
from glm2_jax.cli.parser import Parser, add_flags, from_flags
from glm2_jax.errors import UsageError
from infer.bench import options
from infer.bench.serving.options import LoadSettings, check

PROG = "python -m infer.bench"
DESCRIPTION = """Measures prefill and decode speed by dtype and quantization, as percentages of
the measured memory bandwidth and matrix product rate; with --serve, the throughput and the
latencies of a server under load. Ctrl-C stops and shows what was measured so far.

Exit codes: 0 success, 2 usage, 3 bad input, 4 model or checkpoint, 5 out of memory or device,
130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} --random chatglm2-6b --quantize none,int8,int4 --batches 1,64
  {PROG} --model chatglm2-6b --dtypes float32,bfloat16 --peer transformers
  {PROG} --random chatglm2-6b --mesh data=2,tensor=4
  {PROG} --serve --random chatglm2-6b --quantize int8 --users 1,8,32 --peer-server llama
  {PROG} --serve --url http://127.0.0.1:8000 --rate 0.5,1,2 --spread 0.5"""


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    add_mesh_options(options.add_options(result, options.BenchSettings))
    add_flags(result, "load on a server", LoadSettings)
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for what the user can fix."""
    args, values = options.parse(parser(), argv, "preset")
    settings, load = (
        from_flags(options.BenchSettings, args, **values),
        from_flags(LoadSettings, args),
    )
    check(settings, load)
    if load.serve:
        from infer.bench.serving import run as serving

        return serving.run(settings, load)
    alone = {"--preset": args.preset, "--peer": args.peer}
    refused = [flag for flag, value in alone.items() if value is not None]
    if refused and args.mesh is not None:
        raise UsageError(
            f"{' and '.join(refused)}: not supported on a mesh.",
            "They measure one device.",
            "Leave --mesh or --tp out.",
        )
    from infer.bench import run

    return run.run(settings)


if __name__ == "__main__":
    interrupt.run(main)
