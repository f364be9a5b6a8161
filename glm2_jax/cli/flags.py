"""Flags that several commands share."""

import argparse

from glm2_jax.choices import FAMILIES, ROPE_KINDS, SOURCES, TEMPLATES
from glm2_jax.cli.arguments import path_argument, positive
from glm2_jax.cli.parser import Parser


def add_model_options(parser: Parser) -> None:
    """Add the flags that name a model and say how its checkpoint is read."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", "-m", type=path_argument, metavar="DIR|NAME",
        help="checkpoint folder, published or converted, or OWNER/NAME on a hub (default: the "
        "bundled demo model)",
    )  # fmt: skip
    add_hub_flags(group)
    add_form_flags(group)


def add_mesh_options(group: argparse._ArgumentGroup) -> None:
    """Add the flags of a mesh; `glm2_jax.runtime.devices.find_mesh` reads their value."""
    mesh = group.add_mutually_exclusive_group()
    mesh.add_argument(
        "--mesh", metavar="AXES",
        help="mesh axes over all devices, for example data=2,tensor=4: data shards the rows, fsdp "
        "the rows and the weights, tensor the heads, ffn and vocabulary; the product of the sizes "
        "is the number of devices (default: one device)",
    )  # fmt: skip
    mesh.add_argument(
        "--tp", type=lambda text: f"tensor={positive(text)}", dest="mesh", metavar="N",
        help="short for --mesh tensor=N",
    )  # fmt: skip


def add_form_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags for what a checkpoint may not say about itself; see `ModelChoice.form`."""
    group.add_argument(
        "--rope-scaling", choices=ROPE_KINDS,
        help="meaning of rope_ratio, if the checkpoint does not say: linear divides the "
        "positions (chatglm2-6b-32k), base multiplies the rotary base (chatglm3-6b-32k, -128k)",
    )  # fmt: skip
    group.add_argument(
        "--template", choices=TEMPLATES,
        help="prompt template (default: by the checkpoint's family)",
    )  # fmt: skip
    add_family(group)


def add_family(group: argparse._ActionsContainer) -> None:
    """Add `--family`."""
    group.add_argument(
        "--family", choices=FAMILIES, metavar="NAME",
        help=f"model family: {', '.join(FAMILIES)} (default: recognized from the folder's "
        "configuration, special tokens, chat template and names)",
    )  # fmt: skip


def add_hub_flags(group: argparse._ActionsContainer) -> None:
    """Add `--source` (its value is `hub_source`) and `--revision`."""
    group.add_argument(
        "--source", choices=SOURCES, dest="hub_source",
        help="hub to download OWNER/NAME from: Hugging Face or ModelScope (default: never use the "
        "network, only the hub's cache)",
    )  # fmt: skip
    group.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit on the hub (default: newest)"
    )
