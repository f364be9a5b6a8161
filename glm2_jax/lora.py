"""Low-rank adapters (LoRA), in a tree separate from the base model.

An adapted product is W x + scale * B (A x). A and B are float32 with a leading axis of layers; the
base never changes, so one base can have several adapters, and gradients can be taken of an adapter
alone. Axis letters as in `glm2_jax.model`.

The targets have the published names of the matrices. A fused matrix has one A, and a B for each
part that the model keeps separate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from glm2_jax.config import GLMConfig
from glm2_jax.errors import UsageError
from glm2_jax.linear import einsum
from glm2_jax.mesh import axis_sizes

Weights = dict[str, jax.Array]
Shapes = dict[str, tuple[int, ...]]


class Target(NamedTuple):
    """A published matrix: the einsum of the product with A, and those with the B of every part."""

    down: str
    up: dict[str, str]


TARGETS: dict[str, Target] = {
    "query_key_value": Target(
        "BTD,RD->BTR", {"q": "BTR,NHR->BTNH", "k": "BTR,KHR->BTKH", "v": "BTR,KHR->BTKH"}
    ),
    "dense": Target("BTNH,RNH->BTR", {"b": "BTR,DR->BTD"}),
    "dense_h_to_4h": Target("BTD,RD->BTR", {"b": "BTR,CFR->BTCF"}),
    "dense_4h_to_h": Target("BTF,RF->BTR", {"b": "BTR,DR->BTD"}),
}

GROUPS: dict[str, tuple[str, ...]] = {
    "attn": ("query_key_value",),
    "attn+mlp": ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    "all-linear": tuple(TARGETS),
}


@flax.struct.dataclass
class LoRA:
    """An adapter.

    Attributes:
        layers: target -> {"a": A, and one B for each part}, see `adapter_shapes`; float32, with a
            leading axis of layers. It may also hold the float32 scalars "scale" and "kept", which
            replace `scale` and 1 - `dropout` so that one program serves all values.
        scale: target -> the factor of B (A x); a `FrozenDict`, as it is static under jit.
        dropout: rate at which elements of x are dropped before A, if a dropout key is given.
    """

    layers: dict[str, Weights]
    scale: Mapping[str, float] = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def num_params(self) -> int:
        """The number of parameters."""
        return sum(x.size for x in jax.tree.leaves(self.layers))


def find_targets(wanted: str | Sequence[str]) -> tuple[str, ...]:
    """Return the targets that names stand for, each once, in the order of `TARGETS`.

    Args:
        wanted: names of targets and groups; a string may hold several, separated by commas.

    Raises:
        UsageError: no names, or a name that is neither a target nor a group.
    """
    names = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    found = {target for name in names for target in GROUPS.get(name.strip(), (name.strip(),))}
    unknown = sorted(found - TARGETS.keys())
    if unknown or not found:
        raise UsageError(
            f"The target {', '.join(map(repr, unknown)) or repr('')} matches nothing.",
            f"The matrices are {', '.join(TARGETS)}.",
            f"Name some of them, or a group: {', '.join(GROUPS)}.",
        )
    return tuple(target for target in TARGETS if target in found)


def weight_axes(target: Target) -> dict[str, str]:
    """Return the axis letters of a target's A and B in one layer: {"a": "RD", "q": "NHR", ...}."""
    specs = {"a": target.down, **target.up}
    return {name: spec.split("->")[0].split(",")[1] for name, spec in specs.items()}


def adapter_shapes(config: GLMConfig, target: str, rank: int) -> Shapes:
    """Return the shapes of a target's A and B in one layer."""
    sizes = {**axis_sizes(config), "R": rank}
    weights = weight_axes(TARGETS[target])
    return {name: tuple(sizes[axis] for axis in axes) for name, axes in weights.items()}


