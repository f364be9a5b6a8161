"""How weights, adapters, caches and batches lie on a mesh.

Tensor parallel over heads, ffn and vocabulary; the model axis of weights over `fsdp`; batches over
`data` and `fsdp`. Quantized weights and adapters lie as the weights they belong to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm2_jax.cache import AXES as CACHE_AXES
from glm2_jax.cache import KVCache
from glm2_jax.config import GLMConfig
from glm2_jax.errors import UsageError
from glm2_jax.lora import TARGETS, LoRA, weight_axes
from glm2_jax.mesh import AXES as AXES
from glm2_jax.mesh import RULES as RULES
from glm2_jax.mesh import WEIGHT_RULES as WEIGHT_RULES
from glm2_jax.mesh import active_mesh as active_mesh
from glm2_jax.mesh import axis_sizes, mesh_text, partition
from glm2_jax.mesh import constrain as constrain
from glm2_jax.mesh import make_mesh as make_mesh
from glm2_jax.mesh import parse_mesh as parse_mesh
from glm2_jax.quant import QTensor
from glm2_jax.schemes import COLUMN_AXES, Scheme

# The axis letters of every parameter. Norms are small, and whole on every device.
PARAM_AXES = {"embed": "VD", "final_norm": "", "head": "VD"}
LAYER_AXES = {
    "attn_norm": "",
    "q": "NHD",
    "q_bias": "NH",
    "k": "KHD",
    "k_bias": "KH",
    "v": "KHD",
    "v_bias": "KH",
    "o": "DNH",
    "mlp_norm": "",
    "gate_up": "CFD",
    "down": "DF",
}


def check_mesh(
    config: GLMConfig, mesh: Mesh | Mapping[str, int], scheme: Scheme | None = None
) -> None:
    """Refuses a mesh that would leave a device without its part of a weight.

    Args:
        config: the model.
        mesh: or axis -> size.
        scheme: how the weights are quantized.

    Raises:
        UsageError: an axis divides not all of what it cuts; says which numbers would.
    """
    sizes = dict(mesh.shape) if isinstance(mesh, Mesh) else mesh
    packed = 2 if scheme is not None and scheme.bits == 4 else 1  # columns in a byte
    pairs = " / 2 (two columns share a byte)" if packed == 2 else ""
    F, D = config.ffn_hidden_size, config.hidden_size
    N, K, V = config.num_heads, config.num_kv_heads, config.vocab_size
    what = f"{N} heads, {F}{pairs} of the ffn and {V} of the vocabulary"
    cut = math.gcd(N, F // packed, V)
    # Every device has queries of one key/value head, or of several whole ones.
    fits = [n for n in _divisors(cut) if n % K == 0 or K % n == 0]
    if sizes.get("tensor", 1) not in fits:
        heads = f"; {K} key/value heads have to divide it, or it them" if K > 1 else ""
        raise _indivisible("tensor", sizes, what + heads, fits)
    fits = _divisors(D // packed)
    if sizes.get("fsdp", 1) not in fits:
        raise _indivisible("fsdp", sizes, f"the hidden size of {D}{pairs}", fits)


def params_sharding(
    config: GLMConfig, mesh: Mesh, *, scheme: Scheme | None = None, as_list: bool = False
) -> dict[str, Any]:
    """Where the params lie: a tree like theirs, of `NamedSharding`.

    Args:
        config: the model.
        mesh: the devices.
        scheme: how the weights are quantized: those leaves are `QTensor`s of shardings.
        as_list: for a list of layers instead of stacked ones.
    """
    leading = "" if as_list else "L"
    layer = {
        name: _weight(config, mesh, name, leading + axes if axes else "", scheme)
        for name, axes in LAYER_AXES.items()
    }
    layers = [layer] * config.num_layers if as_list else layer
    rest = {name: _weight(config, mesh, name, axes, scheme) for name, axes in PARAM_AXES.items()}
    return {**rest, "layers": layers}


def lora_sharding(lora: LoRA, mesh: Mesh) -> LoRA:
    """Where an adapter lies: the same tree, of `NamedSharding`.

    Args:
        lora: an adapter, its arrays stacked; shapes are enough.
        mesh: the devices.
    """

    def place(target: str) -> dict[str, Any]:
        axes = weight_axes(TARGETS[target])
        return {
            part: NamedSharding(mesh, partition("L" + axes[part], array.shape, mesh.shape))
            for part, array in lora.layers[target].items()
        }

    return dataclasses.replace(lora, layers={target: place(target) for target in lora.layers})


def cache_sharding(config: GLMConfig, mesh: Mesh) -> KVCache:
    """Where a cache lies, of rows that `data` times `fsdp` divides: a `KVCache` of shardings."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    sizes = {**axis_sizes(config), "B": rows, "S": 1}
    places: dict[str, Any] = {n: _named(mesh, axes, sizes) for n, axes in CACHE_AXES.items()}
    return KVCache(**places)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Where arrays lie whose first axis is the batch."""
    return _named(mesh, "B", {"B": mesh.size})


def replicated(mesh: Mesh) -> NamedSharding:
    """Where arrays lie that every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def _named(mesh: Mesh, letters: Sequence[str], sizes: Mapping[str, int]) -> NamedSharding:
    shape = [sizes[letter] for letter in letters]
    return NamedSharding(mesh, partition(letters, shape, mesh.shape))


def _weight(config: GLMConfig, mesh: Mesh, name: str, letters: str, scheme: Scheme | None) -> Any:
    """The sharding of a parameter, or a QTensor of two."""
    sizes = axis_sizes(config)
    if scheme is None or not scheme.covers(name):
        return _named(mesh, letters, sizes)
    columns = COLUMN_AXES.get(name, 1)
    values, scale = scheme.shapes(tuple(sizes[letter] for letter in letters), columns)
    # Groups of columns are cut like the first axis of columns, where no group lies on two devices.
    scale_letters = letters[: len(letters) - columns + 1][: len(scale)]
    places = [
        NamedSharding(mesh, partition(axes, shape, mesh.shape))
        for axes, shape in ((letters, values), (scale_letters, scale))
    ]
    return QTensor(cast(Any, places[0]), cast(Any, places[1]), scheme.bits)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _indivisible(axis: str, mesh: Mapping[str, int], what: str, fits: list[int]) -> UsageError:
    return UsageError(
        f"The mesh {mesh_text(mesh)} does not fit the model.",
        f"{axis} has to divide {what}.",
        f"Use {axis}={', '.join(map(str, fits[:12]))}{' ...' if len(fits) > 12 else ''}.",
    )
