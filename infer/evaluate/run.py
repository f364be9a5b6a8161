"""What `python -m infer.evaluate` does once its flags are parsed."""

from __future__ import annotations

from collections.abc import Mapping

from glm2_jax.errors import UsageError
from infer.evaluate import report
from infer.evaluate.options import Settings


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
    compared = settings.compare or ()
    for name in ("quantize", "dtype") if compared else ():
        value = getattr(settings.choice, name)
        if value not in (None, "auto") and all(getattr(one, name) for one in compared):
            raise UsageError(
                f"--{name} {value} has no effect",
                f"--compare names the {name} of every variant.",
                "Leave it out.",
            )
