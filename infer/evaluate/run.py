"""What `python -m infer.evaluate` does once its flags are parsed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.errors import UsageError
from infer.evaluate import report, variants


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

    `given` has the destinations and names of the flags that differ from their defaults.
    """
    check_flags(settings, given)
    if settings.task == "generation":
        from infer.evaluate.generation import run as measure
    elif settings.task == "choice":
        from infer.evaluate.choice import run as measure
    else:
        from infer.evaluate.perplexity import run as measure
    report.show({"task": settings.task, **measure(settings)}, settings.json)
    return 0


def check_flags(settings: Settings, given: Mapping[str, str]) -> None:
    """Raise UsageError for flags that have no effect together; `given` as in `run`."""
    task, two_pass = settings.task, settings.two_pass
    for needed, fits, names in (
        ("--task perplexity", task == "perplexity", "compare window stride"),
        ("--task choice", task == "choice", "shots two_pass"),
        ("--task generation", task == "generation", "temperature top_p seed"),
        ("--task generation or --two-pass", task == "generation" or two_pass, "max_new_tokens"),
        ("--task perplexity or generation", task != "choice", "format"),
        ("--task generation or choice", task != "perplexity", "predictions"),
        ("--predictions", settings.predictions, "overwrite"),
    ):
        if idle := [given[name] for name in names.split() if name in given and not fits]:
            why = f"With --task {task} and the other flags it has no effect."
            raise UsageError(
                f"{idle[0]} needs {needed}", why, "Leave it out, or add what it needs."
            )
    if task == "generation" and settings.predictions and not settings.data:
        used = {"task", "predictions", "max_bad", "json", "debug"}
        if idle := [flag for name, flag in given.items() if name not in used]:
            raise UsageError(
                f"{', '.join(idle)}: no effect",
                f"Without --data, {settings.predictions} is read and scored; no model answers.",
                "Leave them out, or name the questions to answer: --data F.",
            )
    if task == "choice" and not settings.data:
        raise UsageError(
            "--task choice needs --data", "No questions are bundled.", "Name a csv file or folder."
        )
    if settings.compare:
        variants.check_flags(settings.compare, settings.choice)
