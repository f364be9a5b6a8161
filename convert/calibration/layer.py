"""One layer while it is quantized: its products in their order, each with the inputs it then gets.

The products of a layer are rounded in four steps, and every step sees the activations that the
rounded weights before it give. GPTQ also sees those of the float model, and rounds towards the
outputs that they have there, which corrects what earlier layers lost. Activations are float32; of
the inputs of a step only means over all tokens are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from convert.calibration.rounding import (
    Form,
    Rounded,
    descending,
    dot,
    gptq,
    inverse_factor,
    nearest,
    output_error,
)
from convert.calibration.scaling import channel_scales
from glm2_jax.config import GLMConfig
from glm2_jax.context import token_context
from glm2_jax.linear import einsum
from glm2_jax.model import GLMBlock, biased, run_layer
from glm2_jax.norms import ACTIVATIONS
from glm2_jax.schemes import COLUMN_AXES

STEPS = (("q", "k", "v"), ("o",), ("gate_up",), ("down",))
"""The products that read the same activations, in the order in which a layer computes them."""

# Activations [B, T, D], those of the float model or None, and the tokens [B, T].
Batches = Iterable[tuple[jax.Array, jax.Array | None, jax.Array]]


@dataclass(frozen=True)
class Method:
    """How weights are rounded; the fields are flags of `convert.quantize`."""

    name: str  # "rtn", "awq" or "gptq"
    form: Form
    clip: bool = True  # whether scales are searched
    act_order: bool = False
    damp: float = 0.01


class Inputs(NamedTuple):
    """What is kept of the inputs of a product, as means over all tokens."""

    moment: jax.Array  # of x x^T, float32 [C, C]
    magnitude: jax.Array  # of |x|, float32 [C]
    # Of r x^T, float32 [C, C], where r is the input that the float model has; None = not known.
    cross: jax.Array | None


@dataclass
class Layer:
    """The parameters of a layer: `weights` are float32, as the quantized layer computes with them;
    `rounded` has those that are rounded already. `dtype` is the type in which the others are
    stored."""

    config: GLMConfig
    weights: dict[str, jax.Array]
    dtype: np.dtype
    rounded: dict[str, Rounded] = field(default_factory=dict)

    def quantize(self, method: Method, batches: Callable[[], Batches] | None) -> dict[str, float]:
        """Round all products; returns the error of each step, as a share of its output.

        `batches` gives the input of the layer; None for the method "rtn", which reads none and has
        no errors to report.
        """
        errors, original = {}, dict(self.weights)
        for step in STEPS:
            weight = jnp.concatenate([self._matrix(name) for name in step])
            if batches is None:
                self._set(step, nearest(weight, method.form))
                continue
            inputs = self._inputs(step[0], batches(), original)
            if method.name == "awq":
                scales = self._fold(step[0], weight, inputs, method.form)
                outer = inputs.moment / (scales[:, None] * scales)
                rounded = nearest(weight * scales, method.form, outer if method.clip else None)
                result = rounded.floats() / scales
            else:
                weight, rounded = _by_gptq(weight, inputs, method)
                result = rounded.floats()
            self._set(step, rounded)
            error = output_error(result - weight, inputs.moment)
            errors[step[0]] = float(error / output_error(weight, inputs.moment))
        return errors

    def _matrix(self, name: str) -> jax.Array:
        weight = self.weights[name]
        return weight.reshape(-1, math.prod(weight.shape[-COLUMN_AXES[name] :]))

    def _set(self, step: tuple[str, ...], rounded: Rounded) -> None:
        """Put rounded rows in place of the weights of a step."""
        start = 0
        for name in step:
            stop = start + len(self._matrix(name))
            part = jax.tree.map(lambda x, rows=slice(start, stop): x[rows], rounded)
            self._put(name, part)
            start = stop

    def _put(self, name: str, rounded: Rounded) -> None:
        self.rounded[name] = rounded
        self.weights[name] = rounded.floats().reshape(self.weights[name].shape)

    def _inputs(self, name: str, batches: Batches, original: Mapping[str, jax.Array]) -> Inputs:
        C, total, count = self._matrix(name).shape[1], None, 0
        for x, reference, tokens in batches:
            if total is None:
                square = jnp.zeros((C, C))
                total = Inputs(square, jnp.zeros(C), None if reference is None else square)
            before = None if reference is None else (original, reference)
            total = _add(self.config, name, total, self.weights, x, tokens, before)
            count += tokens.size
        assert total is not None
        return jax.tree.map(lambda x: x / count, total)

    def _fold(self, name: str, weight: jax.Array, inputs: Inputs, form: Form) -> jax.Array:
        """Return the scales [C] of a step's input, by which what makes the input is divided."""
        config, magnitude = self.config, inputs.magnitude
        if name == "down" and config.block.mlp != "swiglu":
            return jnp.ones_like(magnitude)  # the activation is not linear
        if name == "o":  # the heads that read one head of v have the same scales
            heads = magnitude.reshape(config.num_kv_heads, -1, config.head_dim)
            magnitude = jnp.broadcast_to(heads.mean(1, keepdims=True), heads.shape).reshape(-1)
        scales, alpha = channel_scales(weight, inputs.moment, magnitude, form)
        if alpha == 0:
            return scales
        if name == "o":
            heads = scales.reshape(config.num_kv_heads, -1, config.head_dim)
            self._divide_rows("v", heads[:, 0])
        elif name == "down":
            self._divide_rows("gate_up", jnp.stack([jnp.ones_like(scales), scales]))
        else:
            scales = self._divide_norm("attn_norm" if name == "q" else "mlp_norm", scales)
        return scales

    def _divide_rows(self, name: str, scales: jax.Array) -> None:
        """Divide the rows of a rounded weight, of which no integer changes, and its bias."""
        integers, scale = self.rounded[name]
        self._put(name, Rounded(integers, scale / scales.reshape(-1, 1)))
        self._divide_bias(f"{name}_bias", scales)

    def _divide_norm(self, name: str, scales: jax.Array) -> jax.Array:
        """Divide a norm; returns what it was divided by, which rounding to its type decides."""
        before = self.weights[name]
        after = self._stored(before / scales)
        usable = (after != 0) & jnp.isfinite(after)
        after = jnp.where(usable, after, before)
        scales = jnp.where(usable & (before != 0), before / after, 1.0)
        self.weights[name] = after
        self._divide_bias(f"{name}_bias", scales)
        return scales

    def _divide_bias(self, name: str, scales: jax.Array) -> None:
        if name in self.weights:
            self.weights[name] = self._stored(self.weights[name] / scales)

    def _stored(self, x: jax.Array) -> jax.Array:
        """Return a float32 array rounded to what the file can hold."""
        return x.astype(self.dtype).astype(jnp.float32)


