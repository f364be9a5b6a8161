"""What `python -m infer.evaluate` does once its flags are parsed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.parser import from_flags
from glm2_jax.errors import GLMError, UsageError
from infer.evaluate import report, variants
from infer.evaluate.rows import (
    BUNDLED,
    BadRows,
    data_file,
    parse_row,
    read_rows,
    unplaced,
)
from infer.startup import model_folder, note_demo_model, open_engine

# What scoring an existing file of answers takes.
_SCORING = {"task", "predictions", "max_bad", "json", "debug"}


def run(args: argparse.Namespace, given: Mapping[str, str]) -> int:
    """Measures what the flags ask for and prints it; returns the exit code.

    Args:
      given: name in `args` -> flag, of those that differ from their defaults.
    """
    check_flags(args, given)
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


def check_flags(args: argparse.Namespace, given: Mapping[str, str]) -> None:
    """Raises UsageError for flags that have no meaning together; `given` is as in `run`."""
    generation = args.task == "generation"
    rules = (  # what goes with what
        (("compare", "window", "stride"), args.task == "perplexity", "--task perplexity"),
        (("shots", "two_pass"), args.task == "choice", "--task choice"),
        (("temperature", "top_p", "seed"), generation, "--task generation"),
        (
            ("max_new_tokens",),
            generation or args.two_pass,
            "--task generation, or --task choice --two-pass",
        ),
        (("format",), args.task != "choice", "--task perplexity or generation"),
        (("predictions",), args.task != "perplexity", "--task generation or choice"),
        (("overwrite",), args.predictions, "--predictions"),
    )
    for names, fits, words in rules:
        for name in names:
            if name in given and not fits:
                raise UsageError(
                    f"{given[name]} goes with {words}",
                    f"With --task {args.task} as it is asked for here it would do nothing.",
                    "Leave it out, or add what it goes with.",
                )
    if generation and args.predictions and not args.data:
        idle = [flag for name, flag in given.items() if name not in _SCORING]
        if idle:
            raise UsageError(
                f"{', '.join(idle)}: without effect",
                f"Without --data, {args.predictions} is read and scored; no model answers.",
                "Leave them out, or name the questions that are to be answered: --data F.",
            )
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
    rows = bad.keep(read_rows(data_file(args.data)), partial(parse_row, fmt=args.format))
    bad.check(len(rows))
    note_demo_model(from_flags(ModelChoice, args))
    _check_folder(args)
    material_of = partial(
        perplexity.prepare, rows=rows, bad=bad, window=args.window, stride=args.stride
    )
    if args.compare:
        first = compare.open_variant(args, args.compare[0])
        found = compare.compare(args, args.compare, material_of, first)
        return {"data": args.data or BUNDLED, "bad_rows": bad.count, "variants": found}
    engine = open_engine(
        from_flags(ModelChoice, args),
        from_flags(EngineOptions, args),
        contents={"rows": unplaced(rows)},
    )
    total = perplexity.measure(engine, material_of(engine), args.batch_size)
    return {"data": args.data or BUNDLED, "bad_rows": bad.count, **total.figures()}


def _check_folder(args: argparse.Namespace) -> None:
    """Raises UsageError for what the folder cannot do, before its weights are loaded."""
    from convert.loading.folder import open_folder
    from infer.engine.load import demo_folder
    from infer.evaluate import perplexity
    from infer.memory.budget import DEFAULT_CONTEXT

    path = model_folder(from_flags(ModelChoice, args))
    if path is not None:  # it is looked for once
        args.model, args.hub_source, args.revision = path, None, None
    try:
        folder = open_folder(path or demo_folder(), **from_flags(ModelChoice, args).form)
    except GLMError:  # loading says it, in its own words
        return
    longest = min(args.max_length or DEFAULT_CONTEXT, folder.config.seq_length)
    prefix = len(folder.tokenizer.prefix_ids)
    perplexity.fit_windows(args.window, args.stride, longest, prefix)
    if args.compare:
        variants.check_folder(args, folder)
