"""`python -m train.bench`: how fast this device trains an adapter, beside what it could do at most.

What is imported at the top needs no jax, so that `--help` does not wait for it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from glm2_jax.choices import DEVICES, DTYPES, LAYER_LAYOUTS, QUANTIZE
from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.flags import add_model_options
from glm2_jax.cli.main import EXIT_DEVICE, is_out_of_memory
from glm2_jax.cli.messages import human_size, note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.escape import join_lines, json_line
from infer.bench.__main__ import add_random_options, one_of

if TYPE_CHECKING:
    from glm2_jax import GLMConfig, LoRA
    from infer.bench.ceilings import Ceilings
    from infer.bench.peer import Peer
    from infer.bench.subject import Subject

PROG = "python -m train.bench"
DESCRIPTION = """Measures steps that train an adapter: tokens a second, and how much of the measured
matrix products that is. Operations are counted as 4 for each number of a matrix and token (2
forward, 2 for the gradient of the activations; the base has none of its own), 6 for each number of
the adapter, and 12 for each pair of a query and a key, head and dimension. What --grad-checkpoint
computes again is not counted. Exit codes: 0 fine, 2 usage, 3 bad input, 4 model or checkpoint, 5
out of memory or device, 130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} --random chatglm2-6b --dtypes bfloat16 --quantize none,int4
  {PROG} --random config.json --batch-size 4 --length 128 --no-grad-checkpoint --peer peft"""


def parser() -> Parser:
    """The flags of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    add_model_options(result)
    add_random_options(result)
    group = result.add_argument_group("what is measured")

    def add(*flags: str, **kwargs: Any) -> None:
        group.add_argument(*flags, **kwargs)

    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add(
        "--dtypes", type=one_of(DTYPES), default="auto", metavar="A,B",
        help=f"types to compute in, of {', '.join(DTYPES)}",
    )  # fmt: skip
    add(
        "--quantize", type=one_of(QUANTIZE), metavar="A,B",
        help=f"forms of the base's matrices, of {', '.join(QUANTIZE)} "
        "(default: as stored; random weights: none)",
    )  # fmt: skip
    add(
        "--layout", type=one_of(LAYER_LAYOUTS), default="stacked", metavar="A,B",
        help="how the layers lie in memory: stacked, as train.lora has them, or list",
    )  # fmt: skip
    add("--batch-size", type=arguments.positive, default=4, metavar="N", help="rows of a step")
    add("--length", type=arguments.positive, default=512, metavar="N", help="tokens of a row")
    add("--rank", type=arguments.positive, default=8, metavar="N", help="of the adapter")
    add("--target", default="attn", metavar="NAMES", help="what the adapter changes")
    add(
        "--grad-checkpoint", action=argparse.BooleanOptionalAction, default=True,
        help="compute each block again in the backward pass instead of keeping what is inside it",
    )  # fmt: skip
    add("--steps", type=arguments.positive, default=1, metavar="N", help="steps of one repetition")
    add("--repeat", type=arguments.positive, default=5, metavar="N", help="repetitions")
    add(
        "--peer", choices=("peft",), metavar="peft",
        help="take the same steps with peft around transformers' GlmForCausalLM, in turns, with "
        "random weights; needs torch and a checkout",
    )  # fmt: skip
    group = result.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object instead of text")
    result.add_common()
    return result


@dataclass
class Result:
    """What came out of one form of a model.

    Attributes:
        name: of the form, for people.
        dtype: name of the type that it computes in.
        tokens: of a step.
        flops: operations of a step, see `DESCRIPTION`.
        seconds: of a step, one for each repetition.
        compile_s: compiling it.
        planned: bytes that the compiler says it needs, weights included; None = it does not say.
        peak: the most memory used, as `infer.bench` measures it.
        peer: the peer's seconds.
        problem: why there are no seconds, or none of the peer's; "".
    """

    name: str
    dtype: str
    tokens: int
    flops: float
    seconds: list[float] = field(default_factory=list)
    compile_s: float = 0.0
    planned: int | None = None
    peak: int | None = None
    peer: list[float] = field(default_factory=list)
    problem: str = ""


