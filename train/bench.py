"""`python -m train.bench`: how fast this device trains an adapter, and what share of its limits.

Imports at the top need no jax, so that `--help` does not wait for it.
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
DESCRIPTION = """Measures optimizer steps of a LoRA adapter: tokens per second, and the share of
the measured matrix product rate.

Operations per token: 4 for each element of a matrix (2 forward, 2 for the gradient of the
activations; the frozen base needs no weight gradient), 6 for each parameter of the adapter, and
12 for each pair of query and key, head and dimension. Recomputation by --grad-checkpoint is not
counted.

Exit codes: 0 success, 2 usage, 3 bad input, 4 model or checkpoint, 5 out of memory or device,
130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} --random chatglm2-6b --dtypes bfloat16 --quantize none,int4
  {PROG} --random config.json --batch-size 4 --length 128 --no-grad-checkpoint --peer peft"""


@dataclass(frozen=True)
class Settings:
    """The flags of the command, by their names, and the command line as it was typed."""

    choice: ModelChoice
    random: str | None
    layers: int | None
    dtypes: Sequence[str]
    quantize: Sequence[str] | None
    layout: Sequence[str]
    batch_size: int
    length: int
    rank: int
    target: str
    grad_checkpoint: bool
    steps: int
    repeat: int
    peer: str | None
    json: bool
    command: str


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    add_model_options(result)
    add_random_options(result)
    add = result.add_argument_group("measurement").add_argument
    count: dict[str, Any] = {"type": arguments.positive, "metavar": "N"}
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add(
        "--dtypes", type=one_of(DTYPES), default="auto", metavar="A,B",
        help=f"dtypes to compute in, of {', '.join(DTYPES)}",
    )  # fmt: skip
    add(
        "--quantize", type=one_of(QUANTIZE), metavar="A,B",
        help=f"quantizations of the base, of {', '.join(QUANTIZE)} (default: as stored; random "
        "weights: none)",
    )  # fmt: skip
    add(
        "--layout", type=one_of(LAYER_LAYOUTS), default="stacked", metavar="A,B",
        help="layers stacked or in a list, which train.lora uses on a CPU",
    )  # fmt: skip
    add("--batch-size", **count, default=4, help="rows per step")
    add("--length", **count, default=512, help="tokens per row")
    add("--rank", **count, default=8, help="rank of the adapter")
    add("--target", default="attn", metavar="NAMES", help="matrices to adapt, see train.lora")
    add(
        "--grad-checkpoint", action=argparse.BooleanOptionalAction, default=True,
        help="gradient checkpointing: recompute activations in the backward pass",
    )  # fmt: skip
    add("--steps", **count, default=1, help="steps per repetition")
    add("--repeat", **count, default=5, help="repetitions")
    add(
        "--peer", choices=("peft",), metavar="peft",
        help="alternate with the same steps in peft and transformers' GlmForCausalLM, with random "
        "weights; needs torch and a source checkout",
    )  # fmt: skip
    group = result.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object instead of text")
    result.add_common()
    return result


@dataclass
class Result:
    """The measurement of one form of a model."""

    name: str  # for people
    dtype: str
    tokens: int  # per step
    flops: float  # per step, see `DESCRIPTION`
    seconds: list[float] = field(default_factory=list)  # per step, one for each repetition
    compile_s: float = 0.0
    peak: int | None = None  # bytes used at most, as `infer.bench` measures them
    peer: list[float] = field(default_factory=list)  # the peer's seconds
    problem: str = ""  # why there are no seconds, or none of the peer's

    @property
    def rate(self) -> float:
        """Tokens per second of the best repetition."""
        return self.tokens / min(self.seconds)

    def share(self, ceilings: Ceilings | None) -> float | None:
        """Return the share of the device's matrix product rate in the best repetition."""
        top = None if ceilings is None else ceilings.matmul.get(self.dtype)
        return None if top is None else self.flops / min(self.seconds) / top


