"""What was measured, as a table for a terminal of any width and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from glm2_jax.cli.messages import human_size
from glm2_jax.cli.tables import fold, table
from glm2_jax.escape import join_lines
from infer.bench.ceilings import Ceilings
from infer.bench.measure import Result, Variant

HEADER = (
    "dtype", "weights", "layers", "what", "tok/s", "median", "ms", "GB/s", "of max", "TFLOP/s",
    "of max", "peak", "compile",
)  # fmt: skip
NOTE = (
    "tok/s, ms, GB/s and TFLOP/s are of the best repetition. GB/s counts what has to be read once: "
    "weights, and keys and values of the context; per cent are of the measured limits. More than "
    "100 % means that a model fits into caches, or that the machine was busy with something else."
)
MESH_NOTE = (
    "tok/s are of all devices together. GB/s and TFLOP/s count what one device reads and computes, "
    "times their number: arrays that every device holds, and rows that fill up a batch, count on "
    "all of them; collectives do not count. peak is of the device that used most, on a CPU of the "
    "process."
)


@dataclass
class Report:
    """Everything about a run; results are added while it goes."""

    about: dict[str, str]  # what it was measured on, name -> text, in order
    ceilings: Ceilings | None = None
    results: list[Result] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)  # what could not be measured, and why
    complete: bool = False
    mesh: Mapping[str, int] | None = None  # axis -> size; None = one device


def what(result: Result) -> str:
    """Return "prefill 1 x 512", "decode 8 at 2048": rows, and tokens read or in the cache."""
    shape = result.shape
    if shape.prompt:
        return f"prefill {shape.batch} x {shape.prompt}"
    return f"decode {shape.batch} at {shape.context}"


def shares(result: Result, ceilings: Ceilings | None) -> tuple[float | None, float | None]:
    """Return the parts of the measured bandwidth, and of the dtype's matrix products, reached."""
    if ceilings is None:
        return None, None
    top = ceilings.matmul.get(result.variant.dtype)
    bandwidth = result.per_second(result.bytes) / ceilings.bandwidth
    return bandwidth, None if top is None else result.per_second(result.flops) / top


def render(report: Report, columns: int) -> str:
    """Write the report for people, at most so many columns wide where no single word is wider."""
    lines = [f"{name}: {text}" for name, text in report.about.items()]
    lines += [] if report.ceilings is None else ceiling_lines(report.ceilings)
    measured = [result for result in report.results if result.seconds]
    if measured:
        rows = [_cells(result, report.ceilings) for result in measured]
        figures = table([HEADER, *rows], texts=4)
        if max(map(len, figures)) > columns:
            named = zip(measured, rows, strict=True)
            figures = [line for result, cells in named for line in _record(result, cells)]
        lines += ["", *figures]
    lines += [*peer_lines(report.results), *unmeasured_lines(report)]
    if measured:
        lines += ["", NOTE if report.mesh is None else f"{NOTE} {MESH_NOTE}"]
    return join_lines(part for line in lines for part in fold(line, columns))


def as_json(report: Report) -> dict[str, Any]:
    """Return the report for programs; bytes, seconds and operations, no rounded figures."""
    return {
        "about": report.about,
        "mesh": None if report.mesh is None else dict(report.mesh),
        "devices": math.prod((report.mesh or {}).values()),
        "ceilings": None if report.ceilings is None else asdict(report.ceilings),
        "results": [_result_json(result, report.ceilings) for result in report.results],
        "not_measured": unmeasured_lines(report),
        "complete": report.complete,
    }


def ceiling_lines(ceilings: Ceilings) -> list[str]:
    """Return the measured limits of the device, or of all devices, for people."""
    several = "" if ceilings.devices == 1 else f" (on one device, times {ceilings.devices})"
    products = ", ".join(f"{name} {ops / 1e12:.3g}" for name, ops in ceilings.matmul.items())
    return [
        f"measured bandwidth{several}: copy {ceilings.copy / 1e9:.4g} GB/s, "
        f"read {ceilings.read / 1e9:.4g} GB/s",
        f"measured matrix products{several}, TFLOP/s: {products}",
    ]


def peer_lines(results: Sequence[Result]) -> list[str]:
    """Return the peer's figures compared with ours, a line for each shape and mode."""
    return [
        f"{variant_name(result.variant)}, {what(result)}: {result.ratio(mode):.2f} x as fast as "
        f"transformers {mode}, {result.shape.tokens / min(seconds):.4g} tok/s "
        f"(median {result.shape.tokens / statistics.median(seconds):.4g})"
        for result in results
        for mode, seconds in result.peers.items()
    ]


def unmeasured_lines(report: Report) -> list[str]:
    """Return what is missing, and why."""
    lines = [
        f"{variant_name(result.variant)}, {what(result)}: {result.problem}"
        for result in report.results
        if result.problem
    ]
    if not report.complete:
        lines.append("the rest, as it was stopped before the end")
    return [f"not measured: {line}" for line in [*report.unmeasured, *lines]]


def variant_name(variant: Variant) -> str:
    """Return "bfloat16, int4 weights, layers list"."""
    weights = "" if variant.quantization == "none" else f", {variant.quantization} weights"
    return f"{variant.dtype}{weights}, layers {variant.layers}"


def _cells(result: Result, ceilings: Ceilings | None) -> tuple[str, ...]:
    variant, (bandwidth, products) = result.variant, shares(result, ceilings)
    return (
        variant.dtype,
        "as dtype" if variant.quantization == "none" else variant.quantization,
        variant.layers,
        what(result),
        _number(result.rate),
        _number(result.median_rate),
        _number(min(result.seconds) * 1e3),
        _number(result.per_second(result.bytes) / 1e9),
        _per_cent(bandwidth),
        _number(result.per_second(result.flops) / 1e12),
        _per_cent(products),
        "?" if result.peak is None else human_size(result.peak),
        f"{result.compile_s:.1f} s",
    )


def _record(result: Result, cells: tuple[str, ...]) -> list[str]:
    """Return a row of the table as two lines, for a terminal that is too narrow for it."""
    rate, median, ms, moved, of_bandwidth, flops, of_products, peak, compiling = cells[4:]
    return [
        f"{what(result)}, {variant_name(result.variant)}:",
        f"  {rate} tok/s (median {median}), {ms} ms; {moved} GB/s = {of_bandwidth}, "
        f"{flops} TFLOP/s = {of_products}; peak {peak}, compiled in {compiling}",
    ]


def _result_json(result: Result, ceilings: Ceilings | None) -> dict[str, Any]:
    values = asdict(result)
    if result.seconds:
        bandwidth, products = shares(result, ceilings)
        values |= {
            "tokens_per_s": result.rate,
            "tokens_per_s_median": result.median_rate,
            "bytes_per_s": result.per_second(result.bytes),
            "flops_per_s": result.per_second(result.flops),
            "of_bandwidth": bandwidth,
            "of_matmul": products,
            "ratios": {mode: result.ratio(mode) for mode in result.peers},
        }
    return values


def _number(value: float) -> str:
    """Return a number with three figures, and all before the decimal point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _per_cent(part: float | None) -> str:
    return "?" if part is None else f"{100 * part:.0f} %"
