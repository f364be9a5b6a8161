"""Adds an adapter's B A to weights, a few rows at a time."""

from collections.abc import Callable

import numpy as np

from glm2_jax.lora import LoRA

# Our parameter -> the published matrix that is adapted, and the name of its B.
_ADAPTED = {
    "q": ("query_key_value", "q"),
    "k": ("query_key_value", "k"),
    "v": ("query_key_value", "v"),
    "o": ("dense", "b"),
    "gate_up": ("dense_h_to_4h", "b"),
    "down": ("dense_4h_to_h", "b"),
}

Update = Callable[[int, np.ndarray], np.ndarray]


def update_of(lora: LoRA | None, path: tuple[str, ...], layer: int | None) -> Update | None:
    """How an adapter changes one of our parameters in one layer.

    Args:
        lora: the adapter; None changes nothing.
        path: of the parameter.
        layer: its layer.

    Returns:
        A function of a first element and of values [n], whole rows of the flattened parameter,
        which gives W + scale * B A there in float32; None where nothing changes.
    """
    target, name = _ADAPTED.get(path[-1], ("", ""))
    if lora is None or layer is None or target not in lora.layers:
        return None
    weights, scale = lora.layers[target], np.float32(lora.scale[target])
    a = np.asarray(weights["a"][layer], np.float32)
    b = np.asarray(weights[name][layer], np.float32)
    rank = b.shape[-1]
    a, b = a.reshape(rank, -1), b.reshape(-1, rank)
    columns = a.shape[1]

    def update(start: int, values: np.ndarray) -> np.ndarray:
        rows = slice(start // columns, (start + values.size) // columns)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever writes it looks for infinity
            return values.astype(np.float32) + (scale * (b[rows] @ a)).reshape(-1)

    return update
