"""Low-rank adapters (LoRA): W x + scale * B (A x), in a tree separate from the base model.

The targets have the published names of the matrices. A fused matrix has one A, and a B for each
part that the model keeps separate.
"""

from __future__ import annotations

import dataclasses
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

# Our parameter -> the target whose adapter changes it, and the name of its B.
ADAPTED = {
    "q": ("query_key_value", "q"),
    "k": ("query_key_value", "k"),
    "v": ("query_key_value", "v"),
    "o": ("dense", "b"),
    "gate_up": ("dense_h_to_4h", "b"),
    "down": ("dense_4h_to_h", "b"),
}

GROUPS = {
    "attn": ("query_key_value",),
    "attn+mlp": ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    "all-linear": tuple(TARGETS),
}


@flax.struct.dataclass
class LoRA:
    """An adapter."""

    # Target -> {"a": A, and one B for each part}, see `adapter_shapes`; float32, with a leading
    # axis of layers. It may also hold the float32 scalars "scale" and "kept", which replace `scale`
    # and 1 - `dropout` so that one program serves all values, "gate", see `join_adapters`, and the
    # magnitudes or gains of `glm2_jax.dora`.
    layers: dict[str, dict[str, jax.Array]]
    # Target -> the factor of B (A x); a `FrozenDict`, as it is static under jit.
    scale: Mapping[str, float] = flax.struct.field(pytree_node=False)
    # Rate at which elements of x are dropped before A, if a dropout key is given.
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def num_params(self) -> int:
        """The number of parameters."""
        return sum(x.size for x in jax.tree.leaves(self.layers))


def find_targets(wanted: str | Sequence[str]) -> tuple[str, ...]:
    """Return the targets that names stand for, each once, in the order of `TARGETS`.

    A name is that of a target or a group (else UsageError); a string may hold several, with commas.
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


def adapter_shapes(config: GLMConfig, target: str, rank: int) -> dict[str, tuple[int, ...]]:
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
    """Make a new adapter, which changes nothing yet; see `scale_of` and `find_targets`.

    As in the peft library, A is uniform in +-1 / sqrt(columns) (Kaiming with a = sqrt(5)), B zero.

    Raises:
        UsageError: a rank below 1, a dropout rate outside [0, 1), an unknown target.
    """
    if rank < 1:
        raise UsageError(f"The rank must be at least 1, got {rank}.")
    check_dropout(dropout)
    names = find_targets(targets)
    layers, L = {}, config.num_layers
    for name, target_key in zip(names, jax.random.split(key, len(names)), strict=True):
        shapes = adapter_shapes(config, name, rank)
        weights = {part: jnp.zeros((L, *shape), jnp.float32) for part, shape in shapes.items()}
        bound = 1 / math.sqrt(math.prod(shapes["a"][1:]))
        a = jax.random.uniform(target_key, (L, *shapes["a"]), jnp.float32, -bound, bound)
        layers[name] = weights | {"a": a}
    scale = scale_of(alpha, rank, rslora)
    return LoRA(layers, FrozenDict(dict.fromkeys(names, scale)), dropout)


def check_dropout(rate: float) -> None:
    """Raise UsageError for a dropout rate outside [0, 1)."""
    if not 0 <= rate < 1:
        raise UsageError(f"The dropout rate must be at least 0 and below 1, got {rate:g}.")


def adapt(
    lora: LoRA | None,
    target: str,
    x: jax.Array,
    dropout_key: jax.Array | None = None,
    columns: jax.Array | None = None,
) -> Callable[[str], jax.Array | None]:
    """Compute what one layer of an adapter, or None, adds to a target's products with x.

    The result is a function from a part to the float32 array to add to its product, or None. A and
    B are rounded to the dtype of x, their products are float32. A `dropout_key`, which targets may
    share, drops elements of x. If x is a part of the text, int32 [T] `columns` are its columns'
    numbers there: what is dropped of a column then does not depend on the others.
    """
    if lora is None or target not in lora.layers:
        return lambda part: None
    weights, specs = lora.layers[target], TARGETS[target]
    scale = weights["scale"] if "scale" in weights else lora.scale[target]
    if dropout_key is not None and lora.dropout > 0:
        target_key = jax.random.fold_in(dropout_key, list(TARGETS).index(target))
        share = jnp.asarray(weights.get("kept", 1 - lora.dropout))

        B, _, *rest = x.shape

        def draw(column: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(target_key, column), share, (B, *rest))

        if columns is None:
            kept = jax.random.bernoulli(target_key, share, x.shape)
        else:
            kept = jax.vmap(draw, out_axes=1)(columns)
        x = jnp.where(kept, x / share.astype(x.dtype), 0)
    low = einsum(specs.down, x, weights["a"].astype(x.dtype)).astype(x.dtype)
    if "gate" in weights:
        low = (low * weights["gate"][:, None]).astype(x.dtype)
    return lambda part: scale * einsum(specs.up[part], low, weights[part].astype(x.dtype))


def gains(lora: LoRA | None, target: str) -> Callable[[str], jax.Array | None]:
    """Return a function from a part of a target to the factors of its rows, float32 [*rows], or
    None; see `glm2_jax.dora`."""
    weights = {} if lora is None else lora.layers.get(target, {})
    return lambda part: weights.get(f"gain_{part}")


def join_adapters(adapters: Sequence[LoRA]) -> LoRA:
    """Return several adapters of one base as one, of which every row uses its own part.

    A and B are joined along the rank. "gate", float32 [L, adapters + 1, R], has the scale of an
    adapter at its part of the rank and 0 elsewhere; its first row, all 0, is the base model.
    `choose_adapters` replaces it by the rows of a batch.
    """
    layers: dict[str, dict[str, jax.Array]] = {}
    for name, target in TARGETS.items():
        having = [(n, one) for n, one in enumerate(adapters, 1) if name in one.layers]
        if not having:
            continue
        axes = weight_axes(target)
        layers[name] = {
            part: jnp.concatenate(
                [one.layers[name][part] for _, one in having], axis=1 + letters.index("R")
            )
            for part, letters in axes.items()
        }
        gates = []
        for number, one in having:
            a = one.layers[name]["a"]
            gate = jnp.zeros((len(a), len(adapters) + 1, a.shape[1 + axes["a"].index("R")]))
            gates.append(gate.at[:, number].set(one.scale[name]))
        layers[name]["gate"] = jnp.concatenate(gates, axis=2)
    return LoRA(layers, FrozenDict(dict.fromkeys(layers, 1.0)))


def is_joined(params: Mapping[str, Any]) -> bool:
    """Return whether the params have joined adapters inside."""
    lora = params.get("lora")
    return lora is not None and any("gate" in weights for weights in lora.layers.values())


def choose_adapters(lora: LoRA, numbers: jax.Array) -> LoRA:
    """Return joined adapters for rows that use those of these numbers, int32 [B]; 0 = none."""
    layers = {
        name: {**weights, "gate": weights["gate"][:, numbers]}
        for name, weights in lora.layers.items()
    }
    return dataclasses.replace(lora, layers=layers)


def with_lora(params: Mapping[str, Any], lora: LoRA) -> dict[str, Any]:
    """Return the params with an adapter inside, for programs that take only params."""
    return {**params, "lora": lora}


def layer_of(lora: LoRA | None, layer: int) -> LoRA | None:
    """Return one layer of an adapter."""
    return jax.tree.map(lambda x: x[layer], lora)
