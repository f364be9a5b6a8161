"""One optimizer step, of an adapter or of all parameters, and the loss that it lowers.

Axis letters as in `glm2_jax.model`; A is the number of batches whose gradients are added up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from glm2_jax import GLMConfig, LoRA, compiler_options
from glm2_jax.chunked import map_blocks
from glm2_jax.model import hidden, logits_of
from train.data.batch import Batch
from train.optim import Numbers

LOGITS = 2**25  # that the loss has in memory at once

_FIRST_SCALE, _LARGEST_SCALE = 2.0**15, 2.0**24
_STEPS_TO_DOUBLE = 2000


@flax.struct.dataclass
class LossScale:
    """What float16 gradients are multiplied with so that small ones do not vanish.

    Attributes:
        scale: float32, a power of two.
        good_steps: int32, steps without an overflow since it changed.
    """

    scale: jax.Array
    good_steps: jax.Array

    @classmethod
    def first(cls) -> LossScale:
        """That of the first step."""
        return cls(jnp.float32(_FIRST_SCALE), jnp.int32(0))

    def after(self, good: jax.Array) -> LossScale:
        """That of the next step: half after an overflow, double after enough steps without."""
        steps = jnp.where(good, self.good_steps + 1, 0)
        doubled = jnp.minimum(2 * self.scale, _LARGEST_SCALE)
        grown = jnp.where(steps == _STEPS_TO_DOUBLE, doubled, self.scale)
        scale = jnp.where(good, grown, jnp.maximum(self.scale / 2, 1))
        return LossScale(scale, steps % _STEPS_TO_DOUBLE)


@flax.struct.dataclass
class State:
    """What a step hands to the next one beside the trained arrays; with these and the number of the
    step a run goes on exactly.

    Attributes:
        optimizer: optax's state.
        skipped: int32, steps so far that changed no parameter.
        loss_scale: None where the loss is not scaled.
    """

    optimizer: Any
    skipped: jax.Array
    loss_scale: LossScale | None


class Metrics(NamedTuple):
    """What a step says.

    Attributes:
        loss: float32, mean over the learned tokens of all A batches.
        grad_norm: float32, global norm of the gradient before clipping.
        learned_tokens: int32.
        finite: False where loss or gradient is NaN or infinite and no smaller loss scale can help.
        skipped: whether the step left parameters and optimizer as they were: `finite` is False, or
            the gradient overflowed float16, which a smaller loss scale mends.
    """

    loss: jax.Array
    grad_norm: jax.Array
    learned_tokens: jax.Array
    finite: jax.Array
    skipped: jax.Array


def loss_sum(
    config: GLMConfig,
    params: Any,
    lora: LoRA | None,
    batch: Batch,
    *,
    dropout_key: jax.Array | None = None,
    noise: jax.Array | None = None,
    remat: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy, added up over the learned tokens of a batch.

    Token t is predicted from position t - 1 of its own sequence; the first token of a sequence has
    nothing before it and must not be learned. Logits exist for a few positions at a time, also
    where gradients are taken.

    Args:
        batch: arrays [B, T].
        dropout_key: turns dropout on.
        noise: [B, T, D], added to the embeddings.
        remat: see `glm2_jax.model.hidden`.

    Returns:
        (float32 sum, int32 number of learned tokens).
    """
    x = hidden(
        config,
        params,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        lora=lora,
        dropout_key=dropout_key,
        noise=noise,
        remat=remat,
    )

    def losses(x: jax.Array, targets: jax.Array) -> jax.Array:
        logits = logits_of(config, params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    targets, learned = (_next(array) for array in (batch.tokens, batch.learned))
    positions = max(1, LOGITS // (x.shape[0] * config.vocab_size))
    if positions < x.shape[1]:  # or the backward pass would have the logits of all chunks
        losses = jax.checkpoint(losses)
    each = map_blocks(losses, positions, x, targets)
    return jnp.sum(each, where=learned), jnp.sum(learned, dtype=jnp.int32)


def make_eval(config: GLMConfig) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compiles (params, adapter or None, batch [B, T]) -> `loss_sum` without dropout."""
    options = compiler_options(jax.default_backend())
    return jax.jit(partial(loss_sum, config), compiler_options=options)


def init_state(
    optimizer: optax.GradientTransformation, trained: Any, *, loss_scaling: bool = False
) -> State:
    """The state before the first step.

    Args:
        trained: what is going to be trained.
        loss_scaling: for float16.
    """
    scale = LossScale.first() if loss_scaling else None
    return State(optimizer.init(trained), jnp.int32(0), scale)


def make_step(
    config: GLMConfig,
    optimizer: optax.GradientTransformation | None = None,
    *,
    dtype: Any = None,
    remat: bool = True,
    noise: float | None = None,
    effective: Callable[[LoRA], LoRA] | None = None,
    out_shardings: Any = None,
) -> Callable[..., tuple[Any, State, Metrics]]:
    """Compiles `train_step` for (base, trained, state, batch, key, number of the step, numbers of
    the optimizer where it is None).

    `trained` and `state` are donated; on a mesh `out_shardings` says that they stay where they lie.
    """
    step = partial(
        train_step, config, optimizer, dtype=dtype, remat=remat, noise=noise, effective=effective
    )
    options = compiler_options(jax.default_backend())
    return jax.jit(
        step, donate_argnums=(1, 2), out_shardings=out_shardings, compiler_options=options
    )


def train_step(
    config: GLMConfig,
    optimizer: optax.GradientTransformation | None,
    base: Any,
    trained: Any,
    state: State,
    batch: Batch,
    key: jax.Array,
    number: jax.Array | int,
    numbers: Numbers | None = None,
    *,
    dtype: Any = None,
    remat: bool = True,
    noise: float | None = None,
    effective: Callable[[LoRA], LoRA] | None = None,
) -> tuple[Any, State, Metrics]:
    """One optimizer step.

    Where loss or gradient is not finite it changes nothing but the loss scale and the count of such
    steps; what follows from that is the caller's to decide.

    Args:
        config: its dropout rates count, as those of an adapter do.
        optimizer: what makes updates of gradients; None = that of `numbers`.
        base: parameters that stay as they are, quantized or not; their dtype is computed in.
            None = all parameters are trained.
        trained: an adapter for `base`, or all parameters; float32.
        state: see `State`.
        batch: arrays [A, B, T].
        key: of the run; randomness depends on it and on `number` alone.
        number: of the step, from 0.
        numbers: say which optimizer, noise, and scale of the adapter, as arrays: others need no
            other program.
        dtype: that all parameters are computed in; None = their own.
        remat: see `glm2_jax.model.hidden`.
        noise: strength of noise on the embeddings, see `Numbers`; None = none.
        effective: makes the adapter of `trained`; None = it is the adapter.

    Returns:
        (what `trained` becomes, the next state, what to log).
    """
    if numbers is not None:
        optimizer, noise = numbers.optimizer(), numbers.noise
    assert optimizer is not None
    learned = jnp.sum(batch.learned[..., 1:], dtype=jnp.int32)
    scale = jnp.float32(1) if state.loss_scale is None else state.loss_scale.scale

    def loss(weights: Any, rows: Batch, key: jax.Array) -> jax.Array:
        params, lora = (weights, None) if base is None else (base, weights)
        lora = lora if lora is None or effective is None else effective(lora)
        if lora is not None and numbers is not None:
            lora = numbers.put_into(lora)
        dropout_key, noise_key = jax.random.split(key)
        total, _ = loss_sum(
            config,
            params,
            lora,
            rows,
            dropout_key=dropout_key if _drops(config, lora) else None,
            noise=None if noise is None else _noise(config, rows, noise, noise_key),
            remat=remat,
        )
        return total * (scale / jnp.maximum(learned, 1))

    weights = trained if dtype is None else jax.tree.map(lambda x: x.astype(dtype), trained)
    key = jax.random.fold_in(key, number)

    def add(carry, rows_and_index):
        rows, index = rows_and_index
        found = jax.value_and_grad(loss)(weights, rows, jax.random.fold_in(key, index))
        return jax.tree.map(lambda total, new: total + new.astype(jnp.float32), carry, found), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (scale, trained))
    indices = jnp.arange(batch.tokens.shape[0])
    (mean, gradients), _ = jax.lax.scan(add, zeros, (batch, indices))
    mean, gradients = jax.tree.map(lambda x: x / scale, (mean, gradients))
    return _apply(optimizer, trained, state, mean, gradients, learned)


def _apply(
    optimizer: optax.GradientTransformation,
    trained: Any,
    state: State,
    loss: jax.Array,
    gradients: Any,
    learned: jax.Array,
) -> tuple[Any, State, Metrics]:
    """The optimizer's update, where everything is finite."""
    norm = optax.tree.norm(gradients)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, optimized = optimizer.update(gradients, state.optimizer, trained)
    new = optax.apply_updates(trained, updates), optimized
    new = jax.tree.map(partial(jnp.where, good), new, (trained, state.optimizer))
    finite, scale = good, state.loss_scale
    if scale is not None:
        finite = good | (jnp.isfinite(loss) & (scale.scale > 1))
        scale = scale.after(good)
    state = State(new[1], state.skipped + ~good, scale)
    return new[0], state, Metrics(loss, norm, learned, finite, ~good)


def _next(array: jax.Array) -> jax.Array:
    """[B, T]: what follows at each position; zero (or False) at the end."""
    return jnp.pad(array[:, 1:], ((0, 0), (0, 1)))


def _drops(config: GLMConfig, lora: LoRA | None) -> bool:
    return max(config.attention_dropout, config.hidden_dropout, lora.dropout if lora else 0) > 0


def _noise(config: GLMConfig, rows: Batch, strength: Any, key: jax.Array) -> jax.Array:
    """Even noise up to strength / sqrt(tokens of the sequence * D); none on padding."""
    D, (_, T) = config.hidden_size, rows.tokens.shape
    segments = rows.segment_ids
    lengths = jax.vmap(lambda row: jnp.bincount(row, length=T + 1)[row])(segments)
    size = jnp.where(segments > 0, strength * jax.lax.rsqrt(lengths.astype(jnp.float32) * D), 0)
    return size[..., None] * jax.random.uniform(key, (*segments.shape, D), minval=-1, maxval=1)
