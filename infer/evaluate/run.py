"""What `python -m infer.evaluate` does once its flags are parsed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.errors import GLMError, UsageError
from infer.evaluate import report, variants
from infer.evaluate.rows import BUNDLED, BadRows, data_file, parse_row, read_rows, unplaced
from infer.startup import find_choice, note_demo_model, open_engine


@dataclass(frozen=True)
class Settings:
    """The flags of the command, but those of several processes."""

    choice: ModelChoice
    options: EngineOptions
    task: str
    data: str | None
    format: str
    max_bad: int
    batch_size: int
    compare: tuple[variants.Variant, ...] | None
    window: int | None
    stride: int | None
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    shots: int
    two_pass: bool
    json: bool
    predictions: str | None
    overwrite: bool


def run(settings: Settings, given: Mapping[str, str]) -> int:
    """Measure what the flags ask for and print it; returns the exit code.

    Args:
        settings: the flags.
        given: destination -> flag, of those that differ from their defaults.
    """
    check_flags(settings, given)
    if settings.task == "generation":
        from infer.evaluate.generation import run as measure
    elif settings.task == "choice":
        from infer.evaluate.choice import run as measure
    else:
        measure = _perplexity
    report.show({"task": settings.task, **measure(settings)}, settings.json)
    return 0


def check_flags(settings: Settings, given: Mapping[str, str]) -> None:
    """Raise UsageError for flags that have no effect together; `given` as in `run`."""
    task = settings.task
    generates, scores = task == "generation", settings.predictions and not settings.data
    rules = (
        (("compare", "window", "stride"), task == "perplexity", "--task perplexity"),
        (("shots", "two_pass"), task == "choice", "--task choice"),
        (("temperature", "top_p", "seed"), generates, "--task generation"),
        (("max_new_tokens",), generates or settings.two_pass, "--task generation or --two-pass"),
        (("format",), task != "choice", "--task perplexity or generation"),
        (("predictions",), task != "perplexity", "--task generation or choice"),
        (("overwrite",), settings.predictions, "--predictions"),
    )
    for names, fits, needed in rules:
        for name in names:
            if name in given and not fits:
                raise UsageError(
                    f"{given[name]} needs {needed}",
                    f"With --task {task} and the other flags it has no effect.",
                    "Leave it out, or add what it needs.",
                )
    if generates and scores:
        used = {"task", "predictions", "max_bad", "json", "debug"}
        if idle := [flag for name, flag in given.items() if name not in used]:
            raise UsageError(
                f"{', '.join(idle)}: no effect",
                f"Without --data, {settings.predictions} is read and scored; no model answers.",
                "Leave them out, or name the questions to answer: --data F.",
            )
    if task == "choice" and not settings.data:
        raise UsageError(
            "--task choice needs --data",
            "No questions are bundled.",
            "Name a csv file or a folder.",
        )
    if settings.compare:
        variants.check(settings.compare, settings.choice)


def _perplexity(settings: Settings) -> dict[str, Any]:
    from infer.evaluate import compare, perplexity

    bad = BadRows(settings.max_bad)
    parse = partial(parse_row, fmt=settings.format)
    rows = bad.keep(read_rows(data_file(settings.data)), parse)
    bad.check(len(rows))
    note_demo_model(settings.choice)
    settings = _check_folder(settings)
    prepare = partial(
        perplexity.prepare, rows=rows, bad=bad, window=settings.window, stride=settings.stride
    )
    if settings.compare:
        figures = {"variants": compare.compare(settings, settings.compare, prepare)}
    else:
        contents = {"rows": unplaced(rows)}
        batch = settings.batch_size
        engine = open_engine(settings.choice, settings.options, rows=batch, contents=contents)
        [total] = perplexity.measure([engine], prepare(engine), batch)
        figures = total.figures()
    return {"data": settings.data or BUNDLED, "bad_rows": bad.count, **figures}


def _check_folder(settings: Settings) -> Settings:
    """Raise UsageError for what the model cannot do, before its weights are loaded.

    Returns:
        The settings, with the folder of a model that was downloaded.
    """
    from convert.loading.folder import open_folder
    from infer.engine.load import demo_folder
    from infer.evaluate import perplexity
    from infer.memory.budget import DEFAULT_CONTEXT

    choice = find_choice(settings.choice)
    settings = dataclasses.replace(settings, choice=choice)
    try:
        folder = open_folder(choice.path or demo_folder(), **choice.form)
    except GLMError:  # loading reports it in its own words
        return settings
    longest = min(settings.options.max_length or DEFAULT_CONTEXT, folder.config.seq_length)
    prefix = len(folder.tokenizer.prefix_ids)
    perplexity.fit_windows(settings.window, settings.stride, longest, prefix)
    if settings.compare:
        variants.check_folder(settings.compare, choice, folder)
    return settings
