"""How weights, adapters, caches and batches are sharded over a mesh.

Tensor parallel over heads, ffn and vocabulary; the model axis of weights over `fsdp`; batches over
`data` and `fsdp`. Quantized weights and adapters are cut like the weights they belong to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm2_jax.blanks import Blanks
from glm2_jax.cache import AXES as CACHE_AXES
from glm2_jax.cache import KVCache
from glm2_jax.config import GLMConfig
from glm2_jax.errors import UsageError
from glm2_jax.lora import TARGETS, LoRA, weight_axes
from glm2_jax.mesh import axis_sizes, mesh_text, partition
from glm2_jax.parts import parts_of
from glm2_jax.quant import QTensor
from glm2_jax.schemes import COLUMN_AXES, Scheme


def check_mesh(
    config: GLMConfig, mesh: Mesh | Mapping[str, int], scheme: Scheme | None = None
) -> None:
    """Refuse a mesh whose axes do not divide the weights of a model, quantized by `scheme`.

    Raises:
        UsageError: an axis does not divide all that it cuts; the message lists sizes that do.
    """
    sizes = dict(mesh.shape) if isinstance(mesh, Mesh) else mesh
    packed = 2 if scheme is not None and scheme.bits == 4 else 1  # columns in a byte
    pairs = " / 2 (two columns share a byte)" if packed == 2 else ""
    F, D = config.ffn_hidden_size, config.hidden_size
    N, K, V = config.num_heads, config.num_kv_heads, config.vocab_size
    what = f"{N} heads, an ffn of {F}{pairs} and a vocabulary of {V}"
    if K > 1:
        what += f", and be a multiple or a divisor of the {K} key/value heads"
    # Every device has queries of one key/value head, or of several complete ones.
    tensor = [n for n in _divisors(math.gcd(N, F // packed, V)) if n % K == 0 or K % n == 0]
    fsdp = _divisors(D // packed)
    for axis, cut, fits in (
        ("tensor", what, tensor),
        ("fsdp", f"the hidden size of {D}{pairs}", fsdp),
    ):
        if sizes.get(axis, 1) not in fits:
            raise UsageError(
                f"The mesh {mesh_text(sizes)} does not fit the model.",
                f"{axis} must divide {cut}.",
                f"Use {axis}={', '.join(map(str, fits[:12]))}{' ...' if len(fits) > 12 else ''}.",
            )


def params_sharding(
    config: GLMConfig, mesh: Mesh, *, scheme: Scheme | None = None, as_list: bool = False
) -> dict[str, Any]:
    """Return the params' tree of `NamedSharding`, for stacked layers or a list of them.

    With a quantization `scheme`, such leaves are `QTensor`s of shardings.
    """
    rest: dict[str, Any] = {}
    layer: dict[str, Any] = {}
    for part in parts_of(config):
        # Vectors of the hidden size are small, and replicated: norms, and biases of the outputs.
        letters = "" if part.axes == "D" else part.axes
        stacked = "L" if letters and part.in_layers and not as_list else ""
        places = layer if part.in_layers else rest
        places[part.name] = _weight(config, mesh, part.name, stacked + letters, scheme)
    return {**rest, "layers": [layer] * config.num_layers if as_list else layer}


def lora_sharding(lora: LoRA, mesh: Mesh) -> LoRA:
    """Return how an adapter (arrays or shapes) is sharded: the same tree, of `NamedSharding`."""
    places: dict[str, Any] = {}
    for target, weights in lora.layers.items():
        axes = weight_axes(TARGETS[target])
        rows = {part: letters.replace("R", "") for part, letters in axes.items()}
        axes |= {kind + part: x for part, x in rows.items() for kind in ("magnitude_", "gain_")}
        places[target] = {
            part: NamedSharding(
                mesh, partition("L" + axes.get(part, ".."), array.shape, mesh.shape)
            )
            for part, array in weights.items()
        }
    return dataclasses.replace(lora, layers=places)


def cache_sharding(config: GLMConfig, mesh: Mesh) -> KVCache:
    """Return how a cache is sharded whose rows `data` times `fsdp` divides: a `KVCache` of them."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    sizes = {**axis_sizes(config), "B": rows, "S": 1}
    places: dict[str, Any] = {n: _named(mesh, axes, sizes) for n, axes in CACHE_AXES.items()}
    if config.block.bidirectional:
        place: Any = _named(mesh, "B", sizes)
        places["blanks"] = Blanks(place, place, place)
    return KVCache(**places)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose first axis is the batch."""
    return _named(mesh, "B", {"B": mesh.size})


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays of which every device has a copy."""
    return NamedSharding(mesh, PartitionSpec())


def _named(mesh: Mesh, letters: Sequence[str], sizes: Mapping[str, int]) -> NamedSharding:
    shape = [sizes[letter] for letter in letters]
    return NamedSharding(mesh, partition(letters, shape, mesh.shape))


def _weight(config: GLMConfig, mesh: Mesh, name: str, letters: str, scheme: Scheme | None) -> Any:
    """Return the sharding of a parameter, or a QTensor of two."""
    sizes = axis_sizes(config)
    if scheme is None or not scheme.covers(name):
        return _named(mesh, letters, sizes)
    columns, scheme = COLUMN_AXES.get(name, 1), scheme.of(name)
    values, scale = scheme.shapes(tuple(sizes[letter] for letter in letters), columns)
    # Groups are cut like the first axis of columns, if no group is on two devices.
    scale_letters = letters[: len(letters) - columns + 1][: len(scale)]
    places = [
        NamedSharding(mesh, partition(axes, shape, mesh.shape))
        for axes, shape in ((letters, values), (scale_letters, scale))
    ]
    return QTensor(cast(Any, places[0]), cast(Any, places[1]), scheme.bits)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
