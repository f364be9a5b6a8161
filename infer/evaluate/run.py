"""What `python -m infer.evaluate` does once its flags are parsed."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from glm2_jax.errors import UsageError
from infer.evaluate import report, variants
from infer.evaluate.rows import BUNDLED, BadRows, data_file, parse_text_or_pair, read_rows
from infer.options import open_engine, say_which_model


def run(args: argparse.Namespace) -> int:
    """Measures what the flags ask for and prints it; returns the exit code."""
    check_flags(args)
    if args.task == "generation":
        from infer.evaluate import generation

        results = generation.run(args)
    elif args.task == "choice":
        from infer.evaluate import choice

        results = choice.run(args)
    else:
        results = _perplexity(args)
    report.show({"task": args.task, **results}, args.json)
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that have no meaning together."""
    only = {
        "perplexity": ("compare", "window", "stride"),
        "choice": ("shots", "two_pass"),
    }
    for task, names in only.items():
        for name in names:
            if args.task != task and getattr(args, name):
                raise UsageError(f"--{name.replace('_', '-')} goes with --task {task}")
    if args.task == "perplexity" and args.predictions:
        raise UsageError("--predictions goes with --task generation or choice")
    if args.overwrite and not args.predictions:
        raise UsageError("--overwrite goes with --predictions")
    if args.task == "choice" and not args.data:
        raise UsageError(
            "--task choice needs --data",
            "No questions are bundled.",
            "Name a csv file or a folder.",
        )
    if args.compare:
        variants.check(args)


def _perplexity(args: argparse.Namespace) -> dict[str, Any]:
    from infer.evaluate import compare, perplexity

    bad = BadRows(args.max_bad)
    rows = bad.keep(read_rows(data_file(args.data)), parse_text_or_pair)
    bad.check(len(rows))
    say_which_model(args)
    material_of = partial(
        perplexity.prepare, rows=rows, bad=bad, window=args.window, stride=args.stride
    )
    if args.compare:
        first = compare.open_variant(args, args.compare[0])
        found = compare.compare(args, args.compare, material_of, first)
        return {"data": args.data or BUNDLED, "bad_rows": bad.count, "variants": found}
    engine = open_engine(args)
    total = perplexity.measure(engine, material_of(engine), args.batch_size)
    return {"data": args.data or BUNDLED, "bad_rows": bad.count, **total.figures()}
