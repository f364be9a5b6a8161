"""One optimizer step, of an adapter or of all parameters, and the loss that it lowers.

Axis letters as in `glm2_jax.model`; A is the number of micro-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from glm2_jax import GLMConfig, LoRA, compiler_options, dora
from glm2_jax.chunked import join_blocks, split_blocks
from glm2_jax.model import hidden, logits_of
from glm2_jax.parts import parts_of, tables_of
from glm2_jax.prefix import Prefix, with_prefix
from train.data.batch import Batch
from train.optim import Numbers

LOGITS = 2**25  # that the loss holds in memory at a time

_LARGEST_SCALE = 2.0**24
_STEPS_TO_DOUBLE = 2000


@flax.struct.dataclass
class LossScale:
    """A factor on float16 losses, so that small gradients do not vanish."""

    scale: jax.Array  # float32, a power of two
    good_steps: jax.Array  # int32, steps without an overflow since it changed

    def after(self, good: jax.Array) -> LossScale:
        """Return the next scale: half after an overflow, double after enough steps without."""
        steps = jnp.where(good, self.good_steps + 1, 0)
        doubled = jnp.minimum(2 * self.scale, _LARGEST_SCALE)
        grown = jnp.where(steps == _STEPS_TO_DOUBLE, doubled, self.scale)
        scale = jnp.where(good, grown, jnp.maximum(self.scale / 2, 1))
        return LossScale(scale, steps % _STEPS_TO_DOUBLE)


@flax.struct.dataclass
class State:
    """What a run needs to resume exactly, besides the trained arrays and the number of the step."""

    optimizer: Any  # optax's state
    skipped: jax.Array  # int32, steps so far that changed no parameter
    loss_scale: LossScale | None  # None where the loss is not scaled


class Metrics(NamedTuple):
    """The figures of a step."""

    loss: jax.Array  # float32, mean over the learned tokens (or pairs) of all A micro-batches
    grad_norm: jax.Array  # float32, global norm of the gradient before clipping
    learned_tokens: jax.Array  # int32; what the loss is a mean over
    # False where loss or gradient is NaN or infinite and no smaller loss scale can help
    finite: jax.Array
    # whether the step left parameters and optimizer unchanged: `finite` is False, or the gradient
    # overflowed float16, which a smaller loss scale will cure
    skipped: jax.Array
    figures: Any = None  # name -> float32, means of further figures of the objective


def loss_sum(
    config: GLMConfig,
    params: Any,
    lora: LoRA | None,
    batch: Batch,
    *,
    scale: jax.typing.ArrayLike = 1.0,
    dropout_key: jax.Array | None = None,
    noise: jax.Array | None = None,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """Return the cross entropy of a micro-batch [B, T], summed over its learned tokens and times
    `scale`, and their number (float32, int32); `noise` [B, T, D] is added to the embeddings.

    Token t is predicted from position t - 1 of its own sequence; the first token of a sequence has
    no position before it and must not be learned. Logits exist for a few positions at a time, once:
    their gradient is taken with the loss.
    """
    x = hidden(
        config, params, batch.tokens, positions=positions_of(config, batch),
        segment_ids=batch.segment_ids, lora=lora, dropout_key=dropout_key, noise=noise, remat=remat,
    )  # fmt: skip
    targets, learned = learned_targets(batch)
    top, scale = top_of(config, params), jnp.float32(scale)
    total: Any = _cross_entropy(config, top, x, targets, learned, scale)
    return total, jnp.sum(learned, dtype=jnp.int32)


def positions_of(config: GLMConfig, batch: Batch) -> jax.Array | None:
    """Return the positions to give to the model, which with blanks finds them in the tokens."""
    return None if config.block.bidirectional else batch.positions


def learned_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return what follows at each position, and whether it is learned, [B, T]; zero and False at
    the end."""
    targets, learned = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (batch.tokens, batch.learned))
    return targets, learned


