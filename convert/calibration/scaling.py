"""AWQ: scales each input channel of a product before rounding, and undoes it where it comes from.

W x = (W s) (x / s): a channel of large activations gets a large s, and its weights a smaller error.
Division by s is folded into what makes x: a norm, the rows of v for o, the rows of up for down.
Source: Lin et al., AWQ, 2023.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from convert.calibration.rounding import Form, nearest, output_error

_ALPHAS = 20  # steps of the search from 0 to 1


def channel_scales(
    weight: jax.Array, moment: jax.Array, magnitude: jax.Array, form: Form
) -> tuple[jax.Array, float]:
    """Return s [C] and its alpha: s = magnitude^alpha of the smallest output error.

    `weight` is [R, C], `moment` as in `rounding`, `magnitude` the mean |x| of the channels.
    """
    errors = [
        float(_error(weight, moment, magnitude, step / _ALPHAS, form))
        for step in range(_ALPHAS + 1)
    ]
    alpha = int(np.argmin(errors)) / _ALPHAS
    return _scales(magnitude, alpha), alpha


def _scales(magnitude: jax.Array, alpha: float) -> jax.Array:
    scales = jnp.maximum(magnitude, 1e-6 * jnp.max(magnitude)) ** alpha
    scales = jnp.where(jnp.isfinite(scales) & (scales > 0), scales, 1.0)
    return scales / jnp.sqrt(scales.max() * scales.min())


@partial(jax.jit, static_argnames="form")
def _error(weight, moment, magnitude, alpha, form):
    scales = _scales(magnitude, alpha)
    return output_error(nearest(weight * scales, form).floats() / scales - weight, moment)
