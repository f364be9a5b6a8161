"""The measured limits of a device: memory bandwidth and matrix products.

Everything is timed as the best of several repetitions: a limit is what is possible at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from glm2_jax.runtime.dtypes import dtype_name

# Repetitions, after one that does not count; on a slow machine fewer, but at least three.
REPEATS, SECONDS = 20, 0.5
_ROW = 4096  # elements that are summed up to one


@dataclass(frozen=True)
class Ceilings:
    """Measured limits, of one device or of several together."""

    copy: float  # bytes per second, read and written, of changing a large array in place
    read: float  # bytes per second of a large array, summed up or multiplied by a vector
    matmul: dict[str, float]  # operations per second (two for a product and its sum) by dtype
    devices: int = 1  # by how many the limits of one were multiplied

    @property
    def bandwidth(self) -> float:
        """Bytes per second: the better of the two."""
        return max(self.copy, self.read)

    def better(self, other: Ceilings) -> Ceilings:
        """Return the higher of each: other work of the machine can only make a limit too low."""
        matmul = {name: max(ops, other.matmul[name]) for name, ops in self.matmul.items()}
        copy, read = max(self.copy, other.copy), max(self.read, other.read)
        return replace(self, copy=copy, read=read, matmul=matmul)

    def times(self, devices: int) -> Ceilings:
        """Return the limits of so many devices, each with its own memory, from those of one."""
        matmul = {name: devices * ops for name, ops in self.matmul.items()}
        return Ceilings(devices * self.copy, devices * self.read, matmul, devices)


def measure_ceilings(
    device: Any, *, array_bytes: int | None = None, matrix: int | None = None
) -> Ceilings:
    """Measure a device with an array and square matrices of these sizes, by default by its kind;
    float32 is not rounded to TF32, as in the model."""
    # By default far beyond every cache, and small compared with a model.
    cpu = device.platform == "cpu"
    array_bytes = array_bytes or (2**29 if cpu else 2**30)
    matrix = matrix or (2048 if cpu else 8192)
    with jax.default_device(device):
        large = jnp.ones((max(array_bytes // 4 // _ROW, 1), _ROW), jnp.float32)
        size = large.nbytes
        reads = (lambda x: x.sum(), lambda x: x.sum(axis=1), lambda x: _product(x[:1], x))
        read = size / min(_best(one, large) for one in reads)
        # In place, or a CPU would spend its time on allocating pages for the result.
        copy = 2 * size / _best(jnp.negative, large, in_place=True)
        matmul = {}
        for dtype in (jnp.bfloat16, jnp.float32):
            square = jnp.ones((matrix, matrix), dtype)
            matmul[dtype_name(dtype)] = 2 * matrix**3 / _best(lambda x: _product(x, x), square)
    return Ceilings(copy, read, matmul)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x times the transpose of w: both are contiguous along what is summed, as in the model."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("MC,RC->MR", x, w, precision=precision, preferred_element_type=jnp.float32)


def _best(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, *, in_place: bool = False
) -> float:
    """Return the seconds of the fastest repetition."""
    program = jax.jit(function, donate_argnums=0 if in_place else ()).lower(x).compile()
    seconds: list[float] = []
    while len(seconds) <= 3 or (len(seconds) <= REPEATS and sum(seconds) < SECONDS):
        start = time.perf_counter()
        result = jax.block_until_ready(program(x))
        seconds.append(time.perf_counter() - start)
        x = result if in_place else x
    return min(seconds[1:])
