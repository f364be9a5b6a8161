"""The lists of choices that flags and the Python API share, each once. Free of jax."""

import difflib
import re
from collections.abc import Collection

# Every name that a dtype can be given by, and the dtype.
DTYPE_NAMES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float32": "float32",
}
DTYPES = ("auto", *DTYPE_NAMES)  # to compute in
STORED_DTYPES = ("float16", "bfloat16", "float32")  # of weights in a folder

QUANTIZE = ("int8", "int4", "none")
DEVICES = ("auto", "cpu", "gpu", "tpu")
KV = ("auto", "int8")  # how a cache stores keys and values
LAYER_LAYOUTS = ("stacked", "list")  # layers as stacked arrays, or as a list of layers
# What the backward pass of training recomputes of a layer, from nothing to everything: "products"
# recomputes what lies between products, "attention" also the MLP's.
REMAT = ("none", "products", "attention", "full")

FAMILIES = ("chatglm2", "chatglm3", "codegeex2", "glm4", "glm4-0414", "chatglm", "glm")
ROPE_KINDS = ("linear", "base")
TEMPLATES = ("chatglm2", "chatglm3", "glm4", "chatglm", "fill", "raw")

SOURCES = ("hf", "modelscope")
LAYOUTS = ("glm", "chatglm")  # of folders and adapters for PyTorch
GGUF_TYPES = ("f16", "q8_0")


def unknown_device(name: object, known: Collection[str] = DEVICES) -> str:
    """Return what is wrong with the name of a device that is none of those that are known."""
    text = str(name)
    near = difflib.get_close_matches(text.lower(), known, n=1)
    if "gpu" in known and re.match(r"cuda|nvidia|rocm|hip\b", text, re.IGNORECASE):
        near = ["gpu"]  # as PyTorch calls it
    guess = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown device {text[:40]!r}{guess}; known: {', '.join(known)}"
