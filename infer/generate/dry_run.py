"""`python -m infer.generate --dry-run`: print memory plans, and what the compiler says of them.

No weights are read and no device is started.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from convert.loading.folder import open_folder, read_config
from glm2_jax.cli.main import EXIT_DEVICE
from glm2_jax.cli.messages import human_size, note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.tables import columns, fold
from glm2_jax.config import GLMConfig
from glm2_jax.errors import UsageError
from glm2_jax.escape import escape_controls, join_lines, json_line
from glm2_jax.limits import PREFILL_CHUNK
from glm2_jax.schemes import SCHEMES, asked_scheme
from infer.memory import compiler
from infer.memory.budget import check_context, from_choice
from infer.memory.compiler import Verdict
from infer.memory.plan import Plan
from infer.memory.sheet import Sheet, as_json, make_sheet, render
from infer.startup import find_choice

DEFAULT_CONFIG = "chatglm2-6b"
CONTEXTS = (2048, 8192, 32768)


@dataclass(frozen=True)
class Settings:
    """The flags of a dry run."""

    choice: ModelChoice
    options: EngineOptions
    config: str | None
    batch_size: int
    num_processes: int | None
    json: bool


def run(settings: Settings) -> int:
    """Print the plans; returns 5 where nothing fits, else 0."""
    choice, options = settings.choice, settings.options
    name, config, stored = _model(choice, settings.config)
    check_context(options.max_length, config)
    budget, more = from_choice(choice, options, settings.num_processes or 1)
    mesh = more["mesh"]
    asked = asked_scheme(choice.quantize, choice.quantize_embeddings, stored=stored, model=name)
    if mesh is not None:
        from glm2_jax.sharding import check_mesh

        check_mesh(config, dict(mesh), SCHEMES.get(asked or ""))
    contexts = [min(context, config.seq_length) for context in CONTEXTS]
    sheet = make_sheet(
        name,
        config,
        budget,
        stored=stored,
        contexts=[options.max_length] if options.max_length else sorted(set(contexts)),
        batches=sorted({1, settings.batch_size}),
        dtype=choice.dtype,
        quantize=asked,
        **more,
    )
    compiles = mesh is None and compiler.knows(choice.device)  # only for one device
    verdicts = _verdicts(sheet, choice, options)
    if settings.json:
        compiled = [_as_json(verdict) for verdict in verdicts] if compiles else None
        print(json_line(as_json(sheet) | {"compiled": compiled}))
        return EXIT_DEVICE if sheet.nothing_fits else 0
    width = columns(100)
    print(join_lines(render(sheet, width)), flush=True)
    if compiles:
        about = f"the compiler's own figures: {compiler.ABOUT}"
        print("", *fold(about if compiler.installed() else compiler.EXTRA, width), sep="\n")
        for verdict in verdicts:  # each as soon as it is known
            for line in fold(_line(verdict), width):
                print(escape_controls(line), flush=True)
    return EXIT_DEVICE if sheet.nothing_fits else 0


def _verdicts(sheet: Sheet, choice: ModelChoice, options: EngineOptions) -> Iterator[Verdict]:
    """Yield the compiler's verdict on every precision, one row; none where it is not installed."""
    if not compiler.installed():
        return
    context = check_context(options.max_length, sheet.config)
    more: Any = {"chunk": options.prefill_chunk or PREFILL_CHUNK, "kv": options.kv}
    for precision, label in sheet.labels.items():
        plan = Plan(sheet.config, precision, context, platform=sheet.budget.platform, **more)
        note(f"compiling {label}, {context:,} tokens, for {choice.device}")
        yield compiler.ask(plan, choice.device, sheet.budget.memory)


def _line(verdict: Verdict) -> str:
    plan = verdict.plan
    peaks = ("step", verdict.step), ("prompt", verdict.prompt)
    said = [f"{name} {human_size(size)}" for name, size in peaks if size is not None]
    said += ["does not fit"] * (verdict.fits is False) + [verdict.problem] * bool(verdict.problem)
    text = f"{plan.precision.name}, {plan.context:,} tokens: {', '.join(said)}"
    return f"{text}; planned {human_size(plan.total)}"


def _as_json(verdict: Verdict) -> dict[str, Any]:
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


def _model(choice: ModelChoice, config: str | None) -> tuple[str, GLMConfig, str | None]:
    """Return the name, configuration and stored quantization of the model."""
    if choice.path is not None:
        if config is not None:
            raise UsageError("--config and --model each name a model", fix="Leave one of them out.")
        found = open_folder(str(find_choice(choice).path), **choice.form)
        return choice.path, found.config, None if found.scheme is None else found.scheme.name
    if config is None:
        note(f"no --model and no --config given: planning for {DEFAULT_CONFIG}")
    name = config or DEFAULT_CONFIG
    return name, *read_config(name, choice.rope_kind, choice.family)