@dataclass
class Report:
    """All results of a run, and what they were measured on."""

    about: dict[str, str]
    ceilings: Ceilings | None = None
    results: list[Result] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    complete: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; raises GLMError for what the user can fix."""
    from glm2_jax.errors import UsageError

    arguments.use_utf8()
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    if args.model and args.random:
        raise UsageError("--model and --random exclude each other.", fix="Leave one out.")
    if args.layers and not args.random:
        raise UsageError("--layers needs --random.", "The layers of a checkpoint are fixed.")
    arguments.choose_platform(args.device)
    if args.peer and "jax" not in sys.modules:  # or jax would leave the peer no GPU memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    choice = from_flags(ModelChoice, args, layers=None, quantize=None)
    command = f"{PROG} {shlex.join(argv)}".rstrip()
    return run(from_flags(Settings, args, choice=choice, command=command))


def run(settings: Settings) -> int:
    """Measure what the flags name, print the report, and return the exit code."""
    from glm2_jax.lora import find_targets
    from glm2_jax.runtime.devices import find_device
    from infer.bench.ceilings import measure_ceilings
    from infer.bench.peer import Peer, missing
    from infer.bench.subject import Subject

    find_targets(settings.target)
    choice = settings.choice
    device = find_device(choice.device)
    subject = Subject(choice, device, random=settings.random, layers=settings.layers)
    repetitions = f"{settings.repeat}, of {settings.steps} steps"
    report = Report(subject.about(settings.command, repetitions))

    def show() -> None:
        text = json_line(as_json(report)) if settings.json else render(report)
        print(text, flush=True)

    with interrupt.always(show):
        note(f"measuring the limits of {device.device_kind} ...")
        report.ceilings = measure_ceilings(device)
        with contextlib.ExitStack() as stack:
            peer = None
            if settings.peer and (problem := missing(settings.peer)):
                report.unmeasured.append(problem)
            elif settings.peer:
                peer = Peer(settings.peer, device.platform)
                stack.enter_context(interrupt.always(peer.close))
            for result in _results(settings, subject, peer):
                report.results.append(result)
                if peer is not None and peer.versions:
                    report.about["peer"] = peer.versions
                note(f"{result.name}: {result.problem or f'{result.rate:.4g} tok/s'}")
        # Once more: more than 100 per cent would only mean that the machine was busy at first.
        report.ceilings = report.ceilings.better(measure_ceilings(device))
        report.complete = True
    return EXIT_DEVICE if any(not result.seconds for result in report.results) else 0


def _results(settings: Settings, subject: Subject, peer: Peer | None) -> Iterator[Result]:
    import jax

    from glm2_jax.lora import init_lora
    from infer.bench.peer import PeerError
    from infer.bench.report import variant_name
    from infer.memory.peak import peak_bytes, reset_peak

    rows, length = settings.batch_size, settings.length
    forms = product(settings.dtypes, settings.quantize or (None,), settings.layout)
    for dtype, quantize, layers in forms:
        reset_peak()
        variant, base = subject.open(dtype, quantize, layers)
        config = subject.config
        assert config is not None
        name = variant_name(variant)
        note(f"{name}: {human_size(variant.weights)} of weights")
        lora = init_lora(config, jax.random.key(0), rank=settings.rank, targets=settings.target)
        flops = work(config, base, lora, rows, length)
        result = Result(f"{name}, {rows} x {length} tokens", variant.dtype, rows * length, flops)
        theirs = peer if variant.quantization == "none" else None
        try:
            ours = _steps(settings, config, base, lora, result)
            if theirs is not None:
                theirs.open(config, variant.dtype)
                theirs.ask(
                    do="train", batch=rows, length=length, rank=settings.rank,
                    checkpointing=settings.grad_checkpoint, steps=settings.steps,
                )  # fmt: skip
            for _ in range(settings.repeat):
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
    settings: Settings, config: GLMConfig, base: Any, lora: LoRA, result: Result
) -> Callable[[], float]:
    """Return a function that takes `--steps` steps and returns the seconds of one."""
    import jax
    import numpy as np

    from train.data.batch import Batch
    from train.optim import make_optimizer
    from train.step import init_state, make_step

    shape = 1, settings.batch_size, settings.length
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(settings.length, dtype=np.int32), shape)
    batch = Batch(tokens, np.ones(shape, np.int32), positions, positions > 0)
    optimizer = make_optimizer(5e-5)
    trained, state = lora, init_state(optimizer, lora)
    rest = batch, jax.random.key(0), np.int32(0)
    start = time.perf_counter()
    step = make_step(config, optimizer, remat=settings.grad_checkpoint)
    program = step.lower(base, trained, state, *rest).compile()
    result.compile_s = time.perf_counter() - start

    def take() -> float:
        nonlocal trained, state
        start = time.perf_counter()
        for _ in range(settings.steps):
            trained, state, metrics = program(base, trained, state, *rest)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / settings.steps

    take()  # the first one is slower
    return take


def work(config: GLMConfig, base: Any, lora: LoRA, batch: int, length: int) -> float:
    """Return the operations that a step of `batch` rows of `length` tokens cannot do without."""
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


def as_json(report: Report) -> dict[str, Any]:
    """Return the report for programs; bytes, seconds and operations are not rounded."""
    values = asdict(report)
    for result, entry in zip(report.results, values["results"], strict=True):
        if result.seconds:
            entry["tokens_per_s"] = result.rate
            entry["of_matmul"] = result.share(report.ceilings)
            entry["ratio"] = min(result.peer) / min(result.seconds) if result.peer else None
    return values


def render(report: Report) -> str:
    """Return the report for people, wrapped to the width of the terminal."""
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
        part, best = result.share(ceilings), min(result.seconds)
        peak = "?" if result.peak is None else human_size(result.peak)
        share = "" if part is None else f" = {100 * part:.0f} % of the measured products"
        lines.append(
            f"{_rates(result.tokens, result.seconds)}, {best:.3g} s a step; "
            f"{result.flops / best / 1e12:.3g} TFLOP/s{share}; "
            f"peak {peak}, compiled in {result.compile_s:.1f} s"
        )
    if result.peer:
        faster = min(result.peer) / min(result.seconds)
        lines.append(f"{faster:.2f} x as fast as peft, {_rates(result.tokens, result.peer)}")
    if result.problem:
        lines.append(f"not measured: {result.problem}")
    return lines


def _rates(tokens: int, seconds: Sequence[float]) -> str:
    median = statistics.median(seconds)
    return f"{tokens / min(seconds):.4g} tok/s (median {tokens / median:.4g})"


if __name__ == "__main__":
    interrupt.run(main)
