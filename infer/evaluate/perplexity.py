"""`--task perplexity`: of one model, or of the variants of one that `--compare` names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from convert.loading.folder import open_folder, target_scheme
from glm2_jax.cli.messages import human_size, note
from glm2_jax.errors import UsageError
from infer.engine.load import demo_folder
from infer.evaluate.likelihood import Material, Total, fit_windows, measure, prepare
from infer.evaluate.rows import BUNDLED, BadRows, data_file, parse_row, read_rows, unplaced
from infer.evaluate.variants import Variant
from infer.memory.budget import DEFAULT_CONTEXT
from infer.startup import find_choice, note_demo_model, open_engine

if TYPE_CHECKING:
    from infer.engine.engine import Engine
    from infer.evaluate.run import Settings


def run(settings: Settings) -> dict[str, Any]:
    """Read all rows; returns the figures."""
    bad = BadRows(settings.max_bad)
    parse = partial(parse_row, fmt=settings.format)
    rows = bad.keep(read_rows(data_file(settings.data)), parse)
    bad.check(len(rows))
    note_demo_model(settings.choice)
    settings = dataclasses.replace(settings, choice=find_choice(settings.choice))
    _check_folder(settings)
    material_of = partial(
        prepare, rows=rows, bad=bad, window=settings.window, stride=settings.stride
    )
    if settings.compare:
        figures = {"variants": _compare(settings, settings.compare, material_of)}
    else:
        batch = settings.batch_size
        contents = {"rows": unplaced(rows)}
        engine = open_engine(settings.choice, settings.options, rows=batch, contents=contents)
        material = material_of(engine)
        [total] = measure([engine], material, batch)
        figures = total.likelihood(material)
    return {"data": settings.data or BUNDLED, "bad_rows": bad.count, **figures}


def _check_folder(settings: Settings) -> None:
    """Raise UsageError for what the model cannot do, before its weights are loaded."""
    choice = settings.choice
    folder = open_folder(choice.path or demo_folder(), **choice.form)
    longest = min(settings.options.max_length or DEFAULT_CONTEXT, folder.config.seq_length)
    fit_windows(settings.window, settings.stride, longest, len(folder.tokenizer.prefix_ids))
    for variant in settings.compare or ():
        one = variant.of(choice)
        try:
            target_scheme(folder, one.quantize, one.quantize_embeddings)
        except UsageError as error:
            raise UsageError(
                f"--compare {variant.name}: {error.what}",
                error.why,
                f"Leave {variant.name} out, or start from the original weights.",
            ) from None


def _compare(
    settings: Settings, compared: tuple[Variant, ...], material_of: Callable[[Engine], Material]
) -> list[dict[str, Any]]:
    """Return the figures of all variants; the first stays in memory, the others take turns."""
    first = _open_variant(settings, compared[0])
    material = material_of(first)
    results = []
    for variant in compared[1:]:
        note(f"comparing {compared[0].name} with {variant.name}")
        engine = _open_variant(settings, variant, first)
        total, other = measure([first, engine], material, settings.batch_size)
        if not results:
            results.append(_figures(compared[0], first, material, total))
        results.append(_figures(variant, engine, material, other))
        del engine  # before the next is loaded
    return results


def _open_variant(settings: Settings, variant: Variant, first: Engine | None = None) -> Engine:
    """Open a variant; after the `first` with its maximal length, in the memory that it leaves."""
    options = settings.options
    if first is not None:
        options = dataclasses.replace(options, max_length=first.max_length)
        if options.memory_limit is not None:
            taken = weight_bytes(first)
            note(f"the first variant takes {human_size(taken)} of --memory-limit")
            left = max(options.memory_limit - taken, 0)
            options = dataclasses.replace(options, memory_limit=left)
    return open_engine(variant.of(settings.choice), options, rows=settings.batch_size)


def _figures(variant: Variant, engine: Engine, material: Material, total: Total) -> dict[str, Any]:
    summary = engine.checkpoint.summary
    return {
        "variant": variant.name,
        "dtype": summary.dtype,
        "quantization": summary.quantization or "none",
        "weight_bytes": weight_bytes(engine),
        **total.likelihood(material),
        **total.distance(),
    }


def weight_bytes(engine: Engine) -> int:
    """Return the bytes of all parameters in memory."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(engine.checkpoint.params))
