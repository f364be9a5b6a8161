"""Rounds matrices to small integers: to the nearest, or column by column as GPTQ does.

A weight W is float32 [R, C], R rows and C columns, in groups of consecutive columns. `moment` is
M = mean(x x^T) [C, C] of its inputs, so that the mean squared error of its outputs is the sum over
rows of D M D^T, with D = W - scale * integers.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax.errors import CheckpointError
from glm2_jax.quant import NO_SCALE

# A scale is searched from that of the largest value down to this share of it.
_SMALLEST, _STEPS = 0.5, 26


class Form(NamedTuple):
    """How a matrix is rounded: columns that share a scale, bits of the integers."""

    group: int
    bits: int

    @property
    def largest(self) -> int:
        """The largest integer; the smallest is one further from 0."""
        return 2 ** (self.bits - 1) - 1


class Rounded(NamedTuple):
    """A matrix as int8 [R, C] and float32 scales [R, C / group]."""

    integers: jax.Array
    scale: jax.Array

    def floats(self) -> jax.Array:
        """Return the float32 matrix."""
        return self.integers * jnp.repeat(
            self.scale, self.integers.shape[1] // self.scale.shape[1], axis=1
        )


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply matrices in float32 on every platform."""
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def output_error(difference: jax.Array, moment: jax.Array) -> jax.Array:
    """Return the mean squared error that [R, C] `difference` makes, summed over the outputs."""
    return jnp.sum(dot(difference, moment) * difference)


def largest_scale(groups: jax.Array, form: Form) -> jax.Array:
    """Return the scale at which the largest of [..., group] is the largest integer: [...]."""
    scale = jnp.abs(groups).max(axis=-1) / form.largest
    return jnp.where(scale < NO_SCALE, 1.0, scale)


def _round(values: jax.Array, scale: jax.Array, form: Form) -> jax.Array:
    return jnp.clip(jnp.rint(values / scale), -form.largest - 1, form.largest)


def searched_scale(groups: jax.Array, cost, form: Form) -> jax.Array:
    """Return the scale of [..., group] for which `cost` of the differences, [...], is smallest."""
    start = largest_scale(groups, form)

    def attempt(step, best):
        scale, least = best
        tried = start * (1 - step * (1 - _SMALLEST) / (_STEPS - 1))
        rounded = _round(groups, tried[..., None], form) * tried[..., None]
        error = cost(groups - rounded)
        better = error < least
        return jnp.where(better, tried, scale), jnp.where(better, error, least)

    return jax.lax.fori_loop(0, _STEPS, attempt, (start, jnp.full(start.shape, jnp.inf)))[0]


@partial(jax.jit, static_argnames="form")
def nearest(weight: jax.Array, form: Form, moment: jax.Array | None = None) -> Rounded:
    """Round to nearest; with `moment` the scale of a group is the one of the smallest error of its
    part of the output, which may clip its largest values."""
    groups = weight.reshape(len(weight), -1, form.group)
    if moment is None:
        scale = largest_scale(groups, form)
    else:
        blocks = _diagonal_blocks(moment, form.group)

        def cost(difference: jax.Array) -> jax.Array:
            high = jax.lax.Precision.HIGHEST
            return jnp.einsum("rgi,gij,rgj->rg", difference, blocks, difference, precision=high)

        scale = searched_scale(groups, cost, form)
    integers = _round(groups, scale[..., None], form).astype(jnp.int8)
    return Rounded(integers.reshape(weight.shape), scale)


def _diagonal_blocks(moment: jax.Array, group: int) -> jax.Array:
    count = len(moment) // group
    blocks = moment.reshape(count, group, count, group)
    return blocks[jnp.arange(count), :, jnp.arange(count)]


