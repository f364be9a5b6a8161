"""From the flags of the answering tools to an engine: which model, on what, and what is said of it.

Everything of the project but `glm2_jax.cli.main` is imported inside the functions: tools import
this module before their flags are parsed, and `--help` must not wait for jax.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.hub.find import find_model
from glm2_jax.cli.flags import model_options
from glm2_jax.cli.messages import Progress, human_size, note

if TYPE_CHECKING:
    from infer.engine.engine import Engine


def say_which_model(args: argparse.Namespace) -> None:
    """Says that the demo model will answer, where no other was named: before anything else."""
    if args.model is None:
        note("no --model given: using the bundled demo model, a few million parameters")


def model_folder(args: argparse.Namespace) -> str | None:
    """The folder of the model that the flags name, fetched if they say so; None = the demo."""
    from glm2_jax.errors import UsageError

    if args.model is not None:
        return str(find_model(args.model, source=args.hub_source, revision=args.revision))
    if args.hub_source is not None or args.revision is not None:
        raise UsageError(
            "--source and --revision need --model.", fix="Name the model: --model OWNER/NAME."
        )
    return None


def open_engine(args: argparse.Namespace, **contents: Any) -> Engine:
    """Loads the model that the flags name and says on stderr how it computes.

    Args:
      contents: what several processes have to agree on beside flags and model, see
        `glm2_jax.processes.join.compare`.
    """
    import infer
    from glm2_jax.runtime.compile_cache import enable_compile_cache
    from glm2_jax.runtime.devices import find_mesh
    from infer.engine.load import demo_folder
    from infer.memory.budget import prepare

    enable_compile_cache(args.compile_cache, warn=note)
    folder = model_folder(args)
    prepare(args, folder or demo_folder(), _batch(args))
    mesh = find_mesh(args)
    _compare_processes(args, folder or demo_folder(), contents)
    with Progress("loading", 0, show=human_size) as bar:

        def show_progress(done: int, total: int) -> None:
            bar.total = total
            bar(done)

        engine = infer.load(
            folder,
            dtype=args.dtype,
            quantize=args.quantize,
            quantize_embeddings=args.quantize_embeddings,
            layers=args.layers,
            mesh=mesh,
            device=args.device if mesh is None else None,
            max_length=args.max_length,
            prefill_chunk=args.prefill_chunk,
            speculate=getattr(args, "speculate", 0),
            **model_options(args),
            adapter=getattr(args, "adapter", None),
            force_adapter=getattr(args, "force_adapter", False),
            prefix=getattr(args, "prefix", None),
            on_event=_show_event,
            progress=show_progress,
        )
    summary = engine.checkpoint.summary
    weights = f", weights in {summary.quantization}" if summary.quantization else ""
    note(f"computing in {summary.dtype}{weights}{_spread(engine)}")
    for line in engine.checkpoint.notes:
        note(line)
    return engine


def _spread(engine: Engine) -> str:
    if engine.mesh is None:
        return ""
    from glm2_jax.mesh import mesh_text

    sizes = dict(engine.mesh.shape)
    return f", on {engine.mesh.size} devices ({mesh_text(sizes)})"


def _compare_processes(
    args: argparse.Namespace, folder: str | Path, contents: Mapping[str, Any]
) -> None:
    """Where this is one of several processes: that all of them answer the same with the same.

    Raises:
      UsageError, InputError: they do not. CheckpointError: the model cannot be opened.
    """
    from glm2_jax.processes import join

    if getattr(args, "coordinator", None) is None:
        return
    from convert.adapters.attach import open_adapter
    from convert.adapters.prefix import open_prefix
    from convert.loading.folder import fingerprint, open_folder

    form = model_options(args)
    sums = {"checkpoint": fingerprint(open_folder(folder, **form)), "adapter": "", "prefix": ""}
    if args.adapter is not None:
        force = args.force_adapter
        sums["adapter"] = open_adapter(args.adapter, folder, **form, force=force).digest
    if args.prefix is not None:
        sums["prefix"] = open_prefix(args.prefix, folder, **form).digest
    command = "/".join(Path(sys.argv[0]).parts[-2:])  # hosts may have it in other places
    join.compare(args, command, **sums, **contents)


def _batch(args: argparse.Namespace) -> int:
    """How many prompts the tool answers together."""
    return args.batch_size if getattr(args, "batch_file", None) is not None else 1


def _show_event(kind: str, text: str) -> None:
    note(text)
