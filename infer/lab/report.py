"""What ideas cost and buy, as a table, as JSON and as a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from glm2_jax.cli.messages import human_size
from glm2_jax.cli.tables import columns, fitted, fold
from glm2_jax.escape import join_lines, json_line
from glm2_jax.ideas import Reads

HEADER = (
    "idea", "perplexity", "KL", "same top", "tok/s", "tok/step", "read/token", "moved/token",
    "cache",
)  # fmt: skip
NOTE = (
    "perplexity, KL(full model || this) in nats and how often the most likely token agrees: on the "
    "prompts, over the tokens that count. tok/s: the best repetition of a decode step of one row "
    "with {context} tokens in the cache; on a busy machine a lower bound. read/token: the bytes "
    "that have to be read for a token, by the idea's own count; moved/token: those that the "
    "compiler counts in the programs that ran. Where only the first is small, the idea saves in "
    "principle, and the program computes everything all the same. cache: the bytes that have to be "
    "kept of these {context} tokens."
)


@dataclass
class Result:
    """What was measured of an idea, or of the model without one."""

    name: str
    perplexity: float
    kl_divergence: float
    top1_agreement: float
    told: dict[str, float]  # means that the idea told
    reads: Reads
    read_bytes: float  # of a step, that have to be read
    moved_bytes: float | None  # of a step, as the compiler counts them; None = it does not
    cache_bytes: float  # that have to be kept of a row
    allocated_bytes: int  # of the cache of that row as the program has it
    same_answers: bool | None = None  # whether drafted answers are the model's; None = no drafts
    options: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of a step, for each repetition

    @property
    def rate(self) -> float:
        """Tokens per second of the best repetition."""
        return self.reads.tokens / min(self.seconds)

    def per_token(self, amount: float) -> float:
        """Return an amount of a step for each token that it yields."""
        return amount / self.reads.tokens

    def figures(self) -> dict[str, Any]:
        """Return everything for JSON; the bytes are of a token."""
        moved = self.moved_bytes
        return {
            "idea": self.name,
            "options": self.options,
            "perplexity": self.perplexity,
            "kl_divergence": self.kl_divergence,
            "top1_agreement": self.top1_agreement,
            "tokens_per_s": self.rate,
            "tokens_per_step": self.reads.tokens,
            "read_bytes": self.per_token(self.read_bytes),
            "moved_bytes": None if moved is None else self.per_token(moved),
            "cache_bytes": self.cache_bytes,
            "allocated_bytes": self.allocated_bytes,
            "same_answers": self.same_answers,
            "told": {k: v if math.isfinite(v) else None for k, v in self.told.items()},
        }


@dataclass
class Report:
    """Everything about a run; the first result is that of the model without an idea."""

    about: dict[str, str]  # what it was measured on, name -> text
    context: int  # tokens in the cache of a decode step
    results: list[Result] = field(default_factory=list)


def show(report: Report, as_json: bool) -> None:
    """Print a report on standard output."""
    if as_json:
        found = [result.figures() for result in report.results]
        print(json_line({**report.about, "context": report.context, "ideas": found}), flush=True)
        return
    lines = [f"{name}: {text}" for name, text in report.about.items()]
    lines = [part for line in lines for part in fold(line, columns())]
    lines += ["", *fitted([HEADER, *map(_cells, report.results)], 1, columns()), ""]
    for result in report.results:
        said = [f"{name} {x}" for name, x in result.options.items() if x is not None]
        said += [f"{name} {value:.4g}" for name, value in result.told.items()]
        if result.same_answers is not None:
            said.append(f"greedy answers the same: {'yes' if result.same_answers else 'no'}")
        lines += fold(f"{result.name}: {', '.join(said)}", columns(100)) if said else []
    lines += ["", *fold(NOTE.format(context=report.context), columns(100), indent="")]
    print(join_lines(lines), flush=True)


def _cells(result: Result) -> tuple[str, ...]:
    moved = result.moved_bytes
    return (
        result.name,
        f"{result.perplexity:.6g}",
        f"{result.kl_divergence:.4g}",
        f"{100 * result.top1_agreement:.2f} %",
        f"{result.rate:.4g}",
        f"{result.reads.tokens:.3g}",
        human_size(result.per_token(result.read_bytes)),
        "?" if moved is None else human_size(result.per_token(moved)),
        human_size(result.cache_bytes),
    )


def draw(report: Report, path: str) -> None:
    """Write the picture: quality against speed, and against the bytes that have to be read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    shown = (
        ("tokens per second, one row", lambda result: result.rate),
        ("MB to read for a token", lambda result: result.per_token(result.read_bytes) / 1e6),
    )
    for axes, (label, value) in zip(figure.subplots(1, 2, sharey=True), shown, strict=True):
        for number, result in enumerate(report.results):
            place = value(result), result.kl_divergence
            axes.plot(*place, "o" if number else "k*", markersize=7 if number else 11)
            # Below the point for the model itself, where ideas that change nothing are, too.
            shift = (6, 5) if number else (6, -12)
            axes.annotate(result.name, place, xytext=shift, textcoords="offset points", fontsize=8)
        axes.set_yscale("symlog", linthresh=1e-6)  # 0 is where the model itself is
        axes.margins(x=0.35, y=0.1)
        axes.set_xlabel(label)
        axes.grid(True, which="major", alpha=0.3)
    figure.axes[0].set_ylabel("KL(full model || this), nats a token")
    figure.suptitle(f"{report.about['model']}, {report.about['device']}", fontsize=10, wrap=True)
    figure.savefig(path, dpi=110)
