"""`--preset consumer`: a 6B model on a consumer card, as published, as planned and as measured."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass

from glm2_jax.cli.messages import human_size
from glm2_jax.config import PRESETS
from glm2_jax.escape import join_lines
from glm2_jax.limits import PREFILL_CHUNK
from infer.bench.measure import Result
from infer.bench.report import Report
from infer.memory.cards import CARDS
from infer.memory.plan import Plan, rate_bound
from infer.memory.precision import Precision, flags

MODEL = "chatglm2-6b"
CARD, BANDWIDTH = "RTX 3090 24 GB", CARDS["3090"].bandwidth
PROMPT = ANSWER = 2048  # tokens
UNMEASURED = "no accelerator here; --device cpu measures the processor"
CHUNK = 512  # of --prefill-chunk: a card that is full has no room to read more at once
ABOUT = (
    f"planned is the peak of weights, cache and temporaries for a prompt of {PROMPT} tokens and an "
    f"answer of {ANSWER}; what CUDA itself takes of the card is an assumption, not measured. "
    "GB are 10^9 bytes, GiB 2^30. Published figures do not say which they are in. Measured "
    f"prompts are read in chunks of {PREFILL_CHUNK}."
)


@dataclass(frozen=True)
class Published:
    """What users of the published program report on `CARD`: bytes, tokens per second."""

    name: str
    memory: float
    rate: float


# By our name of the form of the layers' matrices.
PUBLISHED = {
    "none": Published("fp16", 13e9, 20),
    "int8": Published("int8", 8e9, 28),
    "int4": Published("int4", 6e9, 35),
}


def apply(args: argparse.Namespace) -> None:
    """Sets the flags that the preset stands for."""
    args.random = MODEL
    args.quantize = tuple(PUBLISHED)
    args.prompts, args.batches, args.contexts = (PROMPT,), (1,), (PROMPT,)
    if args.dtypes == ("auto",):
        args.dtypes = ("bfloat16",)


def wanted(args: argparse.Namespace, platform: str) -> bool:
    """Whether to measure: on a CPU, which is no such card, only for those who ask for it."""
    return platform != "cpu" or args.device == "cpu"


def render(report: Report, columns: int) -> str:
    """The figures side by side, a paragraph for each form of the weights.

    The plan is of `PROMPT` and `ANSWER` tokens, read in chunks of `CHUNK`; its speed is what the
    card's memory bandwidth allows at most, as nothing was measured there.
    """
    lines = [*_wrapped(ABOUT, columns, "")]
    for quantization, published in PUBLISHED.items():
        precision = Precision("bfloat16", None if quantization == "none" else quantization)
        plan = plan_for(precision)
        bound = rate_bound(plan, BANDWIDTH)
        facts = (
            f"published, {CARD}: {human_size(published.memory)}, {published.rate:g} tok/s",
            f"planned, {CARD}: {_both(plan.total - plan.runtime)}, and {human_size(plan.runtime)} "
            f"of CUDA; at most {bound:.0f} tok/s ({BANDWIDTH / 1e9:g} GB/s); with "
            f"{flags(precision)} --prefill-chunk {CHUNK} --max-length {PROMPT + ANSWER}",
            _measured(report, quantization),
        )
        lines.append(f"{MODEL}, {published.name} (here {precision.name}):")
        for fact in facts:
            lines += _wrapped(fact, columns, "  ")
    return join_lines(lines)


def plan_for(precision: Precision) -> Plan:
    """What a prompt and an answer of the preset take, with the flags that it recommends."""
    return Plan(PRESETS[MODEL], precision, PROMPT + ANSWER, chunk=CHUNK)


def _both(size: float) -> str:
    """In both of the units that are called gigabytes."""
    return f"{human_size(size)} ({size / 2**30:.1f} GiB)"


def _wrapped(text: str, columns: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        columns,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _measured(report: Report, quantization: str) -> str:
    results = [
        result
        for result in report.results
        if result.variant.quantization == quantization and result.seconds
    ]
    rates = [result.rate for result in results if not result.shape.prompt]
    if not rates:
        return "measured: nothing, on no device"
    peak = _peak(results)
    return f"measured, {report.about['device']}: {peak}, {max(rates):.3g} tok/s"


def _peak(results: list[Result]) -> str:
    peaks = [result.peak for result in results if result.peak is not None]
    return human_size(max(peaks)) if peaks else "memory unknown"