def scale_of(alpha: float, rank: int, rslora: bool = False) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA (arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def init_lora(
    config: GLMConfig,
    key: jax.Array,
    *,
    rank: int = 8,
    alpha: float = 32,
    targets: str | Sequence[str] = "attn",
    dropout: float = 0.0,
    rslora: bool = False,
) -> LoRA:
    """Make a new adapter, which changes nothing yet.

    As in the peft library, A is uniform in +-1 / sqrt(columns) (Kaiming with a = sqrt(5)), B zero.

    Args:
        config: the architecture of the base.
        key: a random key.
        rank: R, at least 1.
        alpha: numerator of the scale, see `scale_of`.
        targets: see `find_targets`.
        dropout: see `LoRA`.
        rslora: rank-stabilized scale.

    Raises:
        UsageError: a rank below 1, a dropout rate outside [0, 1), an unknown target.
    """
    if rank < 1:
        raise UsageError(f"The rank must be at least 1, got {rank}.")
    if not 0 <= dropout < 1:
        raise UsageError(f"The dropout rate must be at least 0 and below 1, got {dropout:g}.")
    names = find_targets(targets)
    layers = {}
    for name, target_key in zip(names, jax.random.split(key, len(names)), strict=True):
        shapes = adapter_shapes(config, name, rank)
        stacked = {part: (config.num_layers, *shape) for part, shape in shapes.items()}
        layers[name] = {part: jnp.zeros(shape, jnp.float32) for part, shape in stacked.items()}
        bound = 1 / math.sqrt(math.prod(shapes["a"][1:]))
        layers[name]["a"] = jax.random.uniform(
            target_key, stacked["a"], jnp.float32, minval=-bound, maxval=bound
        )
    scale = scale_of(alpha, rank, rslora)
    return LoRA(layers, FrozenDict(dict.fromkeys(names, scale)), dropout)


def adapt(
    lora: LoRA | None,
    target: str,
    x: jax.Array,
    dropout_key: jax.Array | None = None,
    columns: jax.Array | None = None,
) -> Callable[[str], jax.Array | None]:
    """Compute what one layer of an adapter adds to a target's products with x.

    Args:
        lora: the adapter, its arrays without the axis of layers; None adds nothing.
        target: one of `TARGETS`.
        x: the activations that the target is multiplied with.
        dropout_key: drops elements of x, in training; targets may share it.
        columns: int32 [T], the columns' numbers in the text if x is a part of it: what is dropped
            of a column then does not depend on the others.

    Returns:
        A function from a part to the float32 array to add to its product, or None. A and B are
        rounded to the dtype of x, their products are float32.
    """
    if lora is None or target not in lora.layers:
        return lambda part: None
    weights, specs = lora.layers[target], TARGETS[target]
    scale = weights["scale"] if "scale" in weights else lora.scale[target]
    if dropout_key is not None and lora.dropout > 0:
        target_key = jax.random.fold_in(dropout_key, list(TARGETS).index(target))
        share = jnp.asarray(weights.get("kept", 1 - lora.dropout))
        kept = _kept(target_key, share, x.shape, columns)
        x = jnp.where(kept, x / share.astype(x.dtype), 0)
    low = einsum(specs.down, x, weights["a"].astype(x.dtype)).astype(x.dtype)
    return lambda part: scale * einsum(specs.up[part], low, weights[part].astype(x.dtype))


def _kept(
    key: jax.Array, share: jax.Array, shape: tuple[int, ...], columns: jax.Array | None
) -> jax.Array:
    """Draw which elements are not dropped: bool [B, T, ...]."""
    if columns is None:
        return jax.random.bernoulli(key, share, shape)

    def draw(column: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, column)
        return jax.random.bernoulli(own, share, (shape[0], *shape[2:]))

    return jax.vmap(draw, out_axes=1)(columns)


def with_lora(params: Mapping[str, Any], lora: LoRA) -> dict[str, Any]:
    """Return the params with an adapter inside, for programs that take only params."""
    return {**params, "lora": lora}


def layer_of(lora: LoRA | None, layer: int) -> LoRA | None:
    """Return one layer of an adapter."""
    return jax.tree.map(lambda x: x[layer], lora)
