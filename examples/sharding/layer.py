"""One layer, and three ways to run it on several devices.

The layer is the MLP of a ChatGLM2 block: two matrices, and between them an activation. Axis
letters: B batch, T tokens, D model, F ffn; C = 2, the gate and what passes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

B, T, D, F = 16, 8, 64, 256
Weights = dict[str, jax.Array]


class Way(NamedTuple):
    """A way to run the layer: functions of (weights, x), and these arrays, placed on devices.

    Attributes:
        forward: the layer's output.
        gradient: of a loss by the weights.
    """

    name: str
    mesh: str
    forward: Callable[..., Any]
    gradient: Callable[..., Any]
    weights: Any
    x: Any


def layer(weights: Weights, x: jax.Array) -> jax.Array:
    """Compute [B, T, D] -> [B, T, D] as on one device."""
    both = jnp.einsum("BTD,CFD->BTCF", x, weights["gate_up"])
    hidden = jax.nn.silu(both[:, :, 0]) * both[:, :, 1]
    return jnp.einsum("BTF,DF->BTD", hidden, weights["down"])


def loss(weights: Weights, x: jax.Array) -> jax.Array:
    """Compute a mean over rows, as losses are, to take a gradient of."""
    return jnp.mean(layer(weights, x) ** 2)


def example() -> tuple[Weights, jax.Array]:
    """Return random (weights, x) on one device."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(0, 1, shape), jnp.float32)

    return {"gate_up": draw(2, F, D) * D**-0.5, "down": draw(D, F) * F**-0.5}, draw(B, T, D)


def mesh_of(**sizes: int) -> Mesh:
    """Make a mesh of the first devices; Auto: the compiler decides how results are sharded."""
    kinds = (AxisType.Auto,) * len(sizes)
    count = 1
    for size in sizes.values():
        count *= size
    devices = jax.devices()[:count]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds, devices=devices)


# --- pmap ---------------------------------------------------------------------------------------


def with_pmap(devices: int) -> Way:
    """Run the layer with pmap, the oldest way, which JAX only maintains.

    The leading axis of every argument counts devices, so we cut the batch by hand; each device has
    all weights. We write the sums over devices: `lax.pmean`.
    """
    weights, x = example()
    one_each = jax.pmap(layer, "data", in_axes=(None, 0), devices=jax.devices()[:devices])

    def mean_gradient(weights: Weights, x: jax.Array) -> Weights:
        return lax.pmean(jax.grad(loss)(weights, x), "data")

    gradient = jax.pmap(mean_gradient, "data", in_axes=(None, 0), devices=jax.devices()[:devices])
    pieces = x.reshape(devices, B // devices, T, D)
    return Way("pmap", f"data={devices}", one_each, gradient, weights, pieces)


# --- jit + NamedSharding ------------------------------------------------------------------------


def with_jit(name: str, mesh: Mesh, places: dict[str, P], rows: P) -> Way:
    """Run the layer with jit, as this project does; once called pjit.

    We say how arguments are sharded; the function stays that of one device, and the compiler
    inserts the collectives.
    """
    weights, x = example()
    weights = {n: jax.device_put(weights[n], NamedSharding(mesh, places[n])) for n in weights}
    x = jax.device_put(x, NamedSharding(mesh, rows))
    # Results are to be sharded like the arguments; by default the compiler chooses.
    out = NamedSharding(mesh, rows)
    like = {n: NamedSharding(mesh, places[n]) for n in weights}
    forward = jax.jit(layer, out_shardings=out)
    gradient = jax.jit(jax.grad(loss), out_shardings=like)
    return Way(name, text_of(mesh), forward, gradient, weights, x)


# --- shard_map ----------------------------------------------------------------------------------


def with_shard_map(
    name: str, mesh: Mesh, places: dict[str, P], rows: P, body: Callable[..., jax.Array]
) -> Way:
    """Run the layer with shard_map, where we write every collective ourselves.

    The function sees the part of one device, and devices only communicate by `lax.psum` and others.

    Args:
        body: computes one device's part of the output from its (weights, x).
    """
    way = with_jit(name, mesh, places, rows)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(places, rows), out_specs=rows)

    def mapped_loss(weights: Weights, x: jax.Array) -> jax.Array:
        return jnp.mean(mapped(weights, x) ** 2)

    like = {n: NamedSharding(mesh, places[n]) for n in places}
    gradient = jax.jit(jax.grad(mapped_loss), out_shardings=like)
    return way._replace(forward=jax.jit(mapped), gradient=gradient)


def summed(weights: Weights, x: jax.Array) -> jax.Array:
    """Add up the devices' parts of every sum: each has some columns of the ffn."""
    return lax.psum(layer(weights, x), "tensor")


def gathered(weights: Weights, x: jax.Array) -> jax.Array:
    """Gather the weights, of which each device stores a part, before the product."""
    whole = partial(lax.all_gather, axis_name="fsdp", tiled=True)
    gate_up, down = whole(weights["gate_up"], axis=2), whole(weights["down"], axis=0)
    return layer({"gate_up": gate_up, "down": down}, x)


# --- all of them --------------------------------------------------------------------------------

WHOLE = {"gate_up": P(), "down": P()}
BY_FFN = {"gate_up": P(None, "tensor"), "down": P(None, "tensor")}  # the rules of this project
BY_MODEL = {"gate_up": P(None, None, "fsdp"), "down": P("fsdp")}  # its fsdp axis
CROSSED = {"gate_up": P(None, "tensor"), "down": P("tensor")}  # the second cut does not fit


def ways() -> Iterator[Way]:
    """Yield every way of the comparison."""
    data, tensor, fsdp = mesh_of(data=8), mesh_of(tensor=8), mesh_of(fsdp=8)
    four, both = mesh_of(data=2, tensor=2), mesh_of(data=2, tensor=4)
    yield with_pmap(8)
    yield with_jit("jit", data, WHOLE, P("data"))
    yield with_shard_map("shard_map", data, WHOLE, P("data"), layer)
    yield with_jit("jit", tensor, BY_FFN, P())
    yield with_shard_map("shard_map", tensor, BY_FFN, P(), summed)
    yield with_jit("jit", four, BY_FFN, P("data"))
    yield with_shard_map("shard_map", four, BY_FFN, P("data"), summed)
    yield with_jit("jit", both, BY_FFN, P("data"))
    yield with_shard_map("shard_map", both, BY_FFN, P("data"), summed)
    yield with_jit("jit", fsdp, BY_MODEL, P("fsdp"))
    yield with_shard_map("shard_map", fsdp, BY_MODEL, P("fsdp"), gathered)
    yield with_jit("jit, crossed", tensor, CROSSED, P())


def text_of(mesh: Mesh) -> str:
    """ "data=2,tensor=4" """
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
