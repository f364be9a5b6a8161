"""Stored weights as floats, a few rows at a time, with an adapter's B A added where asked."""

from collections.abc import Callable, Iterator

import numpy as np

from convert.files.tensor import reading
from convert.layouts.names import Match, Part
from convert.loading.folder import Folder
from convert.loading.values import Values, all_finite, cast
from glm2_jax.errors import CheckpointError
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


def float_chunks(
    source: Folder,
    part: Part,
    place: tuple[Match, int, int],
    dtype: np.dtype,
    lora: LoRA | None = None,
) -> Iterator[np.ndarray]:
    """One of our parameters as floats [n], in order; dequantized, merged in float32, then cast.

    Args:
        source: the folder.
        part: the parameter.
        place: the tensor that holds it, its first element there and the one after its last.
        dtype: to cast to.
        lora: an adapter to merge.

    Raises:
        CheckpointError: NaN or infinity, also of the sum, or a number too large for float16.
    """
    match, start, stop = place
    update = update_of(lora, part.path, match.layer)
    with reading(match.tensor.file):  # else an error would be taken for one of the writing
        begin = 0
        for chunk in Values(match, part, start, stop, source.config, source.scheme).chunks():
            if update is None:
                yield cast(chunk, dtype, match.name)
                continue
            merged = cast(update(begin, chunk), dtype, match.name)
            begin += chunk.size
            if not all_finite(merged):
                raise CheckpointError(
                    f"{match.name} and the adapter together give NaN or infinity.",
                    f"The sum for {part.path[-1]} is larger than {dtype.name} can hold.",
                    "Check the adapter's lora_alpha, or take one that was trained on this model.",
                )
            yield merged


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
