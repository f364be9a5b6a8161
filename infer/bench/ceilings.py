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

REPEATS = 20
# Far beyond every cache, and small compared with a model.
ARRAY_BYTES = {"cpu": 2**29, "gpu": 2**30, "tpu": 2**30}
MATRIX = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
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
        return replace(
            self, copy=max(self.copy, other.copy), read=max(self.read, other.read), matmul=matmul
        )

    def times(self, devices: int) -> Ceilings:
        """Return the limits of so many devices, each with its own memory, from those of one."""
        matmul = {name: devices * ops for name, ops in self.matmul.items()}
        return Ceilings(devices * self.copy, devices * self.read, matmul, devices)


def measure_ceilings(
    device: Any,
    *,
    array_bytes: int | None = None,
    matrix: int | None = None,
    repeats: int = REPEATS,
) -> Ceilings:
    """Measure a device; float32 is not rounded to TF32, as in the model.

    Args:
        array_bytes: size of the large array; None = by the kind of device.
        matrix: rows and columns of the products; None = by the kind of device.
        repeats: repetitions of each measurement.
    """
    array_bytes = array_bytes or ARRAY_BYTES.get(device.platform, 2**30)
    matrix = matrix or MATRIX.get(device.platform, 8192)
    with jax.default_device(device):
        large = jnp.ones((max(array_bytes // 4 // _ROW, 1), _ROW), jnp.float32)
        size = large.nbytes
        reads = (lambda x: x.sum(), lambda x: x.sum(axis=1), lambda x: _product(x[:1], x))
        read = size / min(_best(one, large, repeats) for one in reads)
        copy = 2 * size / _best_in_place(large, repeats)
        matmul = {}
        for dtype in (jnp.bfloat16, jnp.float32):
            square = jnp.ones((matrix, matrix), dtype)
            seconds = _best(lambda x: _product(x, x), square, repeats)
            matmul[dtype_name(dtype)] = 2 * matrix**3 / seconds
    return Ceilings(copy, read, matmul)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x times the transpose of w: both are contiguous along what is summed, as in the model."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("MC,RC->MR", x, w, precision=precision, preferred_element_type=jnp.float32)


def _best(function: Callable[[jax.Array], jax.Array], x: jax.Array, repeats: int) -> float:
    program = jax.jit(function).lower(x).compile()
    jax.block_until_ready(program(x))
    return min(timed(lambda: program(x)) for _ in range(repeats))


def _best_in_place(x: jax.Array, repeats: int) -> float:
    """In place, or a CPU would spend its time on allocating pages for the result."""
    program = jax.jit(jnp.negative, donate_argnums=0).lower(x).compile()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        x = jax.block_until_ready(program(x))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds until the result of `run` is ready."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