def top_of(config: GLMConfig, params: Any) -> dict[str, Any]:
    """Return the parameters that belong to no layer, for `logits_of`."""
    top = {part.name: params[part.name] for part in parts_of(config) if not part.in_layers}
    return top | {name: jax.lax.stop_gradient(top[name]) for name in tables_of(config)}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    config: GLMConfig,
    top: Mapping[str, Any],
    x: jax.Array,
    targets: jax.Array,
    learned: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    """Return the sum of `loss_sum` from hidden states [B, T, D]; `top` are the parameters that
    belong to no layer."""

    def add(total: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + _of_block(config, top, block, scale), None

    blocks = split_blocks(positions_at_once(config, x), x, targets, learned)
    return jax.lax.scan(add, jnp.float32(0), blocks)[0]


def _cross_entropy_forward(config: GLMConfig, top: Any, *arrays: Any) -> tuple[jax.Array, Any]:
    """Return the sum and its gradients by the hidden states and what is trained of `top`; the
    gradient by the sum only multiplies them."""
    x, targets, learned, scale = (one.value for one in arrays)
    values = jax.tree.map(lambda one: one.value, top)
    trained = {
        name: values[name] for name, part in top.items()
        if any(one.perturbed for one in jax.tree.leaves(part))
    }  # fmt: skip

    def add(total: Any, block: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        def loss(trained: Any, x: jax.Array) -> jax.Array:
            return _of_block(config, {**values, **trained}, (x, *block[1:]), scale)

        found, (to_trained, to_x) = jax.value_and_grad(loss, (0, 1))(trained, block[0])
        return jax.tree.map(jnp.add, total, (found, to_trained)), to_x

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), trained))
    blocks = split_blocks(positions_at_once(config, x), x, targets, learned)
    (total, to_trained), to_x = jax.lax.scan(add, zeros, blocks)
    return total, ({name: to_trained.get(name) for name in top}, join_blocks(to_x, x.shape[1]))


def _cross_entropy_backward(config: GLMConfig, saved: Any, gradient: jax.Array) -> tuple[Any, ...]:
    to_top, to_x = jax.tree.map(lambda x: (x * gradient).astype(x.dtype), saved)
    return to_top, to_x, None, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward, symbolic_zeros=True)


def _of_block(
    config: GLMConfig, top: Any, block: tuple[jax.Array, ...], scale: jax.Array
) -> jax.Array:
    x, targets, learned = block
    each = optax.softmax_cross_entropy_with_integer_labels(logits_of(config, top, x), targets)
    return scale * jnp.sum(each, where=learned)


