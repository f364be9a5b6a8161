"""Measures on one device what the backward pass of training should recompute of each layer, and
which form of attention is fast there.

An adapter is trained on a model of few layers with random weights, for rows of a length. What does
not fit the memory with all layers of the model is not measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig, LoRA, init_lora
from glm2_jax.choices import REMAT
from glm2_jax.cli.messages import human_size
from glm2_jax.forms import Attention, Forms
from glm2_jax.model import hidden, unstack_layers
from glm2_jax.runtime.devices import layers_to_train
from infer.memory.budget import SPARE
from infer.memory.plan import RUNTIME, weight_bytes
from infer.memory.precision import Precision
from infer.memory.residuals import residual_bytes
from infer.memory.shares import abstract_params
from infer.memory.shortage import budget_of
from infer.tuning.choose import Choice, Clock, Run, choose, wall_clock
from infer.tuning.measure import (
    LAYERS,
    STEP_GAIN,
    TOLERANCE,
    Measured,
    Trained,
    compiled,
    measure_attention,
)
from infer.tuning.random_params import random_params

WITHOUT_MEASURING = ("none", "full")  # the first that fits

Builds = Mapping[str, Callable[[], Run]]


def tune_training(
    config: GLMConfig,
    precision: Precision,
    rows: int,
    length: int,
    device: Any,
    *,
    clock: Clock = wall_clock,
    note: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Measure training `rows` rows of `length` tokens at once."""
    shape = f"training {rows} x {length}"
    with jax.default_device(device):
        seen = Attention(length, length, whole=True)
        choice = measure_attention(config, precision, seen, rows, device, clock)
        attention = Measured(f"{shape}: attention", choice)
        note(attention.describe())
        form = None if choice.name == choice.usual else choice.name
        config = dataclasses.replace(config, forms=Forms(attention=((seen, form),)))
        builds = policies(config, precision, rows, length, device, budget_of(device).memory)
        remat = Measured(f"{shape}: recomputing", choose_policy(builds, precision, clock))
        note(remat.describe())
    return Trained(rows, length, attention, remat)


def choose_policy(builds: Builds, precision: Precision, clock: Clock) -> Choice:
    """Return the fastest of `policies`, all compared with the one that is taken without
    measuring."""
    usual, exact = WITHOUT_MEASURING[-1], []
    for name in WITHOUT_MEASURING:
        with contextlib.suppress(Exception):  # of any kind; `choose` reports it
            exact = [np.asarray(x, np.float32) for x in builds[name]()()]
            usual = name
            break
    tolerance = 3 * TOLERANCE[jnp.dtype(precision.dtype).itemsize]
    return choose(builds, usual, exact, tolerance, clock, STEP_GAIN)


def policies(
    config: GLMConfig,
    precision: Precision,
    rows: int,
    length: int,
    device: Any,
    memory: int | None,
) -> Builds:
    """Return for each of `choices.REMAT` what compiles a forward and a backward pass with it.

    That raises ValueError where all layers of the model would need more than `memory` bytes.
    """
    few = dataclasses.replace(config, num_layers=LAYERS)
    dtype = jnp.dtype(precision.dtype)
    stacked = random_params(few, dtype, scheme=precision.scheme, device=device)
    lora = _random_adapter(few)
    tokens = jnp.arange(rows * length, dtype=jnp.int32).reshape(rows, length) % config.vocab_size

    @cache
    def build(policy: str) -> Run:
        layers = layers_to_train(device.platform, policy)
        args = unstack_layers(stacked) if layers == "list" else stacked, lora, tokens
        program: Any = compiled(partial(_pass, few, policy), device, *args)
        fixed = weight_bytes(config, precision) + RUNTIME[device.platform]
        more = (config.num_layers - LAYERS) * _kept_by_layer(few, precision, policy, tokens)
        needed = fixed + program.memory_analysis().temp_size_in_bytes + more
        if memory is not None and needed * SPARE > memory:
            raise ValueError(f"needs {human_size(needed)}, available: {human_size(memory)}")
        return lambda: program(*args)

    return {policy: partial(build, policy) for policy in REMAT}


def _random_adapter(config: GLMConfig) -> LoRA:
    """Return an adapter without zeros, so that all gradients say something."""
    lora = init_lora(config, jax.random.key(0))
    leaves, structure = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    made = [0.02 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, made)


def _pass(
    config: GLMConfig, policy: str, params: Any, lora: LoRA, tokens: jax.Array
) -> list[jax.Array]:
    """Return the hidden states and the gradients of the adapter by half the sum of their
    squares."""
    x, backward = jax.vjp(
        lambda lora: hidden(config, params, tokens, lora=lora, remat=policy), lora
    )
    return [x, *jax.tree.leaves(backward(x))]


def _kept_by_layer(config: GLMConfig, precision: Precision, policy: str, tokens: jax.Array) -> int:
    """Return the bytes that each layer more keeps for the backward pass."""

    def kept(layers: int) -> int:
        some = dataclasses.replace(config, num_layers=layers)
        lora = jax.eval_shape(partial(init_lora, some), jax.random.key(0))

        def forward(params: Any, lora: LoRA, tokens: jax.Array) -> Any:
            run = lambda lora: hidden(some, params, tokens, lora=lora, remat=policy)  # noqa: E731
            return jax.vjp(run, lora)[1]

        return residual_bytes(
            forward, abstract_params(some, Precision(precision.dtype)), lora, tokens
        )

    return kept(2) - kept(1)
