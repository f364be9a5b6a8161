"""Compare variants of a model: what a dtype or a quantization costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax.cli.messages import human_size, note
from glm2_jax.runtime.gather import gathered
from infer.evaluate.perplexity import Material, Total, measure
from infer.evaluate.reader import Chunk
from infer.evaluate.variants import Variant
from infer.startup import open_engine

if TYPE_CHECKING:
    from infer.engine.engine import Engine
    from infer.engine.programs import Programs
    from infer.evaluate.run import Settings


class Distance:
    """How far the logits are from those of the first variant, over the positions that count."""

    def __init__(self) -> None:
        self._sums = np.zeros(3)  # of |difference|, KL, same top token
        self._largest = 0.0
        self._positions = 0

    def add(self, mean: Any, largest: Any, divergence: Any, same: Any) -> None:
        """Add what `distances` returns, for some positions."""
        self._positions += len(same)
        self._sums += [part.astype(np.float64).sum() for part in (mean, divergence, same)]
        self._largest = max(self._largest, float(largest.max(initial=0.0)))

    def figures(self) -> dict[str, float]:
        """Return the averages; KL(first || this) in nats."""
        mean, divergence, same = (self._sums / max(self._positions, 1)).tolist()
        return {
            "mean_abs_delta_logit": mean,
            "max_abs_delta_logit": self._largest,
            "kl_divergence": divergence,
            "top1_agreement": same,
        }


def distances(
    first: jax.Array, other: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Compare float32 [B, T, V] logits: mean and largest |difference|, KL(first || other) in nats,
    and whether the most likely token is the same; each [B, T]."""
    difference = jnp.abs(first - other)
    p, q = jax.nn.log_softmax(first), jax.nn.log_softmax(other)
    divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    same = first.argmax(axis=-1) == other.argmax(axis=-1)
    return difference.mean(axis=-1), difference.max(axis=-1), divergence, same


def weight_bytes(engine: Engine) -> int:
    """Return the bytes of all parameters in memory."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(engine.checkpoint.params))


def compare(
    settings: Settings, compared: Sequence[Variant], material_of: Callable[[Engine], Material]
) -> list[dict[str, Any]]:
    """Return the figures of all variants; the first stays in memory, the others take turns."""
    first = open_variant(settings, compared[0])
    material = material_of(first)
    results = []
    for variant in compared[1:]:
        note(f"comparing {compared[0].name} with {variant.name}")
        engine, distance = open_variant(settings, variant, first), Distance()
        also = partial(_add_distance, distance, first.programs)
        totals = measure([first, engine], material, settings.batch_size, also)
        if not results:
            unchanged = Distance().figures() | {"top1_agreement": 1.0}
            results.append(_figures(compared[0], first, totals[0]) | unchanged)
        results.append(_figures(variant, engine, totals[1]) | distance.figures())
        del engine  # before the next is loaded
    return results


def _add_distance(
    distance: Distance, programs: Programs, chunks: Sequence[Chunk], counts: np.ndarray
) -> None:
    one, two = (chunk.logits for chunk in chunks)
    found = programs.call("distances", one.shape, distances, one, two)
    distance.add(*(gathered(part)[counts] for part in found))


def open_variant(settings: Settings, variant: Variant, first: Engine | None = None) -> Engine:
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


def _figures(variant: Variant, engine: Engine, total: Total) -> dict[str, Any]:
    summary = engine.checkpoint.summary
    return {
        "variant": variant.name,
        "dtype": summary.dtype,
        "quantization": summary.quantization or "none",
        "weight_bytes": weight_bytes(engine),
        **total.figures(),
    }
