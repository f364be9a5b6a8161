"""What `python -m infer.generate --dry-run` prints: plans by weights, context and batch, as text
and as JSON. No weights are read and no device is started."""

from __future__ import annotations

import argparse
import difflib
import json
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.cli import EXIT_DEVICE, human_size, note
from convert.glm_layout import is_native, published_keys
from glm2_jax.config import PRESETS, GLMConfig
from glm2_jax.errors import CheckpointError, UsageError
from glm2_jax.limits import PREFILL_CHUNK
from glm2_jax.schemes import SCHEMES, asked_scheme
from infer.memory import compiler
from infer.memory.budget import (
    DEFAULT_CONTEXT,
    Budget,
    asked_mesh,
    check_context,
    count_devices,
    find_budget,
    prefix_tokens,
    share_budget,
)
from infer.memory.compiler import Verdict
from infer.memory.plan import (
    Plan,
    Precision,
    largest_context,
    make_plan,
    precisions,
    rate_bound,
)
from infer.memory.shares import Sizes

DEFAULT_CONFIG = "chatglm2-6b"
CONTEXTS = (2048, 8192, 32768)
IGNORED = (  # flags that decide nothing of the plan
    "prompt",
    "prompt_file",
    "batch_file",
    "history",
    "system",
    "adapter",
    "output",
)
WIDE = 68  # columns of the table, without the first
_BOUND = "a bound from the memory's bandwidth, not a measurement"


@dataclass(frozen=True)
class Sheet:
    """All plans for one model at one place.

    Attributes:
      name: of the model. stored: the scheme of a folder that is quantised.
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


def run(args: argparse.Namespace) -> int:
    """Prints the plans; returns 5 where nothing fits, else 0."""
    from infer.options import sampling_params

    sampling_params(args)  # what is refused without --dry-run is refused with it
    _say_ignored(args)
    name, config, stored = _model(args)
    check_context(args.max_length, config.seq_length)
    mesh = asked_mesh(args)
    asked = asked_scheme(args.quantize, args.quantize_embeddings, stored=stored, model=name)
    if mesh is not None:
        from glm2_jax.sharding import check_mesh

        check_mesh(config, dict(mesh), SCHEMES.get(asked or ""))
    sheet = make_sheet(
        name,
        config,
        share_budget(find_budget(args.device, args.memory_limit), mesh, args),
        stored=stored,
        contexts=_contexts(config, args.max_length),
        batches=sorted({1, args.batch_size}),
        dtype=args.dtype,
        quantize=asked,
        chunk=args.prefill_chunk or PREFILL_CHUNK,
        columns=1 + args.speculate,
        prefix=prefix_tokens(args),
        mesh=mesh,
    )
    one_device = mesh is None and compiler.knows(args.device)  # the compiler is asked of one
    verdicts = _verdicts(sheet, args) if one_device else None
    if args.json:
        found = None if verdicts is None else [_verdict_json(verdict) for verdict in verdicts]
        print(json.dumps(as_json(sheet) | {"compiled": found}, ensure_ascii=False))
    else:
        columns = shutil.get_terminal_size((100, 24)).columns
        print("\n".join(render(sheet, columns)), flush=True)
        for line in () if verdicts is None else render_verdicts(verdicts, columns):
            print(line, flush=True)  # each as soon as it is known
    return EXIT_DEVICE if sheet.nothing_fits else 0


def _say_ignored(args: argparse.Namespace) -> None:
    given = [flag for flag in IGNORED if getattr(args, flag) not in (None, False)]
    if given:
        names = ", ".join(f"--{flag.replace('_', '-')}" for flag in given)
        note(f"--dry-run answers nothing, and the plan is without: {names}")


def _verdicts(sheet: Sheet, args: argparse.Namespace) -> Iterator[Verdict]:
    """The compiler's word on every precision, one row, with the context that was asked for; none
    where it is not installed."""
    if not compiler.installed():
        return
    context = min(args.max_length or DEFAULT_CONTEXT, sheet.config.seq_length)
    chunk = args.prefill_chunk or PREFILL_CHUNK
    for precision, label in sheet.labels.items():
        plan = make_plan(
            sheet.config, precision, context, platform=sheet.budget.platform, chunk=chunk
        )
        note(f"compiling {label}, {context:,} tokens, for {args.device}")
        yield compiler.ask(sheet.config, plan, args.device, sheet.budget.memory, chunk)


def render_verdicts(verdicts: Iterable[Verdict], columns: int) -> Iterator[str]:
    """The compiler's word for people, each line as soon as it is known."""
    yield ""
    empty = True
    for verdict in verdicts:
        if empty:
            yield from _wrapped(f"the compiler's own figures: {compiler.ABOUT}", columns)
        empty = False
        plan = verdict.plan
        peaks = ("step", verdict.step), ("prompt", verdict.prompt)
        said = [f"{name} {human_size(size)}" for name, size in peaks if size is not None]
        if verdict.fits is False:
            said.append("does not fit")
        if verdict.problem:
            said.append(verdict.problem)
        text = f"{plan.precision.name}, {plan.context:,} tokens: {', '.join(said)}"
        yield from _wrapped(f"{text}; planned {human_size(plan.total)}", columns)
    if empty:
        yield from _wrapped(compiler.EXTRA, columns)


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    plan = verdict.plan
    return {
        "dtype": plan.precision.dtype,
        "quantize": plan.precision.quantize,
        "context": plan.context,
        "batch": plan.batch,
        "step_peak": verdict.step,
        "prompt_peak": verdict.prompt,
        "planned": plan.total,
        "fits": verdict.fits,
        "problem": verdict.problem,
    }


