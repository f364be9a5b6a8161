"""`python -m infer.generate --dry-run`: the plans that its flags ask for, and the compiler's word
on them. No weights are read and no device is started."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from convert.loading.folder import read_config
from glm2_jax.cli.main import EXIT_DEVICE
from glm2_jax.cli.messages import human_size, note
from glm2_jax.config import PRESETS, GLMConfig
from glm2_jax.errors import UsageError
from glm2_jax.escape import escape_controls, join_lines, json_line
from glm2_jax.limits import PREFILL_CHUNK
from glm2_jax.schemes import SCHEMES, asked_scheme
from infer.memory import compiler
from infer.memory.budget import (
    DEFAULT_CONTEXT,
    asked_mesh,
    check_context,
    find_budget,
    prefix_tokens,
    share_budget,
)
from infer.memory.compiler import Verdict
from infer.memory.plan import make_plan
from infer.memory.sheet import Sheet, as_json, make_sheet, render, wrapped

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
        print(json_line(as_json(sheet) | {"compiled": found}))
    else:
        columns = shutil.get_terminal_size((100, 24)).columns
        print(join_lines(render(sheet, columns)), flush=True)
        for line in () if verdicts is None else render_verdicts(verdicts, columns):
            print(escape_controls(line), flush=True)  # each as soon as it is known
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
            yield from wrapped(f"the compiler's own figures: {compiler.ABOUT}", columns)
        empty = False
        plan = verdict.plan
        peaks = ("step", verdict.step), ("prompt", verdict.prompt)
        said = [f"{name} {human_size(size)}" for name, size in peaks if size is not None]
        if verdict.fits is False:
            said.append("does not fit")
        if verdict.problem:
            said.append(verdict.problem)
        text = f"{plan.precision.name}, {plan.context:,} tokens: {', '.join(said)}"
        yield from wrapped(f"{text}; planned {human_size(plan.total)}", columns)
    if empty:
        yield from wrapped(compiler.EXTRA, columns)


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
        from convert.loading.folder import open_folder
        from glm2_jax.cli.flags import model_options
        from infer.startup import model_folder

        found = open_folder(str(model_folder(args)), **model_options(args))
        return args.model, found.config, None if found.scheme is None else found.scheme.name
    if args.config is None:
        note(f"no --model and no --config given: planning for {DEFAULT_CONFIG}")
    name = args.config or DEFAULT_CONFIG
    if name in PRESETS:
        return name, PRESETS[name], "int4-row" if name.endswith("-int4") else None
    return name, read_config(Path(name), args.rope_scaling, args.family), None


def _contexts(config: GLMConfig, asked: int | None) -> list[int]:
    if asked is not None:
        return [asked]
    return sorted({min(context, config.seq_length) for context in CONTEXTS})
