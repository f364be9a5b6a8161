"""`--preset consumer`: a 6B model on a consumer card, as planned and as measured."""

from __future__ import annotations

import dataclasses

from glm2_jax.cli.messages import human_size
from glm2_jax.cli.tables import fold
from glm2_jax.config import PRESETS
from glm2_jax.escape import join_lines
from glm2_jax.limits import PREFILL_CHUNK
from glm2_jax.runtime.devices import find_device
from infer.bench.options import BenchSettings
from infer.bench.report import Report
from infer.bench.report import render as render_figures
from infer.memory.cards import CARDS
from infer.memory.plan import Plan, rate_bound
from infer.memory.precision import Precision, flags

MODEL = "chatglm2-6b"
CARD, BANDWIDTH = "RTX 3090 24 GB", CARDS["3090"].bandwidth
PROMPT = ANSWER = 2048  # tokens
QUANTIZATIONS = ("none", "int8", "int4")
CHUNK = 512  # of --prefill-chunk: a full card has no room for more at once
ABOUT = (
    f"planned is the peak of weights, cache and temporaries for a prompt of {PROMPT} tokens and an "
    f"answer of {ANSWER}; what CUDA itself takes of the card is an assumption, not measured. "
    f"GB are 10^9 bytes, GiB 2^30. Measured prompts are prefilled in chunks of {PREFILL_CHUNK}."
)


def apply(settings: BenchSettings) -> BenchSettings:
    """Return the settings that the preset stands for."""
    dtypes = ("bfloat16",) if settings.dtypes == ("auto",) else settings.dtypes
    shapes = {"prompts": (PROMPT,), "batches": (1,), "contexts": (PROMPT,)}
    return dataclasses.replace(
        settings, random=MODEL, quantize=QUANTIZATIONS, dtypes=dtypes, **shapes
    )


def unmeasured(device: str) -> str:
    """Return why nothing is measured: a CPU is not such a card, unless `--device` asks for it."""
    if device == "cpu" or find_device(device).platform != "cpu":
        return ""
    return "no accelerator found; --device cpu measures the CPU"


def render(report: Report, columns: int) -> str:
    """Write the report, and a paragraph for each quantization.

    The speed of the plan is what the card's memory bandwidth allows at most, as nothing was
    measured there.
    """
    lines = ["", ABOUT]
    for quantization in QUANTIZATIONS:
        precision = Precision("bfloat16", None if quantization == "none" else quantization)
        plan = Plan(PRESETS[MODEL], precision, PROMPT + ANSWER, chunk=CHUNK)
        needed = plan.total - plan.runtime
        lines += [
            f"{MODEL}, {precision.name}:",
            f"  planned, {CARD}: {human_size(needed)} ({needed / 2**30:.1f} GiB), and "
            f"{human_size(plan.runtime)} of CUDA; at most {rate_bound(plan, BANDWIDTH):.0f} tok/s "
            f"({BANDWIDTH / 1e9:g} GB/s); with {flags(precision)} --prefill-chunk {CHUNK} "
            f"--max-length {PROMPT + ANSWER}",
            f"  {_measured(report, quantization)}",
        ]
    folded = (part for line in lines for part in fold(line, columns))
    return "\n".join((render_figures(report, columns), join_lines(folded)))


def _measured(report: Report, quantization: str) -> str:
    of_form = (r for r in report.results if r.variant.quantization == quantization)
    results = [result for result in of_form if result.seconds]
    rates = [result.rate for result in results if not result.shape["prompt"]]
    if not rates:
        return "measured: nothing, on no device"
    peaks = [result.peak for result in results if result.peak is not None]
    peak = human_size(max(peaks)) if peaks else "memory unknown"
    return f"measured, {report.about['device']}: {peak}, {max(rates):.3g} tok/s"
