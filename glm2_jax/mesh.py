"""The mesh of devices, and the one table that says which of its axes cuts which axis of an array.

A mesh has the axes `data`, `fsdp` and `tensor`. JAX's partitioner does the rest: arrays are placed
by the table, and while a mesh is active (`jax.set_mesh`) the model pins its activations to it. With
no active mesh everything here leaves the programs as they are.
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

# Axis letter -> the mesh axes that cut it; letters as in `glm2_jax.model`. An axis that these do
# not divide is left whole on every device: the key/value heads beyond tensor = K.
RULES: Mapping[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}
# The model axis of weights alone: activations are cut along their batch instead.
WEIGHT_RULES: Mapping[str, tuple[str, ...]] = {**RULES, "D": ("fsdp",)}


def parse_mesh(text: str) -> dict[str, int]:
    """The mesh that a text like "data=2,tensor=4" means: axis -> size, in the order given.

    Axes that are not named have size 1 and come last.

    Raises:
        UsageError: an unknown axis, one that is named twice, a size that is no whole number >= 1.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            raise _bad_mesh(text, f"{name!r} is no axis: there are {', '.join(AXES)}.")
        if name in sizes:
            raise _bad_mesh(text, f"The axis {name} is named twice.")
        if not (size.isascii() and size.isdigit() and int(size) >= 1):
            raise _bad_mesh(text, f"{size!r} is no size of {name}: a whole number from 1 on is.")
        sizes[name] = int(size)
    return {**sizes, **{axis: 1 for axis in AXES if axis not in sizes}}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of devices.

    Args:
        sizes: axis -> size, the slowest axis first; axes that are absent have size 1.
        devices: default: all that JAX sees, those of other processes included.

    Raises:
        UsageError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {**sizes, **{axis: 1 for axis in AXES if axis not in sizes}}
    if math.prod(sizes.values()) != len(devices):
        raise _wrong_count(sizes, len(devices))
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds, devices=devices)


def active_mesh() -> Mapping[str, int]:
    """Axis -> size of the mesh that is active; empty without one.

    A mesh with other axes is the caller's own affair, and so are axes that `jax.shard_map` has
    taken: what runs inside it sees one device's part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ours = set(mesh.axis_names) == set(AXES) and set(mesh.axis_types) == {AxisType.Auto}
    return dict(mesh.shape) if ours else {}


def constrain(x: jax.Array, *letters: str | None) -> jax.Array:
    """Pins an activation to the active mesh; without one, `x` itself.

    Args:
        x: activations.
        *letters: the axis letter of each axis, or None for one that is whole on every device.
    """
    mesh = active_mesh()
    if not mesh:
        return x
    return jax.lax.with_sharding_constraint(x, partition(letters, x.shape, mesh, RULES))


def pieces(letter: str, size: int, rules: Mapping[str, tuple[str, ...]] = RULES) -> int:
    """In how many pieces the active mesh cuts an axis; 1 without a mesh."""
    return _count(rules.get(letter, ()), size, active_mesh())


def partition(
    letters: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mapping[str, int],
    rules: Mapping[str, tuple[str, ...]] = WEIGHT_RULES,
) -> PartitionSpec:
    """How an array is cut. Mesh axes of size 1 are not named: equal cuts have equal names.

    Args:
        letters: the axis letter of each axis, or None for one that is never cut.
        shape: of the array.
        mesh: axis -> size.
        rules: which mesh axes cut which letter.
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
    """Axis letter -> its size in the weights."""
    return {
        "L": config.num_layers,
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.ffn_hidden_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "C": 2,
    }


def mesh_text(sizes: Mapping[str, int]) -> str:
    """The mesh as the flag writes it, without axes of size 1: "data=2,tensor=4"."""
    named = [f"{axis}={size}" for axis, size in sizes.items() if size > 1]
    return ",".join(named) or "data=1"


def _count(axes: Sequence[str], size: int, mesh: Mapping[str, int]) -> int:
    """Pieces that mesh axes cut an axis of `size` into: 1 where they do not divide it."""
    count = math.prod(mesh.get(axis, 1) for axis in axes)
    return count if size % count == 0 else 1


# How one CPU becomes several devices, to try a mesh.
_VIRTUAL = " One CPU counts as {0} with XLA_FLAGS=--xla_force_host_platform_device_count={0}."


def _bad_mesh(text: str, why: str) -> UsageError:
    return UsageError(f"The mesh {text!r} makes no sense.", why, "Write it like data=2,tensor=4.")


def _wrong_count(sizes: Mapping[str, int], devices: int) -> UsageError:
    wanted = math.prod(sizes.values())
    fitting = []
    for axis, size in sizes.items():
        others = wanted // size
        if devices % others == 0:
            fitting.append(mesh_text({**sizes, axis: devices // others}))
    choices = list(dict.fromkeys(fitting)) or [f"tensor={devices}"]
    there = "There is 1 device" if devices == 1 else f"There are {devices} devices"
    return UsageError(
        f"The mesh {mesh_text(sizes)} takes {wanted} devices.",
        f"{there}, and a mesh takes all of them.",
        f"Use a mesh that multiplies to {devices}, such as {' or '.join(choices)}."
        + (_VIRTUAL.format(wanted) if devices == 1 else ""),
    )


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters lie on; None where they are on one device."""
    where = params["final_norm"].sharding
    return where.mesh if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh) else None
