"""Flags that several of the convert tools share, what they stand for, and what is said of both."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.hub.find import find_model
from glm2_jax.choices import DTYPE_NAMES, ROPE_KINDS, TEMPLATES
from glm2_jax.cli.arguments import path_argument, size_argument
from glm2_jax.cli.flags import add_family, add_hub_flags
from glm2_jax.cli.main import print_path
from glm2_jax.cli.messages import note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.escape import json_line

if TYPE_CHECKING:
    from convert.adapters.adapter import Adapter
    from convert.loading.folder import Folder


def add_places(
    parser: argparse.ArgumentParser,
    source: str = "the folder to read, or OWNER/NAME",
    destination: str = "the one to write",
) -> None:
    """SRC and DST, and their help."""
    parser.add_argument("source", metavar="SRC", type=path_argument, help=source)
    parser.add_argument("destination", metavar="DST", type=path_argument, help=destination)


def add_dtype(group: argparse._ActionsContainer) -> None:
    """`--dtype` of weights that are stored."""
    group.add_argument(
        "--dtype", choices=("keep", *DTYPE_NAMES), default="keep", metavar="TYPE",
        help="type to store: keep, float32, bfloat16 or float16",
    )  # fmt: skip


def add_shard_size(group: argparse._ActionsContainer, default: str = "4GB") -> None:
    """`--max-shard-size`, in bytes."""
    group.add_argument(
        "--max-shard-size", type=size_argument, default=default, metavar="SIZE",
        help="largest size of one weight file",
    )  # fmt: skip


def add_force_adapter(group: argparse._ActionsContainer) -> None:
    """`--force-adapter`."""
    group.add_argument(
        "--force-adapter", action="store_true",
        help="take the adapter though it was trained on another base model or prompt template",
    )  # fmt: skip


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of tools that may merge an adapter; `open_merged` opens it."""
    group = parser.add_argument_group("adapter")
    group.add_argument(
        "--adapter", type=path_argument, metavar="DIR",
        help="merge a LoRA adapter into the weights, in float32",
    )  # fmt: skip
    add_force_adapter(group)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags for what a folder does not tell about itself."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--rope-scaling", choices=ROPE_KINDS,
        help="meaning of rope_ratio where the folder does not tell it: linear divides positions "
        "(chatglm2-6b-32k), base multiplies the rotary base (chatglm3-6b-32k, -128k)",
    )  # fmt: skip
    model.add_argument(
        "--template", choices=TEMPLATES, help="prompt template instead of the family's own"
    )
    add_family(model)
    add_hub_flags(parser.add_argument_group("hub"))


def add_overwrite(group: argparse._ActionsContainer) -> None:
    """`--overwrite`."""
    group.add_argument(
        "--overwrite", action="store_true",
        help="replace DST if it is a folder of this format; the old one goes at the very end",
    )  # fmt: skip


def add_dry_run(group: argparse._ActionsContainer, checked: str = "the source") -> None:
    """`--dry-run`, which ends with `print_plan`."""
    group.add_argument(
        "--dry-run", action="store_true", help=f"check {checked} and say what would be written"
    )


def find_folder(choice: ModelChoice, name: str) -> Path:
    """Return the folder of a model that is named by its path or on a hub, as `find_model`."""
    return find_model(name, source=choice.source, revision=choice.revision)


def open_merged(choice: ModelChoice, base: Path) -> Adapter | None:
    """Return the adapter that is to be merged into a base; None without `--adapter`."""
    from convert.adapters.attach import open_adapter

    if not choice.adapter:
        return None
    return open_adapter(choice.adapter, base, force=choice.force_adapter, **choice.form)


def tell_model(name: str, folder: Folder, stored: str, more: str = "") -> None:
    """A line of what was opened.

    Args:
        name: as the user gave it.
        stored: the form of its weights.
        more: the end of the line.
    """
    note(
        f"{name}: {folder.layout}, {folder.config.family}, {folder.config.num_params:,} "
        f"parameters in {stored}{more}"
    )
    for line in folder.notes:
        note(line)


def tell_written(size: str, destination: str, form: str, adapter: Adapter | None = None) -> None:
    """A line of what was written, and DST on standard output."""
    merged = f", {', '.join(adapter.targets)} adapted" if adapter else ""
    note(f"wrote {size} in {form}{merged}")
    print_path(destination)


def print_plan(destination: str, size: int, **more: Any) -> None:
    """What a dry run says on standard output: DST and its bytes."""
    plan = {"destination": destination, "bytes": size, **more, "written": False}
    print(json_line(plan))
