"""All plans for one model at one place, as a table for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from glm2_jax.cli.messages import human_size
from glm2_jax.cli.tables import fold, table
from glm2_jax.config import GLMConfig
from infer.memory.budget import Budget
from infer.memory.plan import Plan, largest_context, rate_bound
from infer.memory.precision import Precision, precisions
from infer.memory.shares import Sizes, count_devices

_BOUND = "a bound from the memory's bandwidth, not a measurement"


@dataclass(frozen=True)
class Sheet:
    """All plans for one model at one place."""

    name: str  # name of the model
    config: GLMConfig
    stored: str | None  # the scheme of a folder that is quantized
    budget: Budget
    plans: tuple[Plan, ...]
    labels: dict[Precision, str]  # what the table calls them
    # (label, batch) -> the longest context that fits; empty where the place's memory is not known.
    longest: dict[tuple[str, int], int]
    mesh: Sizes | None = None

    def rate(self, plan: Plan) -> float | None:
        """Return the tokens per second that the bandwidth allows, where it is known."""
        bandwidth = self.budget.bandwidth
        return None if bandwidth is None else rate_bound(plan, bandwidth)

    @property
    def nothing_fits(self) -> bool:
        return bool(self.longest) and not any(self.longest.values())


def make_sheet(
    name: str,
    config: GLMConfig,
    budget: Budget,
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    stored: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    **options: Any,
) -> Sheet:
    """Make plans for every precision that the flags `dtype` and `quantize` leave open; `options`
    are those of every `Plan`: chunk, columns, prefix, mesh, kv."""
    chosen = budget.precisions(stored, dtype, quantize)
    if dtype == "auto" and quantize is None:
        chosen = precisions(budget.half, stored)
    names = [precision.name for precision in chosen]  # with the dtype where they are ambiguous
    labels = {p: p.name if names.count(p.name) == 1 else f"{p.dtype}:{p.name}" for p in chosen}
    plans, longest = [], {}
    for precision in chosen:
        for context in contexts:
            for batch in batches:
                plans.append(Plan(config, precision, context, batch, budget.platform, **options))
                key = labels[precision], batch
                if budget.memory is not None and key not in longest:
                    longest[key] = largest_context(plans[-1], budget.memory)
    mesh = options.get("mesh")
    return Sheet(name, config, stored, budget, tuple(plans), labels, longest, mesh)


def render(sheet: Sheet, columns: int) -> Iterator[str]:
    """Write the sheet for people, in lines of at most `columns` where words allow it."""
    budget, count = sheet.budget, sheet.config.num_params
    memory = "memory unknown" if budget.memory is None else f"{human_size(budget.memory)} to use"
    memory += "" if budget.bandwidth is None else f", {budget.bandwidth / 1e9:,.0f} GB/s"
    size = f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
    head = f"{sheet.name}, {size} parameters, on"
    if sheet.mesh is None:
        yield from fold(f"{head} {budget.name}: {memory}", columns)
    else:
        from glm2_jax.mesh import mesh_text

        shape = mesh_text(dict(sheet.mesh))
        where = f"{count_devices(sheet.mesh)} devices ({budget.name}, {shape})"
        yield from fold(f"{head} {where}: {memory} each", columns)
        yield from fold("All sizes are those of each device.", columns)
    yield ""
    yield from _table(sheet, columns)
    yield ""
    for batch in dict.fromkeys(batch for _, batch in sheet.longest):
        found = [(name, n) for (name, rows), n in sheet.longest.items() if rows == batch]
        text = ", ".join(f"{name} {f'{n:,}' if n else 'none'}" for name, n in found)
        yield from fold(f"longest context that fits, batch {batch}: {text}", columns)
    known = f"{_BOUND}; all rows of a batch together."
    unknown = "the memory's bandwidth is not known here."
    yield from fold(f"tokens/s: {unknown if budget.bandwidth is None else known}", columns)
    temporary = "temporary: the most that a program needs while it runs. The total includes jax's"
    yield from fold(f"{temporary} own memory.", columns)


def _table(sheet: Sheet, columns: int) -> Iterator[str]:
    """Return the plans in a table, or where that is too wide, a smaller one for each precision."""
    head = ("context", "batch", "weights", "cache", "temporary", "total", "fits", "tok/s <=")
    rows = {plan: _cells(sheet, plan) for plan in sheet.plans}
    named = [(sheet.labels[plan.precision], *cells) for plan, cells in rows.items()]
    lines = table([("weights in", *head), *named], texts=1)
    if max(map(len, lines)) <= columns:
        yield from lines
        return
    for precision, label in sheet.labels.items():
        same = [cells for plan, cells in rows.items() if plan.precision == precision]
        yield f"{label}, weights {same[0][2]}"
        yield from table([(*row[:2], *row[5:]) for row in (head, *same)], texts=0)


def _cells(sheet: Sheet, plan: Plan) -> tuple[str, ...]:
    rate = sheet.rate(plan)
    return (
        f"{plan.context:,}",
        str(plan.batch),
        *map(human_size, (plan.weights, plan.cache, plan.temporary, plan.total)),
        {True: "yes", False: "no", None: "?"}[sheet.budget.fits(plan)],
        "?" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}",
    )


def as_json(sheet: Sheet) -> dict[str, Any]:
    """Return the same facts for programs; sizes in bytes."""
    sizes = ("weights", "cache", "temporary", "runtime", "total")
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
                "kv": plan.kv,
                **{name: getattr(plan, name) for name in sizes},
                "fits": sheet.budget.fits(plan),
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
