"""What to say when memory ran out: needed, free, and the nearest that fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from convert.loading.folder import open_folder, target_scheme
from glm2_jax.errors import GLMError
from glm2_jax.mesh import mesh_of
from glm2_jax.prefix import prefix_length
from glm2_jax.quant import QTensor
from glm2_jax.runtime.devices import Shortage
from glm2_jax.runtime.dtypes import dtype_name, resolve_dtype
from glm2_jax.runtime.host_memory import find_memory
from glm2_jax.schemes import COLUMN_AXES, SCHEMES
from infer.memory.budget import DEFAULT_CONTEXT, Budget, Wish, shared, shortage
from infer.memory.precision import Precision
from infer.memory.shares import Sizes, sizes_of


def when_answering(
    config: Any,
    params: Any,
    device: Any,
    *,
    context: int,
    batch: int,
    chunk: int,
    columns: int = 1,
) -> Shortage:
    """Needed, free and what fits, for a call of an engine.

    Args:
      context: tokens of the longest prompt and answer. batch: prompts at once.
      columns: tokens of each row that a step reads.
    """
    precision = _precision(params)
    context = min(context, config.seq_length)
    sizes: dict[str, Any] = {"chunk": chunk, "columns": columns, "prefix": prefix_length(params)}
    mesh = mesh_of(params)
    wish = Wish(config, (precision,), context, batch, **sizes, mesh=_sizes(mesh))
    return shortage(_budget(device, mesh), wish, precision)


def when_loading(
    folder: Path,
    device: Any,
    *,
    dtype: str,
    quantize: str | None,
    embeddings: bool,
    context: int | None,
    form: Mapping[str, Any],
    prefix: int = 0,
    mesh: Mesh | None = None,
) -> Shortage | None:
    """The same for opening a folder; None where it cannot even be looked at, for want of memory.

    Args:
      form: the options of `open_folder`.
    """
    try:
        found = open_folder(folder, **form)
        scheme = target_scheme(found, quantize, embeddings)
        target = resolve_dtype(dtype, num_params=found.config.num_params, device=device)
    except (GLMError, MemoryError):
        return None
    precision = Precision(dtype_name(target), None if scheme is None else scheme.name)
    stored = None if found.scheme is None else found.scheme.name
    tokens = min(context or DEFAULT_CONTEXT, found.config.seq_length)
    wish = Wish(found.config, (precision,), tokens, stored=stored, prefix=prefix, mesh=_sizes(mesh))
    return shortage(_budget(device, mesh), wish, precision)


def _sizes(mesh: Mesh | None) -> Sizes | None:
    return None if mesh is None else sizes_of(mesh.shape)


def _budget(device: Any, mesh: Mesh | None) -> Budget:
    """The budget of a `jax.Device`: what jax may take there in all."""
    if device.platform == "cpu":
        found = Budget("this processor", "cpu", find_memory(own=True).usable)
        return found if mesh is None else shared(found, len(mesh.local_devices))
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return Budget(device.device_kind, device.platform, limit)


def _precision(params: Any) -> Precision:
    """How an engine's weights are kept."""
    layers = params["layers"]
    stacked = not isinstance(layers, list | tuple)
    weight = (layers if stacked else layers[0])["q"]
    dtype = dtype_name(params["final_norm"].dtype)
    if not isinstance(weight, QTensor):
        return Precision(dtype)
    rows = weight.values.ndim - COLUMN_AXES["q"]
    grouped = weight.scale.ndim > rows
    schemes = SCHEMES.values()
    form = weight.bits, grouped, isinstance(params["embed"], QTensor)
    name = next(s.name for s in schemes if (s.bits, s.grouped, s.embeddings) == form)
    return Precision(dtype, name)
