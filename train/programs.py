"""Compiled programs, which runs of one process share where their shapes are the same.

The numbers of an adapter (scale, dropout) are part of the structure of `LoRA`, so adapters of other
numbers would be other programs. Here they are arrays, or arguments (`train.optim.Numbers`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from glm2_jax.cli.messages import note
from glm2_jax.config import GLMConfig
from glm2_jax.lora import LoRA
from train.data.batch import Batch
from train.devices import Devices
from train.methods import Method
from train.optim import Numbers
from train.run_folder.log import Log
from train.step import CROSS_ENTROPY, Objective, make_step


class Programs:
    """Programs by what they depend on."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the program of a key, made where it is the first."""
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]


def without_numbers(tree: Any) -> Any:
    """Return a tree whose adapters have no numbers: those of two runs then have one structure."""

    def clear(x: Any) -> Any:
        if not isinstance(x, LoRA):
            return x
        scale = FrozenDict(dict.fromkeys(x.scale, 1.0))
        return dataclasses.replace(x, scale=scale, dropout=0.5 if x.dropout else 0.0)

    return jax.tree.map(clear, tree, is_leaf=lambda x: isinstance(x, LoRA))


def with_scale(lora: LoRA | None) -> LoRA | None:
    """Return an adapter to compute with, its scale among its arrays, one for each layer."""
    if lora is None:
        return None
    layers = {
        target: {"scale": jnp.full(weights["a"].shape[:1], lora.scale[target], jnp.float32)}
        | weights
        for target, weights in lora.layers.items()
    }
    return without_numbers(dataclasses.replace(lora, layers=layers, dropout=0.0))


def shapes(tree: Any) -> Hashable:
    """Return the structure of a tree, and the types and places of its arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((jax.typeof(x), getattr(x, "sharding", None)) for x in leaves)


def compiling_step(
    programs: Programs,
    method: Method,
    config: GLMConfig,
    devices: Devices,
    numbers: Numbers,
    log: Log,
    state: Any,
    *,
    seed: int,
    remat: str,
    objective: Objective = CROSS_ENTROPY,
) -> Callable[[Any, Any, int], Any]:
    """Return the step, which reports when it compiles for a new shape of a batch."""
    options: dict[str, Any] = {
        "dtype": method.dtype, "remat": remat, "effective": method.effective,
        "objective": objective,
    }  # fmt: skip
    key = devices.key(seed)
    compiled: dict[tuple[int, ...], Any] = {}
    own = jax.tree.structure(state)

    def build(arguments: Any) -> Any:
        jax.block_until_ready(arguments)  # the time of earlier steps does not count as compiling
        note(f"compiling the step for {' x '.join(map(str, arguments[3].tokens.shape))} tokens")
        start = time.perf_counter()
        step = make_step(config, out_shardings=devices.shardings(*arguments[1:3]), **options)
        with log.apart(), devices.active():
            found = step.lower(*arguments).compile()
        note(f"compiled in {time.perf_counter() - start:.1f} s")
        return found

    def take(state: tuple[Any, Any], batch: Batch, number: int) -> Any:
        batch = devices.batch(batch)
        shape = batch.tokens.shape
        arguments = (method.base, *without_numbers(state), batch, key, number, numbers)
        if shape not in compiled:
            which = (config, *options.values(), shapes(arguments))
            compiled[shape] = programs.shared(which, lambda: build(arguments))
        *taken, metrics = compiled[shape](*arguments)
        return jax.tree.unflatten(own, jax.tree.leaves(taken)), metrics

    return take
