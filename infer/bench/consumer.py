"""`--preset consumer`: a 6B model on a consumer card, as published, as planned and as measured."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass

from convert.cli import human_size
from glm2_jax.config import PRESETS
from infer.bench.report import Report
from infer.bench.run import Result
from infer.memory.devices import CARDS
from infer.memory.plan import Precision, make_plan, rate_bound

MODEL = "chatglm2-6b"
CARD, BANDWIDTH = "RTX 3090 24 GB", CARDS["3090"].bandwidth
PROMPT = ANSWER = 2048  # tokens


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

    The plan is of `PROMPT` and `ANSWER` tokens; its speed is what the card's memory bandwidth
    allows at most, as nothing was measured there.
    """
    config = PRESETS[MODEL]
    lines = []
    for quantisation, published in PUBLISHED.items():
        precision = Precision("bfloat16", None if quantisation == "none" else quantisation)
        plan = make_plan(config, precision, PROMPT + ANSWER)
        bound = rate_bound(config, plan, BANDWIDTH)
        facts = (
            f"published, {CARD}: {human_size(published.memory)}, {published.rate:g} tok/s",
            f"planned, {CARD}: {human_size(plan.total)} with {PROMPT} + {ANSWER} tokens, "
            f"at most {bound:.0f} tok/s ({BANDWIDTH / 1e9:g} GB/s)",
            _measured(report, quantisation),
        )
        lines.append(f"{MODEL}, {published.name} (here {precision.name}):")
        for fact in facts:
            lines += textwrap.wrap(
                fact,
                columns,
                initial_indent="  ",
                subsequent_indent="    ",
                break_long_words=False,
            )
    return "\n".join(lines)


def _measured(report: Report, quantisation: str) -> str:
    results = [
        result
        for result in report.results
        if result.variant.quantisation == quantisation and result.seconds
    ]
    rates = [result.rate for result in results if not result.shape.prompt]
    if not rates:
        return "measured: nothing, on no device"
    peak = _peak(results)
    return f"measured, {report.about['device']}: {peak}, {max(rates):.3g} tok/s"


def _peak(results: list[Result]) -> str:
    peaks = [result.peak for result in results if result.peak is not None]
    return human_size(max(peaks)) if peaks else "memory unknown"
