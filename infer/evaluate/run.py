"""What `python -m infer.evaluate` does once its flags are parsed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm2_jax.cli.messages import human_size
from glm2_jax.cli.tables import columns, fold, table
from glm2_jax.errors import UsageError
from glm2_jax.escape import join_lines, json_line
from infer.evaluate.options import Settings

_COLUMNS = {  # of a comparison: key -> heading
    "dtype": "dtype",
    "quantization": "weights",
    "weight_bytes": "size",
    "perplexity": "perplexity",
    "mean_abs_delta_logit": "mean |d|",
    "max_abs_delta_logit": "max |d|",
    "kl_divergence": "KL",
    "top1_agreement": "same top",
}
_COMPARED = (
    "compared with the first line, over the positions that count: |d| of all logits; KL(first || "
    "this) in nats; how often the most likely token agrees"
)


def run(settings: Settings, given: Mapping[str, str]) -> int:
    """Measure what the flags ask for and print it; returns the exit code.

    `given` has the destinations and names of the flags that differ from their defaults.
    """
    check_flags(settings, given)
    if settings.task == "cases":
        from infer.evaluate.cases.run import run as run_cases

        return run_cases(settings)
    if settings.task == "rate":
        from infer.evaluate.rate.run import run as run_rate

        return run_rate(settings, given)
    if settings.task == "generation":
        from infer.evaluate.generation import run as measure
    elif settings.task == "choice":
        from infer.evaluate.choice import run as measure
    else:
        from infer.evaluate.perplexity import run as measure
    show({"task": settings.task, **measure(settings)}, settings.json)
    return 0


def check_flags(settings: Settings, given: Mapping[str, str]) -> None:
    """Raise UsageError for flags that have no effect together; `given` as in `run`."""
    task, two_pass = settings.task, settings.two_pass
    draws = task in ("generation", "cases")
    for needed, fits, names in (
        ("--task perplexity", task == "perplexity", "compare against window stride"),
        ("--task choice", task == "choice", "shots two_pass"),
        ("--task generation or cases", draws, "temperature top_p"),
        ("--task generation, cases or rate", draws or task == "rate", "seed"),
        ("--task generation or --two-pass, or --task cases", draws or two_pass, "max_new_tokens"),
        ("--task perplexity or generation", task in ("perplexity", "generation"), "format"),
        ("--task generation or choice", task in ("generation", "choice"), "predictions"),
        ("--task perplexity, generation or choice", task not in ("cases", "rate"), "data max_bad"),
        ("--task cases", task == "cases", "cases repeat junit"),
        ("--task rate", task == "rate", "sheet answers scale limit rates drop_inattentive judge"),
        ("--predictions or --task rate", settings.predictions or task == "rate", "overwrite"),
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
    if task == "cases" and not settings.cases:
        raise UsageError("--task cases needs --cases FILE.yml", fix="Name a file of cases.")
    if settings.repeat > 1 and not settings.temperature:
        why = "Greedy answers are all the same."
        raise UsageError(f"--repeat {settings.repeat} needs --temperature", why, "Add it.")
    compared = settings.compare or ()
    for name in ("quantize", "dtype") if compared else ():
        value = getattr(settings.choice, name)
        if value not in (None, "auto") and all(getattr(one, name) for one in compared):
            raise UsageError(
                f"--{name} {value} has no effect",
                f"--compare names the {name} of every variant.",
                "Leave it out.",
            )


def show(results: Mapping[str, Any], as_json: bool) -> None:
    """Print results on standard output."""
    if as_json:
        print(json_line(results, allow_nan=False), flush=True)
        return
    lines = []
    for key, value in results.items():
        if isinstance(value, list):
            compared = key == "variants"
            heads = _COLUMNS if compared else {name: name.replace("_", " ") for name in value[0]}
            rows = [_with_cache(row) for row in value] if compared else value
            cells = [[_cell(name, row[name]) for name in heads] for row in rows]
            lines += ["", *table([list(heads.values()), *cells], texts=2 if compared else 1)]
            lines += ["", *fold(_COMPARED, columns(80), indent="")] if compared else []
        elif value is not None:
            lines.append(f"{key.replace('_', ' '):20}  {_cell(key, value)}")
    print(join_lines(lines).strip("\n"), flush=True)


def _with_cache(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the figures of a variant, the form of its cache named with that of its weights."""
    return row if row["kv"] == "auto" else {**row, "quantization": f"{row['quantization']}, kv"}


def _cell(key: str, value: Any) -> str:
    if key == "weight_bytes":
        return human_size(value)
    if key in ("top1_agreement", "accuracy", "mean_of_files"):
        return f"{100 * value:.2f} %"
    digits = 6 if key == "perplexity" else 4
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
