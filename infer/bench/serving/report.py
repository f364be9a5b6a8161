"""What the clients of servers saw, as a table for a terminal of any width and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from glm2_jax.cli.tables import fold, table
from glm2_jax.escape import join_lines
from infer.bench.serving.figures import Figures, Times
from infer.bench.serving.traffic import Level

HEADER = (
    "server", "load", "requests", "failed", "tok/s", "req/s", "TTFT p50", "p99",
    "inter-token p50", "p90", "p99", "quiet", "end to end p50", "p99", "goodput", "cores",
)  # fmt: skip
NOTE = (
    "Times are in ms, as the client saw them. TTFT: time to first token, from when a request was "
    "due. inter-token: between two parts of an answer, which are one token each where the server "
    "sends each token. quiet: its median while no request waited for its first token. goodput: the "
    "share of all requests that were answered with TTFT <= {ttft:g} ms and mean inter-token "
    "latency <= {itl:g} ms. cores: CPU time of the server per second."
)
_BUSY = 0.5  # of a core: more of it for the generator changes what it measures


@dataclass(frozen=True)
class Result:
    """A measurement of a server, and the CPU seconds that both sides took for it."""

    server: str
    level: Level
    figures: Figures
    client_cpu_s: float
    server_cpu_s: float | None = None  # of a server that was not started here it is unknown

    @property
    def cores(self) -> float | None:
        """How many cores the server used on average."""
        return None if self.server_cpu_s is None else self.server_cpu_s / self.figures.seconds

    @property
    def client_share(self) -> float:
        """The share of a core that the load generator used."""
        return self.client_cpu_s / self.figures.seconds


@dataclass
class Report:
    """Everything about a run; results are added while it goes."""

    about: dict[str, str]  # what it was measured on, name -> text, in order
    ttft_limit: float  # seconds
    itl_limit: float
    results: list[Result] = field(default_factory=list)
    complete: bool = False


def render(report: Report, columns: int) -> str:
    """Write the report for people, at most so many columns wide where no single word is wider."""
    lines = [f"{name}: {text}" for name, text in report.about.items()]
    if report.results:
        rows = [_cells(result) for result in report.results]
        cells = table([HEADER, *rows], texts=2)
        if max(map(len, cells)) > columns:
            cells = [line for row in rows for line in _record(row)]
        lines += ["", *cells, *_comparisons(report.results), *_problems(report.results)]
        limits = {"ttft": 1e3 * report.ttft_limit, "itl": 1e3 * report.itl_limit}
        lines += ["", NOTE.format(**limits)]
    if not report.complete:
        lines.append("not measured: the rest, as it was stopped before the end")
    return join_lines(part for line in lines for part in fold(line, columns))


def as_json(report: Report) -> dict[str, Any]:
    """Return the report for programs: seconds, no rounded figures."""
    return {
        "about": report.about,
        "limits": {"ttft": report.ttft_limit, "inter_token": report.itl_limit},
        "results": [_flat(result) for result in report.results],
        "complete": report.complete,
    }


def _flat(result: Result) -> dict[str, Any]:
    found = result.figures
    return {
        "server": result.server,
        **asdict(result.level),
        **asdict(found),
        "output_tokens_per_s": found.tokens_per_s,
        "requests_per_s": found.requests_per_s,
        "goodput": found.goodput,
        "inter_token_p99_to_quiet": found.jitter,
        "client_cpu_s": result.client_cpu_s,
        "server_cpu_s": result.server_cpu_s,
    }


def _comparisons(results: Sequence[Result]) -> list[str]:
    """Return one line for each level that can be compared: with the first one, with the peer."""
    lines, first = [], {}
    for result in results:
        name, rate = f"{result.server}, {result.level.name}", result.figures.tokens_per_s
        base = first.setdefault(result.server, result)
        more = []
        if base is not result and base.figures.tokens_per_s:
            ratio = rate / base.figures.tokens_per_s
            more.append(f"{ratio:.2f} x the tok/s of {base.level.name}")
        for other in results:
            theirs = other.figures.tokens_per_s
            if other.level == result.level and other.server != result.server and theirs:
                more.append(f"{rate / theirs:.2f} x the tok/s of {other.server}")
        if (jitter := result.figures.jitter) is not None:
            more.append(f"inter-token p99 is {jitter:.2f} x the quiet median")
        if more:
            lines.append(f"{name}: {', '.join(more)}")
    return ["", *lines] if lines else []


def _problems(results: Sequence[Result]) -> list[str]:
    lines = []
    for result in results:
        name = f"{result.server}, {result.level.name}"
        kinds = (f"{kind} ({number})" for kind, number in result.figures.errors.items())
        if result.figures.errors:
            lines.append(f"{name}: failed: {', '.join(kinds)}")
        if result.client_share > _BUSY:
            share = f"{100 * result.client_share:.0f} %"
            lines.append(f"{name}: the load generator itself took {share} of a core")
    return lines


def _cells(result: Result) -> tuple[str, ...]:
    found = result.figures
    return (
        result.server,
        result.level.name,
        str(found.requests),
        str(sum(found.errors.values())),
        f"{found.tokens_per_s:.4g}",
        f"{found.requests_per_s:.3g}",
        *_ms(found.ttft, "p50", "p99"),
        *_ms(found.inter_token, "p50", "p90", "p99"),
        *_ms(found.quiet, "p50"),
        *_ms(found.end_to_end, "p50", "p99"),
        f"{100 * found.goodput:.0f} %",
        "?" if result.cores is None else f"{result.cores:.2f}",
    )


def _ms(times: Times | None, *names: str) -> list[str]:
    if times is None:
        return ["?"] * len(names)
    values = [1e3 * getattr(times, name) for name in names]
    return [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values]


def _record(row: Sequence[str]) -> list[str]:
    """Return a row of the table as lines, for a terminal that is too narrow for it."""
    server, level, requests, failed, tokens, rate, *times, goodput, cores = row
    first, first99, gap, gap90, gap99, quiet, whole, whole99 = times
    return [
        f"{server}, {level}: {tokens} tok/s, {rate} req/s, {requests} requests, {failed} failed",
        f"  TTFT p50 {first}, p99 {first99}; inter-token p50 {gap}, p90 {gap90}, p99 {gap99}, "
        f"quiet {quiet}; end to end p50 {whole}, p99 {whole99} ms",
        f"  goodput {goodput}, cores {cores}",
    ]
