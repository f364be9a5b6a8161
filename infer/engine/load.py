"""Opening a checkpoint for answering."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from convert import Checkpoint, load_checkpoint, open_folder
from convert.adapters.adapter import Adapter, attach, open_adapter
from convert.adapters.prefix import FoundPrefix, attach_prefix, load_prefix
from convert.hub.find import find_model
from convert.loading.folder import Folder
from glm2_jax.cli.bundled import HOME, MODELS
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.errors import UsageError
from glm2_jax.forms import Forms
from glm2_jax.runtime.compile_cache import enable_unless_set
from glm2_jax.runtime.devices import device_errors, faster_layers, find_device, find_mesh
from infer.engine.engine import Engine
from infer.engine.programs import OnEvent
from infer.memory.shortage import when_loading
from infer.tuning.automatic import find_forms


def demo_folder() -> Path:
    """Return the folder of the bundled demo model, in the project's own format."""
    return HOME / MODELS["demo"]


def load(
    path: str | os.PathLike | None = None,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    quantize_embeddings: bool = False,
    layers: str | None = None,
    mesh: str | Mapping[str, int] | Mesh | None = None,
    max_length: int | None = None,
    prefill_chunk: int | None = None,
    speculate: int = 0,
    kv: str = "auto",
    tuned: str = "auto",
    device: Any = None,
    rope_kind: str | None = None,
    template: str | None = None,
    family: str | None = None,
    adapter: str | os.PathLike | None = None,
    force_adapter: bool = False,
    prefix: str | os.PathLike | None = None,
    source: str | None = None,
    revision: str | None = None,
    compile_cache: str | os.PathLike | None = None,
    on_event: OnEvent | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Engine:
    """Open a checkpoint and return an engine that answers with it.

    Args:
        path: a folder that `convert.load_checkpoint` knows, or a hub's "owner/name"; None = demo.
        dtype, quantize, quantize_embeddings, rope_kind, template, family: as in `load_checkpoint`.
        layers: "stacked" or "list"; None = what is faster on the device.
        mesh: over all devices of all processes: "data=2,tensor=4", axis -> size, a `Mesh`; or None.
        max_length, prefill_chunk: of prompt and answer (None = 8192, or what the model has), of all
            prompts in one prefill (None = 2048); in tokens.
        speculate, kv: draft tokens per step, form of the cache; see `Engine`.
        tuned: forms of products: "auto" = as a command measured, "off", or a file of `infer.tune`.
        device: "auto" (or None), "cpu", "gpu", "tpu", or a `jax.Device`.
        adapter, force_adapter: folder of a LoRA adapter; accept one of another base or template.
        prefix: folder of a P-Tuning v2 prefix, from the official training.
        source, revision: hub of "owner/name" ("hf", "modelscope"; None = no network), revision.
        compile_cache: folder of this process's programs, or "off"; None = as JAX is set, else ours.
        on_event, progress: called with a kind ("compile", "warning") and a line of text; with the
            bytes of parameters loaded and to load.

    Raises UsageError if an argument makes no sense, CheckpointError if the folder cannot be opened,
    DeviceError if the device is not there, or its memory is too small.
    """
    choice = ModelChoice(
        dtype=dtype, quantize=quantize, quantize_embeddings=quantize_embeddings, layers=layers,
        rope_kind=rope_kind, template=template, family=family,
        adapter=None if adapter is None else os.fspath(adapter), force_adapter=force_adapter,
        prefix=None if prefix is None else os.fspath(prefix),
    )  # fmt: skip
    over = None if mesh is None else find_mesh(mesh, device)
    where = {"mesh": over, "device": find_device(device) if mesh is None else None}
    folder = _find(path, source, revision)  # last: it may have to be downloaded
    options = EngineOptions(max_length, prefill_chunk, speculate, kv=kv, tuned=tuned)
    enable_unless_set(compile_cache, warn=lambda line: on_event and on_event("warning", line))
    return open_choice(choice, options, folder, **where, on_event=on_event, progress=progress)


def open_choice(
    choice: ModelChoice,
    options: EngineOptions,
    folder: Path,
    *,
    mesh: Mesh | None,
    device: Any,
    on_event: OnEvent | None,
    progress: Callable[[int, int], None],
    rows: int = 1,
    note: Callable[[str], None] | None = None,
) -> Engine:
    """Open a folder as `choice` says, but for mesh and device, to answer `rows` at once.

    With `note`, forms that this device has not measured yet are measured, see
    `infer.tuning.automatic.find_forms`.
    """
    device = find_device(device) if mesh is None else mesh.local_devices[0]
    base, forms = open_folder(folder, **choice.form), Forms()
    if mesh is None:
        choice, forms = find_forms(base, choice, options, device, rows, note)
    sizes: Any = {"on_mesh": mesh is not None, "rows": rows, "slots": options.max_length or 0}
    start = time.perf_counter()
    adapter, prefix = _find_additions(choice, base)
    explain = partial(
        when_loading,
        folder,
        device,
        dtype=choice.dtype,
        quantize=choice.quantize,
        embeddings=choice.quantize_embeddings,
        context=options.max_length,
        form=choice.form,
        prefix=prefix.length if prefix else 0,
        mesh=mesh,
        kv=options.kv,
    )
    with device_errors(f"loading {folder}", explain):
        checkpoint = load_checkpoint(
            folder,
            dtype=choice.dtype,
            quantize=choice.quantize,
            quantize_embeddings=choice.quantize_embeddings,
            layers=choice.layers or faster_layers(device.platform, **sizes),
            mesh=mesh,
            **choice.form,
            device=device if mesh is None else None,
            progress=progress,
        )
        checkpoint = _complete(checkpoint, forms, adapter, prefix)
        jax.block_until_ready(checkpoint.params)
    return Engine(
        checkpoint,
        max_length=options.max_length,
        prefill_chunk=options.prefill_chunk,
        speculate=options.speculate,
        kv=options.kv,
        load_s=time.perf_counter() - start,
        on_event=on_event,
    )


def _find_additions(choice: ModelChoice, base: Folder) -> tuple[Adapter | None, FoundPrefix | None]:
    """Open the adapter and the prefix that the choice names."""
    adapter = prefix = None
    if choice.adapter:
        named = {"family": choice.family, "force": choice.force_adapter}
        adapter = open_adapter(choice.adapter, base, **named)
    if choice.prefix:
        prefix = load_prefix(choice.prefix, base.config)
    return adapter, prefix


def _complete(
    checkpoint: Checkpoint, forms: Forms, adapter: Adapter | None, prefix: FoundPrefix | None
) -> Checkpoint:
    config = dataclasses.replace(checkpoint.config, forms=forms)
    checkpoint = dataclasses.replace(checkpoint, config=config)
    checkpoint = checkpoint if adapter is None else attach(checkpoint, adapter)
    return checkpoint if prefix is None else attach_prefix(checkpoint, prefix)


def add_adapters(engine: Engine, choice: ModelChoice, adapters: Sequence[str]) -> None:
    """Add adapters, folders, of which each row of a batch uses one or none; before any call.

    CheckpointError, UsageError: as `load`.
    """
    base = open_folder(choice.path or demo_folder(), **choice.form)
    form = {"family": choice.family, "force": choice.force_adapter}
    found = [open_adapter(folder, base, **form) for folder in adapters]
    engine.checkpoint = attach(engine.checkpoint, *found, joined=True)


def _find(path: Any, source: str | None, revision: str | None) -> Path:
    if path is None:
        return demo_folder()
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise UsageError(f"the path of a checkpoint must be text or a Path, got {path!r}")
    return find_model(path, source=source, revision=revision)
