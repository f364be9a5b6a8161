"""The mesh of devices, and the one table that says which mesh axis cuts which array axis.

A mesh has the axes `data`, `fsdp` and `tensor`. Arrays are placed by the table, and while a mesh is
active (`jax.set_mesh`) the model constrains its activations by it; JAX's partitioner does the rest.
Without an active mesh nothing here changes a program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glm2_jax.config import GLMConfig
from glm2_jax.errors import UsageError

AXES = ("data", "fsdp", "tensor")

# Axis letter (see `glm2_jax.model`) -> the mesh axes that cut it. An axis that they do not divide
# is replicated, such as the key/value heads where tensor > K.
RULES: Mapping[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}
# D is cut in weights only: activations are cut along their batch instead.
WEIGHT_RULES: Mapping[str, tuple[str, ...]] = {**RULES, "D": ("fsdp",)}


def all_axes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes with the absent axes of size 1 at the end."""
    return {**sizes, **{axis: 1 for axis in AXES if axis not in sizes}}


def parse_mesh(text: str) -> dict[str, int]:
    """Parse a mesh such as "data=2,tensor=4", or raise UsageError: axis -> size, in this order.

    Axes that are not named have size 1 and come last.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            why = f"{name!r} is not an axis: the axes are {', '.join(AXES)}."
        elif name in sizes:
            why = f"The axis {name} is given twice."
        elif not (size.isascii() and size.isdigit() and int(size) >= 1):
            why = f"The size of {name} must be a whole number of at least 1, got {size!r}."
        else:
            sizes[name] = int(size)
            continue
        raise UsageError(f"The mesh {text!r} is not valid.", why, "Write it like data=2,tensor=4.")
    return all_axes(sizes)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh of devices, by default all that JAX sees, including those of other processes.

    The slowest axis of `sizes` is first, absent axes have size 1. UsageError if they do not
    multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = all_axes(sizes)
    wanted, count = math.prod(sizes.values()), len(devices)
    if wanted != count:
        fitting = [
            mesh_text({**sizes, axis: count * size // wanted})
            for axis, size in sizes.items()
            if count * size % wanted == 0
        ]
        choices = " or ".join(dict.fromkeys(fitting)) or f"tensor={count}"
        fix = f"Use a mesh that multiplies to {count}, such as {choices}."
        if count == 1:  # to try a mesh on any machine
            flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
            fix += f" One CPU counts as {wanted} devices with {flag}."
        there = "There is 1 device" if count == 1 else f"There are {count} devices"
        raise UsageError(
            f"The mesh {mesh_text(sizes)} needs {wanted} devices.",
            f"{there}, and a mesh uses all of them.",
            fix,
        )
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds, devices=devices)


def active_mesh() -> Mapping[str, int]:
    """Return axis -> size of the active mesh; empty without one.

    A mesh with other axes does not count, nor do axes inside `jax.shard_map`: code in there sees
    the part of one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ours = set(mesh.axis_names) == set(AXES) and set(mesh.axis_types) == {AxisType.Auto}
    return dict(mesh.shape) if ours else {}


def constrain(x: jax.Array, *letters: str | None) -> jax.Array:
    """Cut an activation over the active mesh by its axis letters (None = replicated), if any."""
    if not (mesh := active_mesh()):
        return x
    return jax.lax.with_sharding_constraint(x, partition(letters, x.shape, mesh, RULES))


def pieces(letter: str, size: int, rules: Mapping[str, tuple[str, ...]] = RULES) -> int:
    """Return into how many pieces the active mesh cuts an axis; 1 without a mesh."""
    return _count(rules.get(letter, ()), size, active_mesh())


def partition(
    letters: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mapping[str, int],
    rules: Mapping[str, tuple[str, ...]] = WEIGHT_RULES,
) -> PartitionSpec:
    """Return how an array is cut by its axis letters (None = never) over a mesh (axis -> size).

    Mesh axes of size 1 are left out: equal cuts are equal specs.
    """
    names = []
    for letter, size in zip(letters, shape, strict=True):
        axes = rules.get(letter or "", ())
        cut = _count(axes, size, mesh) > 1
        named = tuple(axis for axis in axes if cut and mesh[axis] > 1)
        names.append(named[0] if len(named) == 1 else named or None)
    while names and names[-1] is None:
        names.pop()
    return PartitionSpec(*names)


def axis_sizes(config: GLMConfig) -> dict[str, int]:
    """Return axis letter -> its size in the weights."""
    return {
        "L": config.num_layers,
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.ffn_hidden_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "C": config.mlp_inputs,
        "P": config.num_positions,
    }


def mesh_text(sizes: Mapping[str, int]) -> str:
    """Return the mesh as `--mesh` takes it, without axes of size 1: "data=2,tensor=4"."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"


def mesh_of(params: Any) -> Mesh | None:
    """Return the mesh that parameters are sharded over; None if they are on one device."""
    where = params["final_norm"].sharding
    return where.mesh if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh) else None


def _count(axes: Sequence[str], size: int, mesh: Mapping[str, int]) -> int:
    """Return the pieces that mesh axes cut an axis of `size` into: 1 if they do not divide it."""
    count = math.prod(mesh.get(axis, 1) for axis in axes)
    return count if size % count == 0 else 1
