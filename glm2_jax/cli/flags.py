"""Flags that several commands share."""

import argparse

from glm2_jax.cli.arguments import path_argument, positive
from glm2_jax.cli.parser import Parser
from glm2_jax.family import FAMILIES

SOURCES = ("hf", "modelscope")


def add_model_options(parser: Parser) -> None:
    """Which model, and how its checkpoint is to be understood."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        "-m",
        type=path_argument,
        metavar="DIR|NAME",
        help="checkpoint folder, as published or converted, or OWNER/NAME of a model on a hub "
        "(default: the bundled demo model)",
    )
    add_hub_flags(group)
    group.add_argument(
        "--rope-scaling",
        choices=("linear", "base"),
        help="what the checkpoint's rope_ratio means, where it does not say: positions divided "
        "(chatglm2-6b-32k) or the base multiplied (chatglm3-6b-32k, -128k)",
    )
    group.add_argument(
        "--template",
        choices=("chatglm2", "chatglm3", "raw"),
        help="how a prompt is written for the model (default: by the checkpoint's family)",
    )
    add_family(group)


def add_mesh_options(group: argparse._ArgumentGroup) -> None:
    """Which devices to compute on; `glm2_jax.runtime.devices.find_mesh` reads it."""
    mesh = group.add_mutually_exclusive_group()
    mesh.add_argument(
        "--mesh",
        metavar="AXES",
        help="compute on all devices together, for example data=2,tensor=4: data shares the rows, "
        "fsdp the rows and the weights, tensor the heads, ffn and vocabulary; the sizes multiply "
        "to the number of devices (default: one device)",
    )
    mesh.add_argument(
        "--tp", type=_tensor_axis, dest="mesh", metavar="N", help="short for --mesh tensor=N"
    )


def _tensor_axis(text: str) -> str:
    """An argparse type: the mesh that `--tp` asks for."""
    return f"tensor={positive(text)}"


def add_family(group: argparse._ActionsContainer) -> None:
    """`--family`."""
    group.add_argument(
        "--family", choices=FAMILIES, metavar="NAME",
        help=f"the model's family, whatever the folder says: {', '.join(FAMILIES)} (default: by "
        "the folder's configuration, special tokens, chat template and names)",
    )  # fmt: skip


def add_hub_flags(group: argparse._ActionsContainer) -> None:
    """`--source` and `--revision`; the values are `hub_source` and `revision`."""
    group.add_argument(
        "--source", choices=SOURCES, dest="hub_source",
        help="fetch a model that is given as OWNER/NAME from Hugging Face or from ModelScope; "
        "without it the network is never used, and only a copy in the hub's cache is found",
    )  # fmt: skip
    group.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of such a model (default: newest)"
    )
