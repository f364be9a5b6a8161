"""The message when memory ran out in spite of the plan: needed, free, and what fits instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from convert.loading.folder import open_folder, target_scheme
from glm2_jax.cli.messages import human_size
from glm2_jax.errors import GLMError
from glm2_jax.mesh import mesh_of
from glm2_jax.prefix import prefix_length
from glm2_jax.quant import QTensor
from glm2_jax.runtime.devices import Shortage
from glm2_jax.runtime.dtypes import dtype_name, resolve_dtype
from glm2_jax.runtime.host_memory import find_memory
from glm2_jax.schemes import COLUMN_AXES, SCHEMES, Scheme
from infer.memory.budget import DEFAULT_CONTEXT, Budget, advice, needs, shared
from infer.memory.plan import Plan, nearest
from infer.memory.precision import Precision, precisions
from infer.memory.shares import sizes_of


def when_answering(
    config: Any,
    params: Any,
    device: Any,
    *,
    context: int,
    batch: int,
    chunk: int,
    columns: int = 1,
    kv: str = "auto",
) -> Shortage:
    """Return needed, free and what fits, for a call of an engine; the sizes are as in `Plan`."""
    context, prefix = min(context, config.context_limit), prefix_length(params)
    options = {"batch": batch, "chunk": chunk, "columns": columns, "prefix": prefix, "kv": kv}
    return _shortage(device, mesh_of(params), None, config, _precision(params), context, **options)


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
    kv: str = "auto",
) -> Shortage | None:
    """Return the same for loading a folder, opened with the options `form`; None where not even its
    files can be looked at."""
    try:
        found = open_folder(folder, **form)
        scheme = target_scheme(found, quantize, embeddings)
        target = resolve_dtype(dtype, num_params=found.config.num_params, device=device)
    except (GLMError, MemoryError):
        return None
    precision = Precision(dtype_name(target), None if scheme is None else scheme.name)
    stored = None if found.scheme is None else found.scheme.name
    tokens = min(context or DEFAULT_CONTEXT, found.config.context_limit)
    return _shortage(device, mesh, stored, found.config, precision, tokens, prefix=prefix, kv=kv)


def budget_of(device: Any) -> Budget:
    """Return the budget of a device of jax: what this process may take there in all."""
    if device.platform == "cpu":
        return Budget("this processor", "cpu", find_memory(own=True).usable)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return Budget(device.device_kind, device.platform, limit)


def _shortage(
    device: Any, mesh: Mesh | None, stored: str | None, *plan_of: Any, **options: Any
) -> Shortage:
    budget = budget_of(device)
    budget = budget if mesh is None else shared(budget, len(mesh.local_devices))
    sizes = None if mesh is None else sizes_of(mesh.shape)
    plan = Plan(*plan_of, platform=budget.platform, mesh=sizes, **options)
    # It did not fit, whatever the plan says: suggest something smaller in any case.
    memory = min(plan.total if budget.memory is None else budget.memory, plan.total - 1)
    free = "not known" if budget.memory is None else human_size(budget.memory)
    near = nearest(plan, memory, precisions(budget.half, stored))
    return f"Needed: {needs(plan)}; free: {free}.", advice(near, plan, stored)


def _precision(params: Any) -> Precision:
    """Return how an engine's weights are stored."""
    layers = params["layers"]
    weight = (layers[0] if isinstance(layers, list | tuple) else layers)["q"]
    dtype = dtype_name(params["final_norm"].dtype)
    if not isinstance(weight, QTensor):
        return Precision(dtype)
    grouped = weight.scale.ndim > weight.values.ndim - COLUMN_AXES["q"]
    columns = weight.values.shape[-1] * 8 // weight.bits
    group = columns // weight.scale.shape[-1] if grouped else None
    embed = params["embed"]
    form = weight.bits, group, embed.bits if isinstance(embed, QTensor) else None

    def form_of(scheme: Scheme) -> tuple[int, int | None, int | None]:
        wide = scheme.of("embed").bits if scheme.embeddings else None
        return scheme.bits, scheme.group(columns), wide

    name = next(scheme.name for scheme in SCHEMES.values() if form_of(scheme) == form)
    return Precision(dtype, name)
