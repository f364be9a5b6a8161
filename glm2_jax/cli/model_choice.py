"""What a command line says about a model and its engine: the flags, and the values that travel."""

import argparse
from dataclasses import dataclass
from typing import Any

from glm2_jax.choices import (
    DEVICES,
    DTYPES,
    FAMILIES,
    KV,
    LAYER_LAYOUTS,
    QUANTIZE,
    ROPE_KINDS,
    SOURCES,
    TEMPLATES,
)
from glm2_jax.cli.arguments import device_argument, memory_size, path_argument, positive
from glm2_jax.cli.parser import Parser, add_flags, flag
from glm2_jax.limits import DRAFT

HUB = ("source", "revision")
FORM = ("rope_kind", "template", "family")  # what a checkpoint may not say about itself


def _draft_tokens(text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) < 10 else -1
    if not 0 <= number <= DRAFT:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to {DRAFT}, got {text[:20]!r}"
        )
    return number


@dataclass(frozen=True)
class ModelChoice:
    """Which model, how its checkpoint is read, and where it computes; each field is a flag."""

    path: str | None = flag(
        "checkpoint folder, published or converted, or OWNER/NAME on a hub (default: demo, the "
        "bundled demo model)",
        name="model", short=("-m",), type=path_argument, metavar="DIR|NAME",
    )  # fmt: skip
    source: str | None = flag(
        "hub to download OWNER/NAME from: Hugging Face or ModelScope (default: never use the "
        "network, only the hub's cache)",
        choices=SOURCES, dest="hub_source",
    )  # fmt: skip
    revision: str | None = flag("branch, tag or commit on the hub (default: newest)", metavar="REV")
    dtype: str = flag(
        "dtype of activations and unquantized weights, one of %(choices)s; auto = bfloat16 on "
        "TPUs and GPUs that support it, float16 on older GPUs, float32 on a CPU where it fits",
        choices=DTYPES, default="auto", metavar="TYPE",
    )  # fmt: skip
    quantize: str | None = flag(
        "quantize the matrices of the layers while loading; none = dequantize (default: as "
        "stored). Less memory; on a CPU, one row is faster in int8 than in bfloat16, and int4 is "
        "no faster than int8; not measured on other devices",
        choices=QUANTIZE,
    )
    quantize_embeddings: bool = flag(
        "with --quantize int8 or int4: also the embedding and the head; infer.evaluate "
        "measures the cost in quality",
        action="store_true",
    )
    layers: str | None = flag(
        "layout of the layers in memory: list is faster on a CPU, stacked compiles faster "
        "(default: by device)",
        choices=LAYER_LAYOUTS,
    )
    mesh: str | None = flag(
        "mesh axes over all devices, for example data=2,tensor=4: data shards the rows, fsdp "
        "the rows and the weights, tensor the heads, ffn and vocabulary; the product of the sizes "
        "is the number of devices (default: one device)",
        metavar="AXES",
    )
    device: str = flag(  # a card where it is only planned for
        f"device: {', '.join(DEVICES)}", type=device_argument, default="auto", metavar="DEVICE"
    )
    rope_kind: str | None = flag(
        "meaning of rope_ratio, if the checkpoint does not say: linear divides the "
        "positions (chatglm2-6b-32k), base multiplies the rotary base (chatglm3-6b-32k, -128k)",
        name="rope_scaling", choices=ROPE_KINDS,
    )  # fmt: skip
    template: str | None = flag(
        "prompt template (default: by the checkpoint's family)", choices=TEMPLATES
    )
    family: str | None = flag(
        f"model family: {', '.join(FAMILIES)} (default: recognized from the folder's "
        "configuration, special tokens, chat template and names)",
        choices=FAMILIES, metavar="NAME",
    )  # fmt: skip
    adapter: str | None = flag(
        "LoRA adapter, as train.lora and the PEFT library write it",
        short=("--adapter-path",), type=path_argument, metavar="DIR",
    )  # fmt: skip
    force_adapter: bool = flag(
        "accept an adapter that was trained on another base model or prompt template",
        action="store_true",
    )
    prefix: str | None = flag(
        "P-Tuning v2 prefix, as the official repository's training saves it "
        "(checkpoint-3000 with pytorch_model.bin)",
        type=path_argument, metavar="DIR",
    )  # fmt: skip

    @property
    def form(self) -> dict[str, Any]:
        """What the folder may not say about itself, as `open_folder` takes it."""
        return {name: getattr(self, name) for name in FORM}


@dataclass(frozen=True)
class EngineOptions:
    """The limits of an engine; each field is a flag."""

    max_length: int | None = None  # tokens of prompt and answer; None = 8192, or what the model has
    prefill_chunk: int | None = flag(
        "prefill N tokens of all rows at once: a smaller N needs less memory and more time "
        "(default: 2048)",
        type=positive, metavar="N",
    )  # fmt: skip
    speculate: int = flag(
        f"prompt-lookup speculative decoding: draft N tokens per step, up to {DRAFT} (0 = "
        "off). Faster where answers repeat the prompt or themselves (quotations, edits, code), "
        "often slower elsewhere and with many rows. The answers stay the same in float32; in "
        "narrower dtypes ties may be decided differently. Measured on a CPU only",
        type=_draft_tokens, default=0, metavar="N",
    )  # fmt: skip
    kv: str = flag(
        "store keys and values in this: auto = the dtype of the activations (float32 on a CPU); "
        "int8 = with a scale for each token and head, half of 16 bits: longer contexts and more "
        "rows fit. infer.evaluate measures the cost in quality",
        choices=KV, default="auto",
    )  # fmt: skip
    memory_limit: int | None = flag(
        "refuse a model that needs more memory, before it is loaded (default: what the device "
        "has free)",
        type=memory_size, metavar="GB",
    )  # fmt: skip
    tuned: str = flag(
        "forms of products and attention: auto = as measured on this device, at the first start of "
        "a model of these sizes and then kept; off = the usual ones; or a file of infer.tune",
        type=path_argument, default="auto", metavar="auto|off|F",
    )  # fmt: skip
    compile_cache: str | None = flag(
        "folder of compiled programs (default: the user's cache folder)",
        type=path_argument, metavar="DIR|off",
    )  # fmt: skip


def add_model_options(parser: Parser) -> None:
    """Add the flags that name a model and say how its checkpoint is read."""
    add_flags(parser, "model", ModelChoice, ("path", *HUB, *FORM))


def add_mesh_options(group: argparse._ActionsContainer) -> None:
    """Add the flags of a mesh; `glm2_jax.runtime.devices.find_mesh` reads their value."""
    mesh = group.add_mutually_exclusive_group()
    add_flags(mesh, None, ModelChoice, ("mesh",))
    mesh.add_argument(
        "--tp", type=lambda text: f"tensor={positive(text)}", dest="mesh", metavar="N",
        help="short for --mesh tensor=N",
    )  # fmt: skip
