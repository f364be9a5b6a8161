"""`--preset consumer`: a 6B model on a consumer card, as planned and as measured."""

from __future__ import annotations

import argparse

from glm2_jax.cli.messages import human_size
from glm2_jax.cli.tables import fold
from glm2_jax.config import PRESETS
from glm2_jax.escape import join_lines
from glm2_jax.limits import PREFILL_CHUNK
from infer.bench.measure import Result
from infer.bench.report import Report
from infer.memory.cards import CARDS
from infer.memory.plan import Plan, flags, make_plan, rate_bound
from infer.memory.precision import Precision

MODEL = "chatglm2-6b"
CARD, BANDWIDTH = "RTX 3090 24 GB", CARDS["3090"].bandwidth
PROMPT = ANSWER = 2048  # tokens
QUANTIZATIONS = ("none", "int8", "int4")
UNMEASURED = "no accelerator here; --device cpu measures the processor"
CHUNK = 512  # of --prefill-chunk: a full card has no room for the temporaries of more
ABOUT = (
    f"planned is the peak of weights, cache and temporaries for a prompt of {PROMPT} tokens and an "
    f"answer of {ANSWER}; what CUDA itself takes of the card is an assumption, not measured. "
    f"GB are 10^9 bytes, GiB 2^30. Measured prompts are prefilled in chunks of {PREFILL_CHUNK}."
)


def apply(args: argparse.Namespace) -> None:
    """Set the flags that the preset stands for."""
    args.random = MODEL
    args.quantize = QUANTIZATIONS
    args.prompts, args.batches, args.contexts = (PROMPT,), (1,), (PROMPT,)
    if args.dtypes == ("auto",):
        args.dtypes = ("bfloat16",)


def wanted(args: argparse.Namespace, platform: str) -> bool:
    """Return whether to measure: on a CPU only if --device asks for it."""
    return platform != "cpu" or args.device == "cpu"


def render(report: Report, columns: int) -> str:
    """Return the planned and measured figures, a paragraph per quantization.

    The plan is for `PROMPT` and `ANSWER` tokens with a prefill in chunks of `CHUNK`; its speed is
    the bound that the card's memory bandwidth sets, not a measurement.
    """
    config = PRESETS[MODEL]
    lines = fold(ABOUT, columns)
    for quantization in QUANTIZATIONS:
        precision = Precision("bfloat16", None if quantization == "none" else quantization)
        plan = plan_for(precision)
        bound = rate_bound(config, plan, BANDWIDTH)
        facts = (
            f"planned, {CARD}: {_both(plan.total - plan.runtime)}, and {human_size(plan.runtime)} "
            f"of CUDA; at most {bound:.0f} tok/s ({BANDWIDTH / 1e9:g} GB/s); with "
            f"{flags(precision)} --prefill-chunk {CHUNK} --max-length {PROMPT + ANSWER}",
            _measured(report, quantization),
        )
        lines.append(f"{MODEL}, {precision.name}:")
        for fact in facts:
            lines += fold(f"  {fact}", columns)
    return join_lines(lines)


def plan_for(precision: Precision) -> Plan:
    """Return the memory plan of the preset, with the flags that it recommends."""
    return make_plan(PRESETS[MODEL], precision, PROMPT + ANSWER, chunk=CHUNK)


def _both(size: float) -> str:
    """Write a size in GB and GiB."""
    return f"{human_size(size)} ({size / 2**30:.1f} GiB)"


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