def _model(args: argparse.Namespace) -> tuple[str, GLMConfig, str | None]:
    """Name, configuration and stored scheme of the model that the flags name."""
    if args.model is not None:
        if args.config is not None:
            raise UsageError("--config and --model each name a model", fix="Leave one of them out.")
        from convert.folder import open_folder
        from infer.options import model_folder

        found = open_folder(str(model_folder(args)), rope_kind=args.rope_scaling)
        return args.model, found.config, None if found.scheme is None else found.scheme.name
    if args.config is None:
        note(f"no --model and no --config given: planning for {DEFAULT_CONFIG}")
    name = args.config or DEFAULT_CONFIG
    if name in PRESETS:
        return name, PRESETS[name], "int4-row" if name.endswith("-int4") else None
    return name, read_config(Path(name), args.rope_scaling), None


def read_config(path: Path, rope_kind: str | None) -> GLMConfig:
    """The configuration in a file that was named in place of a published model."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        near = difflib.get_close_matches(str(path), PRESETS, n=1)
        raise CheckpointError(
            f"no configuration {path}" + (f" (did you mean {near[0]}?)" if near else ""),
            f"It is no published name, and as a file: {error.strerror}.",
            f"Name a config.json, or one of {', '.join(PRESETS)}.",
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON", str(error)) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a configuration", "It holds no JSON object.")
    if is_native(raw):
        raw = published_keys(raw)
    return GLMConfig.from_hf(raw, rope_kind=rope_kind)


def _contexts(config: GLMConfig, asked: int | None) -> list[int]:
    if asked is not None:
        return [asked]
    return sorted({min(context, config.seq_length) for context in CONTEXTS})


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
        yield from _wrapped(f"{head}, on {budget.name}: {memory}{speed}", columns)
    else:
        where = f"{count_devices(sheet.mesh)} devices ({budget.name}, {_mesh_text(sheet)})"
        yield from _wrapped(f"{head}, on {where}: {memory}{speed} each", columns)
        yield from _wrapped("All sizes are those of each device.", columns)
    yield ""
    first = max(map(len, ("weights in", *sheet.labels.values())))
    yield from _wide(sheet, first) if columns >= first + WIDE else _narrow(sheet)
    yield ""
    for batch in dict.fromkeys(batch for _, batch in sheet.longest):
        found = [(name, n) for (name, rows), n in sheet.longest.items() if rows == batch]
        text = ", ".join(f"{name} {f'{n:,}' if n else 'none'}" for name, n in found)
        yield from _wrapped(f"longest context that fits, batch {batch}: {text}", columns)
    if budget.bandwidth is not None:
        yield from _wrapped(f"tokens/s: {_BOUND}; all rows of a batch together.", columns)
    else:
        yield from _wrapped("tokens/s: the memory's bandwidth is not known here.", columns)
    temporary = "temporary is the most that a program needs while it runs, jax's own memory apart"
    yield from _wrapped(f"{temporary}, which is in the total.", columns)


def _mesh_text(sheet: Sheet) -> str:
    from glm2_jax.mesh import mesh_text

    return mesh_text(dict(sheet.mesh or ()))


def _wrapped(text: str, columns: int) -> list[str]:
    return textwrap.wrap(
        text,
        max(columns, 20),
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,  # flags and names of packages can be copied
    )


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
