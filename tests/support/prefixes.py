"""Prefix encoders for tests, and what a model makes of them in plain float64 NumPy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def numpy_logits(
    config: GLMConfig, params: Any, tokens: Any, prefix_k: np.ndarray, prefix_v: np.ndarray
) -> np.ndarray:
    """float64 [T, V] of one row, query by query and head by head, with a prefix before the keys."""
    layers = params["layers"]
    groups = config.num_heads // config.num_kv_heads
    x = _f64(params["embed"])[np.asarray(tokens)]
    for i in range(config.num_layers):
        weights = {name: _f64(layers[name][i]) for name in layers}
        a = _norm(x, weights["attn_norm"], config.norm_eps)
        q, k, v = (
            np.einsum("td,nhd->tnh", a, weights[name]) + weights[f"{name}_bias"] for name in "qkv"
        )
        q, k = _rotated(q), _rotated(k)
        k, v = np.concatenate([prefix_k[i], k]), np.concatenate([prefix_v[i], v])
        out = np.zeros_like(q)
        for t in range(len(q)):
            for head in range(config.num_heads):
                seen = slice(0, prefix_k.shape[1] + t + 1)
                group = head // groups
                scores = k[seen, group] @ q[t, head] / np.sqrt(config.head_dim)
                probs = np.exp(scores - scores.max())
                out[t, head] = probs @ v[seen, group] / probs.sum()
        x = x + np.einsum("tnh,dnh->td", out, weights["o"])
        u = _norm(x, weights["mlp_norm"], config.norm_eps)
        gate, up = u @ weights["gate_up"][0].T, u @ weights["gate_up"][1].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights["down"].T
    return _norm(x, _f64(params["final_norm"]), config.norm_eps) @ _f64(params["head"]).T


def _f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _rotated(x: np.ndarray) -> np.ndarray:
    """[T, heads, H] with positions 0 .. T - 1: pairs of the first half of each head."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, half, 2) / half)
    turned = (x[..., 0:half:2] + 1j * x[..., 1:half:2]) * np.exp(1j * angles)[:, None]
    x = x.copy()
    x[..., 0:half:2], x[..., 1:half:2] = turned.real, turned.imag
    return x