@dataclass
class Report:
    """Everything about a run; results are added while it goes."""

    about: dict[str, str]
    ceilings: Ceilings | None = None
    results: list[Result] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    complete: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, raises GLMError for what the user can mend."""
    from glm2_jax.errors import UsageError

    arguments.use_utf8()
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    if args.model and args.random:
        raise UsageError("--model and --random exclude each other.", fix="Leave one out.")
    if args.layers and not args.random:
        raise UsageError("--layers needs --random.", "A checkpoint has the layers that it has.")
    arguments.choose_platform(args.device)
    if args.peer and "jax" not in sys.modules:  # or nothing is left of a GPU's memory for the peer
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return run(args, argv)


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures what the flags name and prints it; returns the exit code.

    Raises:
        GLMError: the model, the device or a target is not what it should be.
    """
    from glm2_jax.lora import find_targets
    from glm2_jax.runtime.devices import find_device
    from infer.bench import subject as suite
    from infer.bench.ceilings import measure_ceilings
    from infer.bench.peer import Peer, missing

    find_targets(args.target)
    device = find_device(args.device)
    choice = from_flags(ModelChoice, args, layers=None, quantize=None)
    subject = suite.Subject(choice, device, random=args.random, layers=args.layers)
    command = f"{PROG} {shlex.join(argv)}".rstrip()
    report = Report(subject.about(command, f"{args.repeat}, of {args.steps} steps"))
    with interrupt.always(lambda: print(_text(args, report), flush=True)):
        note(f"measuring what {device.device_kind} can do at most ...")
        report.ceilings = measure_ceilings(device)
        with contextlib.ExitStack() as stack:
            peer = None
            if args.peer and (problem := missing(args.peer)):
                report.unmeasured.append(problem)
            elif args.peer:
                peer = Peer(args.peer, device.platform)
                stack.enter_context(interrupt.always(peer.close))
            for result in _results(args, subject, peer):
                report.results.append(result)
                if peer is not None and peer.versions:
                    report.about["peer"] = peer.versions
                note(f"{result.name}: {result.problem or f'{_rate(result):.4g} tok/s'}")
        # Once more: a share of more than 100 per cent would only say that the machine was busy.
        report.ceilings = report.ceilings.better(measure_ceilings(device))
        report.complete = True
    return EXIT_DEVICE if any(not result.seconds for result in report.results) else 0


def _results(args: argparse.Namespace, subject: Subject, peer: Peer | None) -> Iterator[Result]:
    from glm2_jax.lora import init_lora
    from infer.bench.peer import PeerError
    from infer.bench.report import variant_name
    from infer.memory.peak import peak_bytes, reset_peak

    for dtype, quantize, layers in product(args.dtypes, args.quantize or (None,), args.layout):
        reset_peak()
        variant, base = subject.open(dtype, quantize, layers)
        config = subject.config
        assert config is not None
        note(f"{variant_name(variant)}: {human_size(variant.weights)} of weights")
        import jax

        lora = init_lora(config, jax.random.key(0), rank=args.rank, targets=args.target)
        shape = args.batch_size, args.length
        name = f"{variant_name(variant)}, {shape[0]} x {shape[1]} tokens"
        result = Result(
            name, variant.dtype, shape[0] * shape[1], work(config, base, lora, *shape)
        )  # fmt: skip
        theirs = peer if variant.quantization == "none" else None
        try:
            ours = _steps(args, config, base, lora, result)
            if theirs is not None:
                theirs.open(config, variant.dtype)
                theirs.ask(
                    do="train", batch=shape[0], length=shape[1], rank=args.rank,
                    checkpointing=args.grad_checkpoint, steps=args.steps,
                )  # fmt: skip
            for _ in range(args.repeat):
                result.seconds.append(ours())
                if theirs is not None:
                    result.peer.append(theirs.measure())
        except PeerError as error:
            result.problem = str(error)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            result.problem = "out of memory"
        result.peak = peak_bytes(subject.device)
        yield result
        del base
        gc.collect()  # before the next one is made