def inverse_factor(moment: jax.Array, damp: float) -> jax.Array:
    """Return U, upper triangular [C, C], with U^T U = (M + damping)^-1.

    The damping is `damp` times the mean of the diagonal, and ten times more until float32 can
    factorize the sum.
    """
    moment = jnp.asarray(moment)
    if not bool(jnp.isfinite(moment).all()):
        raise CheckpointError(
            "The activations hold NaN or infinity.",
            "The weights are damaged, or the text drives the model out of float32.",
            "Check the model with infer.generate, or use another text.",
        )
    while True:
        factor = _inverse_factor(moment, damp)
        if bool(jnp.isfinite(factor).all()):
            return factor
        damp *= 10


@jax.jit
def _inverse_factor(moment: jax.Array, damp: float) -> jax.Array:
    mean = jnp.mean(jnp.diagonal(moment))
    damped = moment + damp * jnp.where(mean > 0, mean, 1.0) * jnp.eye(len(moment))
    # M = V V^T with V upper triangular, by the factorization from the last column on; U = V^-1.
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(moment)), lower=False)


@partial(jax.jit, static_argnames=("form", "search"))
def gptq(
    weight: jax.Array,
    factor: jax.Array,
    form: Form,
    *,
    search: bool = False,
    order: jax.Array | None = None,
) -> Rounded:
    """Round column by column; each error is made good by the columns that follow.

    Column i of W is rounded to q; e = (w_i - q) / U_ii; w_j -= e U_ij for all j > i. The scales of
    a group are chosen when its turn comes, with `search` for the smallest sum of e^2.

    Args:
        weight: float32 [R, C].
        factor: U of `inverse_factor`; with `order` that of the moment in that order.
        form: how it is rounded.
        search: whether scales are searched, or are those of the largest values.
        order: int32 [C], the columns in the order of rounding; scales are then chosen first.

    Source: Frantar et al., GPTQ, 2022, algorithm 1.
    """
    R, C = weight.shape
    group = form.group

    def scales(groups: jax.Array, diagonal: jax.Array) -> jax.Array:
        if not search:
            return largest_scale(groups, form)
        return searched_scale(groups, lambda d: jnp.sum((d / diagonal) ** 2, axis=-1), form)

    fixed = places = None  # the scales [R, C / group], and the group of each column
    if order is not None:
        diagonal = jnp.diagonal(factor)[jnp.argsort(order)]
        fixed = scales(weight.reshape(R, -1, group), diagonal.reshape(-1, group))
        weight, places = weight[:, order], order // group

    def block(weight: jax.Array, start: jax.Array):
        part = jax.lax.dynamic_slice_in_dim(weight, start, group, axis=1)
        rows = jax.lax.dynamic_slice_in_dim(factor, start, group, axis=0)
        own = jax.lax.dynamic_slice_in_dim(rows, start, group, axis=1)
        if fixed is None or places is None:
            scale = jnp.broadcast_to(scales(part, jnp.diagonal(own))[:, None], part.shape)
        else:
            scale = fixed[:, jax.lax.dynamic_slice_in_dim(places, start, group)]
        part, integers, errors = jax.lax.fori_loop(
            0, group, partial(_column, scale, own, form), (part, part, part)
        )
        weight = weight - dot(errors, rows)  # U is 0 left of the block
        return weight, (integers.astype(jnp.int8), scale[:, 0])

    _, (integers, scale) = jax.lax.scan(block, weight, jnp.arange(0, C, group))
    integers = jnp.moveaxis(integers, 0, 1).reshape(R, C)
    if fixed is None or order is None:
        return Rounded(integers, scale.T)
    return Rounded(integers[:, jnp.argsort(order)], fixed)


def _column(scale, own, form, index, carry):
    """Round one column of a block, and correct those of the block that follow."""
    part, integers, errors = carry
    column = part[:, index]
    rounded = _round(column, scale[:, index], form)
    error = (column - rounded * scale[:, index]) / own[index, index]
    part = part - error[:, None] * own[index]
    return part, integers.at[:, index].set(rounded), errors.at[:, index].set(error)


def descending(moment: jax.Array) -> jax.Array:
    """Return the columns, those of the largest inputs first: int32 [C]."""
    return jnp.asarray(np.argsort(-np.asarray(jnp.diagonal(moment)), kind="stable"), jnp.int32)
