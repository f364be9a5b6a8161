"""The flags and messages that several of the convert tools share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.hub.find import find_model
from glm2_jax.choices import DTYPE_NAMES
from glm2_jax.cli.arguments import path_argument, size_argument
from glm2_jax.cli.main import print_path
from glm2_jax.cli.messages import Progress, human_size, note
from glm2_jax.cli.model_choice import FORM, HUB, ModelChoice
from glm2_jax.cli.parser import Parser, add_flags
from glm2_jax.escape import json_line

if TYPE_CHECKING:
    from convert.adapters.adapter import Adapter
    from convert.loading.folder import Folder


def add_places(
    parser: argparse.ArgumentParser,
    source: str = "the folder to read, OWNER/NAME, or demo",
    destination: str = "the folder to write",
) -> None:
    """Add SRC and DST."""
    parser.add_argument("source", metavar="SRC", type=path_argument, help=source)
    parser.add_argument("destination", metavar="DST", type=path_argument, help=destination)


def add_dtype(group: argparse._ActionsContainer) -> None:
    """Add `--dtype`, the type to store, and `--max-shard-size`."""
    group.add_argument(
        "--dtype", choices=("keep", *DTYPE_NAMES), default="keep", metavar="TYPE",
        help="type to store: keep, float32, bfloat16 or float16",
    )  # fmt: skip
    add_shard_size(group)


def add_shard_size(group: argparse._ActionsContainer, default: str = "4GB") -> None:
    """Add `--max-shard-size`, in bytes."""
    group.add_argument(
        "--max-shard-size", type=size_argument, default=default, metavar="SIZE",
        help="largest size of one weight file",
    )  # fmt: skip


def add_adapter_flags(parser: argparse.ArgumentParser, *, named: bool = False) -> None:
    """Add `--force-adapter` and, unless an argument names the adapter, `--adapter`."""
    fields = ("force_adapter",) if named else ("adapter", "force_adapter")
    merged = {"help": "merge a LoRA adapter into the weights, in float32", "short": ()}
    add_flags(parser, "adapter", ModelChoice, fields, adapter=merged)


def add_last(
    parser: Parser, checked: str | None = "the source", *, overwrite: bool = False
) -> argparse._ArgumentGroup:
    """Add the flags that come last, for what a folder may not say about itself, for hubs and, if
    something is `checked` before it is written, of writing; return that group."""
    add_flags(parser, "model", ModelChoice, FORM)
    add_flags(parser, "hub", ModelChoice, HUB)
    group = parser.add_argument_group("writing")
    if overwrite:
        group.add_argument(
            "--overwrite", action="store_true",
            help="replace DST if it is a folder of this format; the old one is removed last",
        )  # fmt: skip
    if checked:
        group.add_argument(
            "--dry-run", action="store_true",
            help=f"check {checked} and print what would be written",
        )  # fmt: skip
    parser.add_common()
    return group


def open_source(choice: ModelChoice, name: str) -> tuple[Folder, Adapter | None]:
    """Return the folder of a model, named by its path or on a hub, and its adapter, if any."""
    from convert.adapters.adapter import open_adapter
    from convert.loading.folder import open_folder

    path = find_model(name, source=choice.source, revision=choice.revision)
    folder, force = open_folder(path, **choice.form), choice.force_adapter
    if not choice.adapter:
        return folder, None
    return folder, open_adapter(choice.adapter, folder, family=choice.family, force=force)


def print_model(
    name: str,
    folder: Folder,
    adapter: Adapter | None,
    written: str,
    *warnings: str,
    packed: bool = False,
) -> None:
    """Print what was opened, and what the output does not keep of it: `warnings`, and how its
    weights are `written`, as `stored_as` says it; `packed`: they stay quantized."""
    from glm2_jax.schemes import stored_as

    stored = stored_as(folder.float_dtype, folder.scheme)
    merged = f"; {', '.join(adapter.targets)} adapted" if adapter else ""
    note(
        f"{name}: {folder.layout}, {folder.config.family}, {folder.config.num_params:,} "
        f"parameters in {stored}{merged}"
    )
    how = "written as" if packed or folder.scheme is None else "dequantized and written as"
    changed = [] if written == stored else [f"the weights are stored in {stored}; {how} {written}"]
    for line in (*folder.notes, *changed, *warnings, *(adapter.notes if adapter else ())):
        note(line)


def write(
    action: Callable[..., Any],
    destination: str,
    size: int,
    form: str,
    *,
    dry_run: bool,
    overwrite: bool | None = None,
    source: Path | None = None,
    file: bool = False,
    **more: Any,
) -> None:
    """Check DST (see `check_destination`), call `action(progress=...)` and print what it wrote.

    A dry run writes nothing: DST and its bytes are printed on standard output, with `more`.
    """
    from convert.writing.destination import check_destination

    check_destination(destination, overwrite, source=source, needed=size, file=file)
    if dry_run:
        note(f"would write {human_size(size)} in {form}")
        print(json_line({"destination": destination, "bytes": size, **more, "written": False}))
        return
    with Progress("writing", show=human_size) as bar:
        action(progress=bar.update)
    print_written(destination, size, form)


def print_written(destination: str, size: int, form: str) -> None:
    """Print a line about what was written, and DST on standard output."""
    note(f"wrote {human_size(size)} in {form}")
    print_path(destination)


def verify(folder: str) -> None:
    """Compare a folder with its manifest's checksums, and print a line."""
    from convert.files.manifest import verify_checkpoint

    with Progress("verifying", show=human_size) as bar:
        manifest = verify_checkpoint(folder, bar.update)
    note(f"verified: the checksums of {len(manifest.files)} files match the manifest")
