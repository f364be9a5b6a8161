"""GPTQ compared with the formula, and the search of scales."""

import jax.numpy as jnp
import numpy as np
import pytest

from convert.calibration.rounding import (
    Form,
    descending,
    gptq,
    inverse_factor,
    nearest,
    output_error,
)
from glm2_jax.errors import CheckpointError
from glm2_jax.quant import quantize, unpack_int4
from glm2_jax.schemes import SCHEMES

FORM = Form(group=8, bits=4)
ROWS, COLUMNS, DAMP = 6, 32, 0.01


def problem(seed: int = 0, rows: int = ROWS):
    """A weight [R, C], and the moment of inputs that depend on each other."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((rows, COLUMNS), np.float32)
    mixed = random.standard_normal((COLUMNS, COLUMNS)) * np.linspace(0.1, 2, COLUMNS)
    inputs = random.standard_normal((400, COLUMNS)) @ mixed
    return weight, (inputs.T @ inputs / len(inputs)).astype(np.float32)


def plain_gptq(weight, moment, order=None):
    """Row by row in float64: a column is rounded, the rest is corrected by the inverse Hessian, and
    the column is removed from the inverse (Frantar and Alistarh, OBC, 2022, equations 3 and 4)."""
    weight, moment = weight.astype(np.float64), moment.astype(np.float64)
    inverse = np.linalg.inv(moment + DAMP * moment.diagonal().mean() * np.eye(COLUMNS))
    columns = range(COLUMNS) if order is None else order
    integers, scales = np.zeros(weight.shape, int), np.zeros((len(weight), COLUMNS // FORM.group))
    for row, integer, scale in zip(weight, integers, scales, strict=True):
        left = inverse.copy()
        scale[:] = np.abs(row.reshape(-1, FORM.group)).max(axis=1) / 7
        for place, i in enumerate(columns):
            group = i // FORM.group
            if order is None and place % FORM.group == 0:
                scale[group] = np.abs(row[i : i + FORM.group]).max() / 7
            integer[i] = np.clip(np.rint(row[i] / scale[group]), -8, 7)
            error = (row[i] - integer[i] * scale[group]) / left[i, i]
            row -= error * left[:, i]
            left -= np.outer(left[:, i], left[i]) / left[i, i]
    return integers, scales


@pytest.mark.parametrize("ordered", [False, True])
def test_gptq_is_the_formula(ordered):
    weight, moment = problem()
    order = descending(jnp.asarray(moment)) if ordered else None
    used = moment if order is None else moment[np.ix_(order, order)]
    found = gptq(jnp.asarray(weight), inverse_factor(jnp.asarray(used), DAMP), FORM, order=order)
    integers, scales = plain_gptq(weight, moment, None if order is None else np.asarray(order))
    np.testing.assert_array_equal(found.integers, integers)
    np.testing.assert_allclose(found.scale, scales, rtol=1e-4)


def test_what_lowers_the_error_of_the_output():
    weight, moment = map(jnp.asarray, problem(seed=1, rows=64))
    factor = inverse_factor(moment, DAMP)
    found = [
        nearest(weight, FORM),
        nearest(weight, FORM, moment),
        gptq(weight, factor, FORM),
        gptq(weight, factor, FORM, search=True),
    ]
    plain, *better, best = (float(output_error(one.floats() - weight, moment)) for one in found)
    assert best < min(better) and max(better) < 0.8 * plain
    three = nearest(weight, Form(FORM.group, bits=3))
    assert (int(three.integers.min()), int(three.integers.max())) == (-3, 3)


def test_nearest_is_what_the_loader_does():
    weight, _ = problem(rows=5)
    weight[2] = 0
    values, scale = quantize(np.tile(weight, 4), SCHEMES["int4"])
    found = nearest(jnp.asarray(np.tile(weight, 4)), Form(128, 4))
    np.testing.assert_array_equal(found.integers, unpack_int4(values))
    np.testing.assert_allclose(found.scale, scale, rtol=3e-7)


def test_inputs_that_are_always_zero_and_those_that_are_not_finite():
    """The damping grows until the moment can be factorized, also where all of it is 0."""
    for moment in (jnp.zeros((8, 8)), jnp.ones((8, 8)) * 1e6):
        weight = jnp.ones((2, 8))
        rounded = gptq(weight, inverse_factor(moment, 1e-9), FORM)
        assert bool(jnp.isfinite(rounded.floats()).all())
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        inverse_factor(jnp.full((8, 8), jnp.nan), DAMP)
