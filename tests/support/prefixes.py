"""Prefix encoders for tests, and their keys and values in plain NumPy."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from glm2_jax.config import GLMConfig
from tests.support.torch_zip import write_torch_file

START = "transformer.prefix_encoder."


def encoder(
    config: GLMConfig, length: int, *, projection: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random tensors under their published names, float32; keys and values of unit scale."""
    random = np.random.default_rng(seed)
    D, width = config.hidden_size, 2 * config.num_layers * config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (length, width)}
    if projection:
        shapes |= {"trans.0.weight": (D, width), "trans.0.bias": (D,)}
        shapes |= {"trans.2.weight": (width, D), "trans.2.bias": (width,)}
    tensors = {}
    for name, shape in shapes.items():
        fan_in = shape[-1] if name.startswith("trans") and len(shape) == 2 else 1
        values = random.standard_normal(shape) / np.sqrt(fan_in)
        tensors[START + name] = (2 * values).astype(np.float32)
    return tensors


def numpy_prefix(
    config: GLMConfig, tensors: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The keys and values [L, P, K, H], float32, slot by slot as the page of facts says it."""
    arrays = {name.removeprefix(START): x.astype(np.float64) for name, x in tensors.items()}
    rows = []
    for x in arrays["embedding.weight"]:
        if "trans.0.weight" in arrays:
            x = np.tanh(arrays["trans.0.weight"] @ x + arrays["trans.0.bias"])
            x = arrays["trans.2.weight"] @ x + arrays["trans.2.bias"]
        rows.append(x.reshape(2 * config.num_layers, config.num_kv_heads, config.head_dim))
    both = np.stack(rows, axis=1).astype(np.float32)  # layer * 2 + (0 = key, 1 = value)
    return both[0::2], both[1::2]


def write_prefix(folder: Path, tensors: Mapping[str, np.ndarray], *, kind: str = "bin") -> Path:
    """Writes tensors as the official training saves them, or as safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "bin":
        write_torch_file(folder / "pytorch_model.bin", dict(tensors))
    else:
        save_file(dict(tensors), folder / "model.safetensors")
    return folder
