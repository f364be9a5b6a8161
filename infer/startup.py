"""Opens an engine from the flags of the tools that answer, and reports which model on what.

What imports jax is imported inside the functions: tools import this module for other things, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.hub.find import find_model
from glm2_jax.cli.messages import Progress, human_size, note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.errors import UsageError

if TYPE_CHECKING:
    from infer.engine.engine import Engine


def note_demo_model(choice: ModelChoice) -> None:
    """Say that the demo model will answer, where no other was named: before anything else."""
    if choice.path is None:
        note("no --model given: using the bundled demo model, a few million parameters")


def find_choice(choice: ModelChoice) -> ModelChoice:
    """Return the choice with the model's folder as its path, downloaded if the flags say so.

    Without a path, which means the demo model, it stays as it is.
    """
    if choice.path is not None:
        path = str(find_model(choice.path, source=choice.source, revision=choice.revision))
        return dataclasses.replace(choice, path=path, source=None, revision=None)
    if choice.source is not None or choice.revision is not None:
        raise UsageError(
            "--source and --revision need --model.", fix="Name the model: --model OWNER/NAME."
        )
    return choice


def open_engine(
    choice: ModelChoice,
    options: EngineOptions,
    *,
    rows: int = 1,
    contents: Mapping[str, Any] | None = None,
) -> Engine:
    """Load a model for `rows` prompts at once, and report on stderr how it computes.

    `contents` is what several processes must agree on, besides flags and model, as
    `glm2_jax.processes.join.compare` takes it.
    """
    from glm2_jax.mesh import mesh_text
    from glm2_jax.processes import join
    from glm2_jax.runtime.compile_cache import enable_compile_cache
    from glm2_jax.runtime.devices import find_mesh
    from infer.engine.load import demo_folder, open_choice
    from infer.memory.budget import prepare

    enable_compile_cache(options.compile_cache, warn=note)
    choice = find_choice(choice)
    folder = choice.path or demo_folder()
    processes = join.number_of_processes()
    choice, options = prepare(choice, options, folder, rows=rows, processes=processes)
    mesh = find_mesh(choice.mesh, choice.device)
    if join.are_several():
        join.compare(_contents(choice, options, folder) | dict(contents or {}))
    with Progress("loading", show=human_size) as bar:
        engine = open_choice(
            choice,
            options,
            folder=Path(folder),
            mesh=mesh,
            device=choice.device if mesh is None else None,
            on_event=lambda kind, text: note(text),
            progress=bar.update,
            rows=rows,
            note=note,
        )
    summary = engine.checkpoint.summary
    weights = f", weights in {summary.quantization}" if summary.quantization else ""
    spread = f", on {mesh.size} devices ({mesh_text(dict(mesh.shape))})" if mesh is not None else ""
    note(f"computing in {summary.dtype}{weights}{spread}")
    for line in engine.checkpoint.notes:
        note(line)
    return engine


def _contents(choice: ModelChoice, options: EngineOptions, folder: str | Path) -> dict[str, Any]:
    """Return what all processes of a run must have opened alike."""
    from convert.adapters.adapter import open_adapter
    from convert.adapters.prefix import load_prefix
    from convert.loading.folder import fingerprint, open_folder

    opened = open_folder(folder, **choice.form)
    found = {"--dtype": choice.dtype, "--max-length": options.max_length, "--kv": options.kv}
    found |= {"checkpoint": fingerprint(opened), "adapter": "", "prefix": ""}
    if choice.adapter is not None:
        form = {"family": choice.family, "force": choice.force_adapter}
        found["adapter"] = open_adapter(choice.adapter, opened, **form).digest
    if choice.prefix is not None:
        found["prefix"] = load_prefix(choice.prefix, opened.config).digest
    return found