def _steps(
    args: argparse.Namespace, config: GLMConfig, base: Any, lora: LoRA, result: Result
) -> Callable[[], float]:
    """What takes `--steps` steps and returns the seconds of one; did so once."""
    import jax
    import numpy as np

    from train.data.batch import Batch
    from train.optim import make_optimizer
    from train.step import init_state, make_step

    shape = 1, args.batch_size, args.length
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(args.length, dtype=np.int32), shape)
    batch = Batch(tokens, np.ones(shape, np.int32), positions, positions > 0)
    optimizer = make_optimizer(5e-5)
    trained, state = lora, init_state(optimizer, lora)
    key = jax.random.key(0)
    start = time.perf_counter()
    step = make_step(config, optimizer, remat=args.grad_checkpoint)
    program = step.lower(base, trained, state, batch, key, np.int32(0)).compile()
    result.compile_s = time.perf_counter() - start
    if (memory := program.memory_analysis()) is not None:
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes
        result.planned = needed + memory.temp_size_in_bytes - memory.alias_size_in_bytes

    def take() -> float:
        nonlocal trained, state
        start = time.perf_counter()
        for _ in range(args.steps):
            trained, state, metrics = program(base, trained, state, batch, key, np.int32(0))
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / args.steps

    take()
    return take


def work(config: GLMConfig, base: Any, lora: LoRA, batch: int, length: int) -> float:
    """Operations that a step cannot do without; every position has its logits.

    Args:
        batch: rows.
        length: tokens of a row, all of one sequence.
    """
    from glm2_jax.schemes import COLUMN_AXES

    c, layers = config, base["layers"]
    matrices = base["head"].size + sum(
        weight.size
        for layer in (layers if isinstance(layers, list) else [layers])
        for name, weight in layer.items()
        if name in COLUMN_AXES
    )
    pairs = batch * length * (length + 1) / 2
    attention = 12 * c.num_layers * c.num_heads * c.head_dim * pairs
    return (4 * matrices + 6 * lora.num_params) * batch * length + attention


def _text(args: argparse.Namespace, report: Report) -> str:
    return json_line(as_json(report)) if args.json else render(report)


def as_json(report: Report) -> dict[str, Any]:
    """The report for programs; bytes, seconds and operations, no rounded figures."""
    values = asdict(report)
    for result, entry in zip(report.results, values["results"], strict=True):
        if result.seconds:
            entry["tokens_per_s"] = _rate(result)
            entry["of_matmul"] = share(result, report.ceilings)
            entry["ratio"] = min(result.peer) / min(result.seconds) if result.peer else None
    return values


def render(report: Report) -> str:
    """The report for people, folded to the width of the terminal."""
    from glm2_jax.cli.tables import columns
    from infer.bench.report import ceiling_lines

    lines = [f"{name}: {text}" for name, text in report.about.items()]
    lines += ceiling_lines(report.ceilings)[1:] if report.ceilings else []
    for result in report.results:
        lines += ["", *_lines(result, report.ceilings)]
    lines += [f"not measured: {line}" for line in report.unmeasured]
    lines += [] if report.complete else ["not measured: the rest, as it was stopped before the end"]
    fold = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    return join_lines(
        part for line in lines for part in textwrap.wrap(line, columns(), **fold) or [""]
    )


def _lines(result: Result, ceilings: Ceilings | None) -> list[str]:
    lines = [f"{result.name}:"]
    if result.seconds:
        part = share(result, ceilings)
        peak = "?" if result.peak is None else human_size(result.peak)
        lines.append(
            f"{_rate(result):.4g} tok/s (median {_median(result.tokens, result.seconds):.4g}), "
            f"{min(result.seconds):.3g} s a step; {result.flops / min(result.seconds) / 1e12:.3g} "
            f"TFLOP/s{'' if part is None else f' = {100 * part:.0f} % of the measured products'}; "
            f"peak {peak}, compiled in {result.compile_s:.1f} s"
        )
    if result.peer:
        lines.append(
            f"{min(result.peer) / min(result.seconds):.2f} x as fast as peft, "
            f"{result.tokens / min(result.peer):.4g} tok/s "
            f"(median {_median(result.tokens, result.peer):.4g})"
        )
    if result.problem:
        lines.append(f"not measured: {result.problem}")
    return lines


def share(result: Result, ceilings: Ceilings | None) -> float | None:
    """The part of the device's matrix products that the best repetition reached."""
    top = None if ceilings is None else ceilings.matmul.get(result.dtype)
    return None if top is None else result.flops / min(result.seconds) / top


def _rate(result: Result) -> float:
    """Tokens a second of the best repetition."""
    return result.tokens / min(result.seconds)


def _median(tokens: int, seconds: Sequence[float]) -> float:
    return tokens / statistics.median(seconds)


if __name__ == "__main__":
    interrupt.run(main)