def positions_at_once(config: GLMConfig, x: jax.Array) -> int:
    """Return how many positions of [B, T, D] have their logits in memory at a time."""
    return max(1, LOGITS // (x.shape[0] * config.vocab_size))


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run lowers: a mean over something that is counted."""

    # (config, params, adapter or None, batch, the options of `loss_sum`) -> the sum times `scale`,
    # and figures that are summed likewise, without it
    total: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    count: Callable[[Batch], jax.Array]  # batch [..., T] -> int32
    figures: tuple[str, ...] = ()  # their names


def _of_answers(*args: Any, **options: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    return loss_sum(*args, **options)[0], {}


CROSS_ENTROPY = Objective(
    _of_answers, lambda batch: jnp.sum(batch.learned[..., 1:], dtype=jnp.int32)
)


def make_eval(
    config: GLMConfig, objective: Objective = CROSS_ENTROPY
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compile (params, adapter or None, batch [B, T]) -> the sum of an objective without dropout,
    and its count."""

    def evaluate(params: Any, lora: LoRA | None, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return objective.total(config, params, lora, batch, scale=1.0)[0], objective.count(batch)

    return jax.jit(evaluate, compiler_options=compiler_options(jax.default_backend()))


def init_state(
    optimizer: optax.GradientTransformation, trained: Any, *, loss_scaling: bool = False
) -> State:
    """Return the state before the first step; `loss_scaling` is for float16."""
    scale = LossScale(jnp.float32(2**15), jnp.int32(0)) if loss_scaling else None
    return State(optimizer.init(trained), jnp.int32(0), scale)


def make_step(
    config: GLMConfig,
    optimizer: optax.GradientTransformation | None = None,
    *,
    out_shardings: Any = None,
    **options: Any,
) -> Callable[..., tuple[Any, State, Metrics]]:
    """Compile `train_step` for (base, trained, state, batch, key, number of the step, numbers).

    `trained` and `state` are donated. `options` are those of `train_step`; on a mesh
    `out_shardings` keeps the results where the arguments are.
    """
    return jax.jit(
        partial(train_step, config, optimizer, **options),
        donate_argnums=(1, 2),
        out_shardings=out_shardings,
        compiler_options=compiler_options(jax.default_backend()),
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
    remat: str = "full",
    effective: Callable[[Any], LoRA | Prefix] | None = None,
    objective: Objective = CROSS_ENTROPY,
) -> tuple[Any, State, Metrics]:
    """Take one optimizer step; return the new `trained`, the next state, and figures for the log.
    Where loss or gradient is not finite, only the loss scale and the count of such steps change.

    Args:
        optimizer: None = the one of `numbers`.
        base: frozen parameters, quantized or not; None = all parameters are trained.
        trained: an adapter for `base`, or all parameters; float32.
        batch: arrays [A, B, T].
        key, number: of the run, and of the step from 0; randomness depends on them alone.
        numbers: optimizer, noise on the embeddings and scale of a LoRA adapter as arrays.
        dtype, remat: that all parameters are computed in, None = their own; of `choices.REMAT`.
        effective: makes the adapter, or the prefix, from `trained`; None = it is the adapter.
        objective: what the step lowers.
    """
    noise = None if numbers is None else numbers.noise
    optimizer = optimizer if numbers is None else numbers.optimizer()
    assert optimizer is not None
    count = objective.count(batch)
    scale = jnp.float32(1) if state.loss_scale is None else state.loss_scale.scale

    def made(weights: Any) -> LoRA | Prefix:
        adapter = weights if effective is None else effective(weights)
        return adapter if numbers is None else numbers.put_into(adapter)

    def loss(weights: Any, rows: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        added = None if base is None else made(weights)
        params, lora = combine(weights if base is None else base, added, lengths)
        dropout_key, noise_key = jax.random.split(key)
        rate = max(config.attention_dropout, config.hidden_dropout, added.dropout if added else 0)
        return objective.total(
            config, params, lora, rows, dropout_key=dropout_key if rate > 0 else None,
            noise=None if noise is None else _noise(config, rows, noise, noise_key), remat=remat,
            scale=scale / jnp.maximum(count, 1),
        )  # fmt: skip

    weights = trained if dtype is None else jax.tree.map(lambda x: x.astype(dtype), trained)
    lengths = None if base is None else lengths_of(base, made(weights))
    sums = (scale, dict.fromkeys(objective.figures, scale)), trained
    key = jax.random.fold_in(key, number)
    (mean, figures), gradients = _add_up(loss, weights, batch, key, sums)
    mean, gradients = jax.tree.map(lambda x: x / scale, (mean, gradients))
    figures = {name: x / jnp.maximum(count, 1) for name, x in figures.items()}
    trained, state, metrics = _apply(optimizer, trained, state, mean, gradients, count)
    return trained, state, metrics._replace(figures=figures)


def _add_up(loss: Callable[..., Any], weights: Any, batch: Batch, key: jax.Array, like: Any) -> Any:
    """Return what `loss` gives, and its gradients by the weights, summed over micro-batches in
    float32; `like` has their shapes."""
    gradient = jax.value_and_grad(loss, has_aux=True)

    def add(total: Any, rows_and_index: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        rows, index = rows_and_index
        found = gradient(weights, rows, jax.random.fold_in(key, index))
        return jax.tree.map(lambda x, new: x + new.astype(jnp.float32), total, found), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
    return jax.lax.scan(add, zeros, (batch, jnp.arange(batch.tokens.shape[0])))[0]


def lengths_of(base: Any, adapter: LoRA | Prefix) -> dora.Rows | None:
    """Return the norms that an adapter of DoRA needs; None for others. They are constants of a
    step: no gradient goes through them."""
    if isinstance(adapter, LoRA) and dora.has_magnitudes(adapter):
        return dora.norms(base, adapter)
    return None


def combine(
    params: Any, adapter: LoRA | Prefix | None, lengths: dora.Rows | None = None
) -> tuple[Any, LoRA | None]:
    """Return the parameters and the adapter of `loss_sum`, of an adapter and its `lengths_of`; a
    prefix is one of the parameters."""
    if isinstance(adapter, Prefix):
        return with_prefix(params, adapter), None
    if adapter is not None and lengths is not None:
        adapter = dora.with_gains(adapter, lengths)
    return params, adapter


def _apply(
    optimizer: optax.GradientTransformation,
    trained: Any,
    state: State,
    loss: jax.Array,
    gradients: Any,
    learned: jax.Array,
) -> tuple[Any, State, Metrics]:
    """Apply the optimizer's update, where everything is finite."""
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


def _noise(config: GLMConfig, rows: Batch, strength: Any, key: jax.Array) -> jax.Array:
    """Return uniform noise up to strength / sqrt(tokens of the sequence * D); 0 on padding."""
    D, (_, T) = config.hidden_size, rows.tokens.shape
    segments = rows.segment_ids
    lengths = jax.vmap(lambda row: jnp.bincount(row, length=T + 1)[row])(segments)
    size = jnp.where(segments > 0, strength * jax.lax.rsqrt(lengths.astype(jnp.float32) * D), 0)
    return size[..., None] * jax.random.uniform(key, (*segments.shape, D), minval=-1, maxval=1)
