"""What official folders hold besides the parameters: frequencies, and a tied head once more."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from convert.files.safetensors_writer import Entry
from convert.layouts.names import frequency_names, tied_names
from glm2_jax.config import GLMConfig


def with_computed(config: GLMConfig, entries: Sequence[Entry], dtype: np.dtype) -> list[Entry]:
    """Return the tensors of an official folder, whose weights are of `dtype`, with those that
    readers of this project compute."""
    first, *others = entries
    values = _frequencies(config, dtype)
    buffers = [
        Entry(name, values.shape, values.dtype, lambda: iter([values]))
        for name in frequency_names(config)
    ]
    names, head = tied_names(config), []
    if names is not None:
        head = [dataclasses.replace(x, name=names[1]) for x in entries if x.name == names[0]]
    return [first, *buffers, *others, *head]


def _frequencies(config: GLMConfig, dtype: np.dtype) -> np.ndarray:
    """Return the rotary frequencies [R / 2] of a section of R dimensions, computed step by step as
    in the published class: in the type of the weights, or in float32 and then rounded."""
    block = config.block
    rotated = config.head_dim if block.rotary == "full" else config.head_dim // 2
    stored = dtype
    if block.rotary_dtype != "float32":
        dtype, stored = np.dtype(np.float32), np.dtype(block.rotary_dtype)
    exponents = np.arange(0, rotated, 2).astype(dtype) / dtype.type(rotated)
    values = dtype.type(1) / np.power(dtype.type(config.rope_base), exponents)
    return values.astype(stored)