def _by_gptq(weight: jax.Array, inputs: Inputs, method: Method) -> tuple[jax.Array, Rounded]:
    """Return the weight that is rounded, and what it is rounded to.

    It is W' = W C (M + damping)^-1 with C = mean(r x^T), which has for the inputs x the outputs
    nearest to W r; the damping keeps it near W.
    """
    moment, factor = inputs.moment, inverse_factor(inputs.moment, method.damp)
    if inputs.cross is not None:
        weight = weight + dot(dot(dot(weight, inputs.cross - moment), factor.T), factor)
    order = None
    if method.act_order:
        order = descending(moment)
        factor = inverse_factor(moment[order][:, order], method.damp)
    return weight, gptq(weight, factor, method.form, search=method.clip, order=order)


def _run(config: GLMConfig, weights: Mapping[str, jax.Array], x, tokens) -> tuple[Any, Any]:
    """Run a layer: (its output, the results of its norms and the input of `o`)."""
    context, _ = token_context(config, tokens, None, None, None, x.dtype)
    layer = jnp.int32(0)
    step = nn.apply(
        run_layer, GLMBlock(config), mutable=["intermediates"],
        capture_intermediates=lambda _, method: method == "_norm",
    )  # fmt: skip
    (carry, _), kept = step({"params": weights}, (x, None, None), layer, context, None)
    return carry[0], kept["intermediates"]


@partial(jax.jit, static_argnums=0)
def layer_output(
    config: GLMConfig, weights: Mapping[str, jax.Array], x: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Return the output of a layer, float32 [B, T, D], for its input and the tokens [B, T]."""
    return _run(config, weights, x, tokens)[0]


@partial(jax.jit, static_argnums=(0, 1))
def _add(
    config: GLMConfig,
    name: str,
    total: Inputs,
    weights: Mapping[str, jax.Array],
    x: jax.Array,
    tokens: jax.Array,
    before: tuple[Mapping[str, jax.Array], jax.Array] | None,
) -> Inputs:
    """Add the inputs of a step to `total`; `before` has weights and x of the float model."""
    found, cross = _step_input(config, name, weights, x, tokens), total.cross
    if before is not None and cross is not None:
        cross = cross + dot(_step_input(config, name, *before, tokens).T, found)
    moment = total.moment + dot(found.T, found)
    return Inputs(moment, total.magnitude + jnp.abs(found).sum(axis=0), cross)


def _step_input(config: GLMConfig, name: str, weights, x, tokens) -> jax.Array:
    """Return the input [B * T, C] of a step; what it does not depend on is not computed."""
    _, kept = _run(config, weights, x, tokens)
    if name == "o":
        found = kept["o"][0]
    else:
        norms = kept["_norm"]
        found = norms[0 if name == "q" else 2 if config.block.sandwich else 1]
    if name == "down":
        both = einsum("BTD,CFD->BTCF", found, weights["gate_up"])
        found = ACTIVATIONS[config.block.mlp](biased(both, weights.get("gate_up_bias")))
    return found.reshape(tokens.size, -1)
