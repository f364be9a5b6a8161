"""One optimiser step over all parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glm2_jax import GLMConfig, compiler_options, forward
from train.batch import Batch


def answer_loss(
    config: GLMConfig, params: Any, batch: Batch, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Mean cross entropy, float32, over the learned tokens of a batch.

    Token t is predicted from position t - 1 of its own sequence; the first token of a sequence has
    nothing before it and must not be learned.
    """
    logits, _ = forward(
        config,
        params,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        dropout_key=dropout_key,
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch.tokens[:, 1:])
    learned = batch.learned[:, 1:]
    return jnp.sum(losses * learned) / jnp.maximum(jnp.sum(learned), 1)


def make_train_step(
    config: GLMConfig, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """Compiles (params, optimizer state, batch, key) -> (params, optimizer state, loss).

    Parameters and state are donated. The key feeds the configuration's dropout.
    """

    def step(params, state, batch: Batch, key: jax.Array):
        loss, grads = jax.value_and_grad(answer_loss, argnums=1)(config, params, batch, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    options = compiler_options(jax.default_backend())
    return jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
