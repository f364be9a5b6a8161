"""Variants of one model side by side: what a dtype or quantization costs, beside the first one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax.cli.messages import Progress, human_size, note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.parser import from_flags
from glm2_jax.runtime.gather import gathered
from infer.evaluate.perplexity import Material, Targets, Total, add, batches
from infer.evaluate.reader import Reader
from infer.evaluate.variants import Variant, asking_for
from infer.startup import open_engine

if TYPE_CHECKING:
    from infer.engine.engine import Engine


@dataclass
class Distance:
    """How far the logits are from those of the first variant, over the positions that count."""

    positions: int = 0
    agree: int = 0
    absolute: float = 0.0
    largest: float = 0.0
    divergence: float = 0.0

    def add(self, absolute: Any, largest: Any, divergence: Any, agree: Any) -> None:
        """Takes the figures of some positions, as `distances` gives them."""
        self.positions += len(agree)
        self.agree += int(agree.sum())
        self.absolute += float(absolute.astype(np.float64).sum())
        self.largest = max(self.largest, float(largest.max(initial=0.0)))
        self.divergence += float(divergence.astype(np.float64).sum())

    def figures(self) -> dict[str, float]:
        """The averages; KL(first || this) in nats."""
        return {
            "mean_abs_delta_logit": self.absolute / self.positions,
            "max_abs_delta_logit": self.largest,
            "kl_divergence": self.divergence / self.positions,
            "top1_agreement": self.agree / self.positions,
        }


def distances(
    first: jax.Array, other: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of float32 [B, T, V] logits: mean and largest |difference|, KL(first || other) in nats, and
    whether the likeliest token is the same; each [B, T]."""
    difference = jnp.abs(first - other)
    p, q = jax.nn.log_softmax(first), jax.nn.log_softmax(other)
    divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    agree = first.argmax(axis=-1) == other.argmax(axis=-1)
    return difference.mean(axis=-1), difference.max(axis=-1), divergence, agree


def weight_bytes(engine: Engine) -> int:
    """Bytes of all parameters in memory."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(engine.checkpoint.params))


def compare(
    args: argparse.Namespace,
    names: tuple[Variant, ...],
    material_of: Callable[[Engine], Material],
    first: Engine,
) -> list[dict[str, Any]]:
    """Measures all variants; the first stays in memory, the others take turns beside it.

    Args:
      material_of: makes the tokens that are read.
      first: an engine of the first variant.

    Returns:
      A dictionary of figures for each.
    """
    material = material_of(first)
    results = []
    for variant in names[1:]:
        note(f"comparing {names[0].name} with {variant.name}")
        engine = open_variant(args, variant, first)
        mine, others, distance = _together(first, engine, material, args.batch_size)
        if not results:
            results.append(_figures(names[0], first, mine))
        results.append(_figures(variant, engine, others, distance))
        del engine  # before the next is loaded
    return results


def open_variant(args: argparse.Namespace, variant: Variant, first: Engine | None = None) -> Engine:
    """The model in a form; beside the `first` it has that one's room, and the memory it leaves."""
    args = asking_for(args, variant)
    if first is not None:
        args.max_length = first.max_length
        if args.memory_limit is not None:
            taken = weight_bytes(first)
            note(f"of --memory-limit, {human_size(taken)} are those of the first form")
            args.memory_limit = max(args.memory_limit - taken, 0)
    return open_engine(from_flags(ModelChoice, args), from_flags(EngineOptions, args))


def _figures(
    variant: Variant, engine: Engine, total: Total, distance: Distance | None = None
) -> dict[str, Any]:
    summary = engine.checkpoint.summary
    same = {"mean_abs_delta_logit": 0.0, "max_abs_delta_logit": 0.0}
    same |= {"kl_divergence": 0.0, "top1_agreement": 1.0}
    return {
        "variant": variant.name,
        "dtype": summary.dtype,
        "quantization": summary.quantization or "none",
        "weight_bytes": weight_bytes(engine),
        **total.figures(),
        **(same if distance is None else distance.figures()),
    }


def _together(
    first: Engine, other: Engine, material: Material, batch: int
) -> tuple[Total, Total, Distance]:
    """Reads everything with two models at once."""
    mine, others, distance = material.total(), material.total(), Distance()
    readers = Reader(first, batch, first.max_length), Reader(other, batch, first.max_length)
    compiled = first.programs.seconds + other.programs.seconds
    with Progress("tokens read", material.tokens) as bar:
        done = 0
        for items in batches(material.items, batch):
            targets = Targets(items, readers[0].batch)
            ids = [item.ids[:-1] for item in items]
            for one, two in zip(*(reader.read(ids) for reader in readers), strict=True):
                counts = add(first, mine, one, targets)
                add(other, others, two, targets)
                found = first.programs.call(
                    "distances", one.logits.shape, distances, one.logits, two.logits
                )
                distance.add(*(gathered(part)[counts] for part in found))
                done += int(one.real.sum())
                now = first.programs.seconds + other.programs.seconds
                bar.start, compiled = bar.start + now - compiled, now
                bar(done)
    return mine, others, distance
