"""The losses of DPO and ORPO: that a chosen answer becomes more likely than a rejected one.

A row has pairs of sequences, the chosen one of each and then the rejected one, which do not see
each other. Log-probabilities are those of the learned tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from glm2_jax import GLMConfig, LoRA
from glm2_jax.chunked import map_blocks
from glm2_jax.model import hidden, logits_of
from train.data.batch import Batch
from train.step import Objective, learned_targets, positions_at_once, positions_of, top_of


class Pairs(NamedTuple):
    """Float32 [B, pairs] of the chosen and of the rejected answers; `real` is False where a row has
    no more pairs."""

    chosen: jax.Array
    rejected: jax.Array
    real: jax.Array


def preference(loss: str, beta: float) -> Objective:
    """Return what a run lowers: `loss` is one of `LOSSES`; a mean over pairs."""
    return Objective(partial(LOSSES[loss], beta), count_pairs, ("margin", "accuracy"))


def count_pairs(batch: Batch) -> jax.Array:
    """Return the number of pairs of a batch [..., T], int32."""
    return jnp.sum(jnp.max(batch.segment_ids, axis=-1) // 2, dtype=jnp.int32)


def dpo(
    beta: float,
    config: GLMConfig,
    params: Any,
    lora: LoRA | None,
    batch: Batch,
    *,
    scale: Any,
    **options: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return -log sigmoid(beta * margin), summed over pairs and times `scale` (arXiv 2305.18290).

    The margin is log p(chosen) / p(rejected) minus the same of the reference, which is the model
    without its adapter. The figures are sums over pairs: "margin", times beta, and "accuracy", how
    often it is above 0.
    """
    own = pairs_of(config, params, lora, batch, average=False, **options)
    frozen = jax.lax.stop_gradient(params)
    reference = pairs_of(config, frozen, None, batch, average=False)
    margin = beta * ((own.chosen - own.rejected) - (reference.chosen - reference.rejected))
    return _summed(-jax.nn.log_sigmoid(margin), margin, own.real, scale)


def orpo(
    beta: float,
    config: GLMConfig,
    params: Any,
    lora: LoRA | None,
    batch: Batch,
    *,
    scale: Any,
    **options: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return -log p(chosen) - beta * log sigmoid(log odds ratio), summed over pairs and times
    `scale` (arXiv 2403.07691); log p is the mean over an answer's tokens. Figures as of `dpo`, the
    margin is beta * (log p(chosen) - log p(rejected)).
    """
    own = pairs_of(config, params, lora, batch, average=True, **options)
    odds = [x - jnp.log1p(-jnp.exp(jnp.minimum(x, -1e-6))) for x in own[:2]]
    each = -own.chosen - beta * jax.nn.log_sigmoid(odds[0] - odds[1])
    return _summed(each, beta * (own.chosen - own.rejected), own.real, scale)


LOSSES = {"dpo": dpo, "orpo": orpo}


def pairs_of(
    config: GLMConfig,
    params: Any,
    lora: LoRA | None,
    batch: Batch,
    *,
    average: bool,
    dropout_key: jax.Array | None = None,
    noise: jax.Array | None = None,
    remat: str = "none",
) -> Pairs:
    """Return the sums, or averages, of the log-probabilities of the learned tokens of each answer;
    the arguments are those of `train.step.loss_sum`."""
    x = hidden(
        config, params, batch.tokens, positions=positions_of(config, batch),
        segment_ids=batch.segment_ids, lora=lora, dropout_key=dropout_key, noise=noise, remat=remat,
    )  # fmt: skip
    top = top_of(config, params)
    targets, learned = learned_targets(batch)

    def block(x: jax.Array, targets: jax.Array) -> jax.Array:
        logits = logits_of(config, top, x)
        return -optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    # The backward pass computes the logits again instead of keeping them.
    each = map_blocks(jax.checkpoint(block), positions_at_once(config, x), x, targets)
    segments = jnp.pad(batch.segment_ids[:, 1:], ((0, 0), (0, 1)))
    count = 2 * (batch.tokens.shape[1] // 2) + 1  # segments that a row may have, 0 among them

    def by_segment(values: jax.Array) -> jax.Array:
        add = partial(jnp.bincount, length=count)
        return jax.vmap(lambda s, x: add(s, weights=x))(segments, values)

    sums = by_segment(jnp.where(learned, each, 0))
    tokens = by_segment(learned.astype(jnp.float32))
    found = sums / jnp.maximum(tokens, 1) if average else sums
    return Pairs(found[:, 1::2], found[:, 2::2], tokens[:, 2::2] > 0)


def _summed(
    loss: jax.Array, margin: jax.Array, real: jax.Array, scale: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    margin = jax.lax.stop_gradient(margin)
    figures = {"margin": margin, "accuracy": (margin > 0).astype(jnp.float32)}
    sums = {name: jnp.sum(x, where=real) for name, x in figures.items()}
    return scale * jnp.sum(jnp.where(real, loss, 0)), sums
