"""What was measured, as a table for a terminal of any width and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from glm2_jax.cli.messages import human_size
from glm2_jax.cli.tables import fold, table
from glm2_jax.escape import join_lines
from infer.bench.ceilings import Ceilings
from infer.bench.subject import Variant

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
class Result:
    """The measurement of one thing: a prefill, or a step.

    `peak` is the most memory used: on a CPU by the process since the measurement began, elsewhere
    since the start, on the device that used most.
    """

    variant: Variant
    what: str  # "prefill 1 x 512", "decode 8 at 2048": rows, and tokens read or in the cache
    shape: dict[str, int]  # in numbers, as the peer is asked for the same
    tokens: int  # all rows together
    bytes: float | None  # the least that has to be read; None = not counted
    flops: float  # the least that has to be computed
    seconds: list[float] = field(default_factory=list)  # of one, for each repetition
    compile_s: float = 0.0
    peak: int | None = None
    peers: dict[str, list[float]] = field(default_factory=dict)  # the peer's seconds by mode
    problem: str = ""  # why there are no seconds, or none of the peer's

    def per_second(self, amount: float) -> float:
        """Return an amount of one prefill or step per second of the best repetition."""
        return amount / min(self.seconds)

    @property
    def rate(self) -> float:
        """Tokens per second of the best repetition."""
        return self.per_second(self.tokens)

    def ratio(self, mode: str) -> float:
        """Return how many times as fast as the peer: the best compared with the best."""
        return min(self.peers[mode]) / min(self.seconds)

    def figures(self, ceilings: Ceilings | None) -> dict[str, Any]:
        """Return the rates, and the shares of the measured limits that they reach."""
        moved = None if self.bytes is None else self.per_second(self.bytes)
        flops = self.per_second(self.flops)
        bandwidth = None if ceilings is None else ceilings.bandwidth
        top = None if ceilings is None else ceilings.matmul.get(self.variant.dtype)
        return {
            "tokens_per_s": self.rate,
            "tokens_per_s_median": self.tokens / statistics.median(self.seconds),
            "bytes_per_s": moved,
            "flops_per_s": flops,
            "of_bandwidth": None if moved is None or bandwidth is None else moved / bandwidth,
            "of_matmul": None if top is None else flops / top,
            "ratios": {mode: self.ratio(mode) for mode in self.peers},
        }


@dataclass
class Report:
    """Everything about a run; results are added while it goes."""

    about: dict[str, str]  # what it was measured on, name -> text, in order
    ceilings: Ceilings | None = None
    results: list[Result] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)  # what could not be measured, and why
    complete: bool = False
    mesh: Mapping[str, int] | None = None  # axis -> size; None = one device
    peer: str = ""  # what took turns with us


def render(report: Report, columns: int) -> str:
    """Write the report for people, at most so many columns wide where no single word is wider."""
    lines = [f"{name}: {text}" for name, text in report.about.items()]
    if (found := report.ceilings) is not None:
        several = "" if found.devices == 1 else f" (on one device, times {found.devices})"
        products = ", ".join(f"{name} {ops / 1e12:.3g}" for name, ops in found.matmul.items())
        lines += [
            f"measured bandwidth{several}: copy {found.copy / 1e9:.4g} GB/s, "
            f"read {found.read / 1e9:.4g} GB/s",
            f"measured matrix products{several}, TFLOP/s: {products}",
        ]
    measured = [result for result in report.results if result.seconds]
    if measured:
        rows = [_cells(result, report.ceilings) for result in measured]
        counted = [at for at in range(len(HEADER)) if any(row[at] != "?" for row in rows)]
        figures = table([[row[at] for at in counted] for row in (HEADER, *rows)], texts=4)
        if max(map(len, figures)) > columns:
            figures = [line for cells in rows for line in _record(*cells)]
        lines += ["", *figures]
    for variant in dict.fromkeys(result.variant for result in measured):
        if chosen := variant.forms.describe():
            lines.append(f"{variant.name}: in other forms than usual (--tuned): {chosen}")
    for result in measured:
        for mode, seconds in result.peers.items():
            median = result.tokens / statistics.median(seconds)
            lines.append(
                f"{result.variant.name}, {result.what}: {result.ratio(mode):.2f} x as fast as "
                f"{report.peer} {mode}, "
                f"{result.tokens / min(seconds):.4g} tok/s (median {median:.4g})"
            )
    lines += _unmeasured(report)
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
        "results": [
            asdict(result) | (result.figures(report.ceilings) if result.seconds else {})
            for result in report.results
        ],
        "not_measured": _unmeasured(report),
        "complete": report.complete,
    }


def _unmeasured(report: Report) -> list[str]:
    """Return what is missing, and why."""
    lines = [
        f"{result.variant.name}, {result.what}: {result.problem}"
        for result in report.results
        if result.problem
    ]
    if not report.complete:
        lines.append("the rest, as it was stopped before the end")
    return [f"not measured: {line}" for line in [*report.unmeasured, *lines]]


def _cells(result: Result, ceilings: Ceilings | None) -> tuple[str, ...]:
    variant, found = result.variant, result.figures(ceilings)
    return (
        variant.dtype,
        "as dtype" if variant.quantization == "none" else variant.quantization,
        variant.layers,
        result.what,
        _number(found["tokens_per_s"]),
        _number(found["tokens_per_s_median"]),
        _number(min(result.seconds) * 1e3),
        _number(found["bytes_per_s"], 1e9),
        _per_cent(found["of_bandwidth"]),
        _number(found["flops_per_s"], 1e12),
        _per_cent(found["of_matmul"]),
        "?" if result.peak is None else human_size(result.peak),
        f"{result.compile_s:.1f} s",
    )


def _record(dtype: str, weights: str, layers: str, what: str, *figures: str) -> list[str]:
    """Return a row of the table as two lines, for a terminal that is too narrow for it."""
    rate, median, ms, moved, of_bandwidth, flops, of_products, peak, compiling = figures
    read = "" if moved == "?" else f"{moved} GB/s = {of_bandwidth}, "
    return [
        f"{what}, {dtype}, weights {weights}, layers {layers}:",
        f"  {rate} tok/s (median {median}), {ms} ms; {read}"
        f"{flops} TFLOP/s = {of_products}; peak {peak}, compiled in {compiling}",
    ]


def _number(value: float | None, unit: float = 1) -> str:
    """Return a number with three figures, and all before the decimal point."""
    if value is None:
        return "?"
    return f"{value / unit:.0f}" if value >= 100 * unit else f"{value / unit:.3g}"


def _per_cent(part: float | None) -> str:
    return "?" if part is None else f"{100 * part:.0f} %"
