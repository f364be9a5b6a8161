"""All plans for one model at one place, as a table for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from glm2_jax.cli.messages import human_size
from glm2_jax.cli.tables import fold
from glm2_jax.config import GLMConfig
from glm2_jax.limits import PREFILL_CHUNK
from infer.memory.budget import Budget, count_devices
from infer.memory.plan import Plan, largest_context, make_plan, rate_bound
from infer.memory.precision import Precision, precisions
from infer.memory.shares import Sizes

WIDE = 68  # columns of the table, without the first
_BOUND = "a bound from the memory's bandwidth, not a measurement"


@dataclass(frozen=True)
class Sheet:
    """All plans for one model at one place.

    Attributes:
      name: of the model. stored: the scheme of a folder that is quantized.
      mesh: the sizes of its axes; None = one device.
      longest: (label of the weights, batch) -> the longest context that fits; empty where the
        place's memory is not known.
    """

    name: str
    config: GLMConfig
    stored: str | None
    budget: Budget
    plans: tuple[Plan, ...]
    longest: dict[tuple[str, int], int]
    mesh: Sizes | None = None

    def fits(self, plan: Plan) -> bool | None:
        """None where the place does not tell its memory."""
        return None if self.budget.memory is None else plan.total <= self.budget.memory

    @property
    def labels(self) -> dict[Precision, str]:
        """What the table calls them: with the dtype where the integers alone do not tell."""
        return _labels([plan.precision for plan in self.plans])

    def rate(self, plan: Plan) -> float | None:
        """Tokens per second that the bandwidth allows, where it is known."""
        bandwidth = self.budget.bandwidth
        return None if bandwidth is None else rate_bound(self.config, plan, bandwidth)

    @property
    def nothing_fits(self) -> bool:
        return bool(self.longest) and not any(self.longest.values())


def _labels(found: Iterable[Precision]) -> dict[Precision, str]:
    found = dict.fromkeys(found)
    names = [precision.name for precision in found]
    return {p: p.name if names.count(p.name) == 1 else f"{p.dtype}:{p.name}" for p in found}


def make_sheet(
    name: str,
    config: GLMConfig,
    budget: Budget,
    *,
    stored: str | None = None,
    contexts: Sequence[int],
    batches: Sequence[int],
    dtype: str = "auto",
    quantize: str | None = None,
    chunk: int = PREFILL_CHUNK,
    columns: int = 1,
    prefix: int = 0,
    mesh: Sizes | None = None,
) -> Sheet:
    """Plans for every precision that the flags leave open.

    Args:
      dtype, quantize: as the flags of the same names.
      columns: tokens of each row that a step reads: one, and the drafts that it verifies.
      prefix: tokens of a prefix.
      mesh: over which the model is spread.
    """
    chosen = budget.precisions(stored, dtype, quantize)
    if dtype == "auto" and quantize is None:
        chosen = precisions(budget.half, stored)
    options: dict[str, Any] = {"chunk": chunk, "columns": columns, "prefix": prefix}
    options |= {"platform": budget.platform, "mesh": mesh}
    plans = [
        make_plan(config, precision, context, batch, **options)
        for precision in chosen
        for context in contexts
        for batch in batches
    ]
    longest = {}
    if budget.memory is not None:
        longest = {
            (label, batch): largest_context(config, precision, batch, budget.memory, **options)
            for precision, label in _labels(chosen).items()
            for batch in batches
        }
    return Sheet(name, config, stored, budget, tuple(plans), longest, mesh)


def render(sheet: Sheet, columns: int) -> Iterator[str]:
    """The sheet for people, in lines of at most `columns` where words allow it."""
    budget = sheet.budget
    memory = "memory unknown" if budget.memory is None else f"{human_size(budget.memory)} to use"
    speed = "" if budget.bandwidth is None else f", {budget.bandwidth / 1e9:,.0f} GB/s"
    count = sheet.config.num_params
    size = f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
    head = f"{sheet.name}, {size} parameters"
    if sheet.mesh is None:
        yield from wrapped(f"{head}, on {budget.name}: {memory}{speed}", columns)
    else:
        where = f"{count_devices(sheet.mesh)} devices ({budget.name}, {_mesh_text(sheet)})"
        yield from wrapped(f"{head}, on {where}: {memory}{speed} each", columns)
        yield from wrapped("All sizes are those of each device.", columns)
    yield ""
    first = max(map(len, ("weights in", *sheet.labels.values())))
    yield from _wide(sheet, first) if columns >= first + WIDE else _narrow(sheet)
    yield ""
    for batch in dict.fromkeys(batch for _, batch in sheet.longest):
        found = [(name, n) for (name, rows), n in sheet.longest.items() if rows == batch]
        text = ", ".join(f"{name} {f'{n:,}' if n else 'none'}" for name, n in found)
        yield from wrapped(f"longest context that fits, batch {batch}: {text}", columns)
    if budget.bandwidth is not None:
        yield from wrapped(f"tokens/s: {_BOUND}; all rows of a batch together.", columns)
    else:
        yield from wrapped("tokens/s: the memory's bandwidth is not known here.", columns)
    temporary = "temporary is the most that a program needs while it runs, jax's own memory apart"
    yield from wrapped(f"{temporary}, which is in the total.", columns)


def _mesh_text(sheet: Sheet) -> str:
    from glm2_jax.mesh import mesh_text

    return mesh_text(dict(sheet.mesh or ()))


def wrapped(text: str, columns: int) -> list[str]:
    """Lines of at most so many columns, where words allow it."""
    return fold(text, max(columns, 20))


def _wide(sheet: Sheet, first: int) -> Iterator[str]:
    row = f"{{:<{first}}}" + " {:>7} {:>5}  {:>8} {:>8} {:>9} {:>8}  {:<4} {:>8}"
    yield row.format(
        "weights in",
        "context",
        "batch",
        "weights",
        "cache",
        "temporary",
        "total",
        "fits",
        "tok/s <=",
    )
    for plan in sheet.plans:
        sizes = (plan.weights, plan.cache, plan.temporary, plan.total)
        yield row.format(
            sheet.labels[plan.precision],
            f"{plan.context:,}",
            plan.batch,
            *(human_size(size) for size in sizes),
            _answer(sheet.fits(plan)),
            _speed(sheet.rate(plan)),
        )


def _narrow(sheet: Sheet) -> Iterator[str]:
    row = "{:>7} x {:<4} {:>8} {:<4} {:>6}"
    before = None
    for plan in sheet.plans:
        if plan.precision != before:
            before = plan.precision
            yield f"{sheet.labels[before]}, weights {human_size(plan.weights)}"
            yield row.format("context", "rows", "total", "fits", "tok/s<")
        yield row.format(
            f"{plan.context:,}",
            plan.batch,
            human_size(plan.total),
            _answer(sheet.fits(plan)),
            _speed(sheet.rate(plan)),
        )


def _answer(fits: bool | None) -> str:
    return {True: "yes", False: "no", None: "?"}[fits]


def _speed(rate: float | None) -> str:
    return "?" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def as_json(sheet: Sheet) -> dict[str, Any]:
    """The same facts for programs; sizes in bytes."""
    return {
        "model": sheet.name,
        "parameters": sheet.config.num_params,
        "stored_as": sheet.stored,
        "device": sheet.budget.name,
        "platform": sheet.budget.platform,
        "mesh": None if sheet.mesh is None else dict(sheet.mesh),
        "memory": sheet.budget.memory,
        "bandwidth": sheet.budget.bandwidth,
        "plans": [
            {
                "dtype": plan.precision.dtype,
                "quantize": plan.precision.quantize,
                "context": plan.context,
                "batch": plan.batch,
                "speculate": plan.columns - 1,
                "prefix": plan.prefix,
                "weights": plan.weights,
                "cache": plan.cache,
                "temporary": plan.temporary,
                "runtime": plan.runtime,
                "total": plan.total,
                "fits": sheet.fits(plan),
                "tokens_per_second_bound": sheet.rate(plan),
            }
            for plan in sheet.plans
        ],
        "longest_context": [
            {"weights_in": name, "batch": batch, "context": context}
            for (name, batch), context in sheet.longest.items()
        ],
        "tokens_per_second_bound_is": _BOUND,
        "fits": None if not sheet.longest else not sheet.nothing_fits,
    }
