"""The tensors of a new folder, read from an opened one a few rows at a time.

Floats are dequantized, merged with an adapter's B A in float32, and cast last; integers and scales
are passed on as they are stored, or quantized on the way.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from convert.files.safetensors_writer import Entry
from convert.files.tensor import reading
from convert.layouts.names import SCALE, Match, Part, Rule
from convert.loading.folder import Folder
from convert.loading.values import Values, all_finite, cast
from glm2_jax.errors import CheckpointError
from glm2_jax.lora import LoRA
from glm2_jax.runtime.dtypes import resolve_dtype
from glm2_jax.schemes import Scheme

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
Progress = Callable[[int, int], None]  # called with the bytes written and to write
# The parameters whose rows a new tensor consists of: each with the stored tensor that holds it, and
# its first element there and the one after its last.
Places = Sequence[tuple[Part, tuple[Match, int, int]]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be written of a folder.

    Attributes:
        dtype: the type of what is not quantized.
        scheme: how the matrices are quantized; None where they are floats.
        entries: the tensors, in the order of the source's files, so that disks read forwards.
    """

    dtype: np.dtype
    scheme: Scheme | None
    entries: list[Entry]

    @property
    def nbytes(self) -> int:
        """Size of the weights in bytes."""
        return sum(entry.nbytes for entry in self.entries)


def float_dtype(name: str) -> np.dtype:
    """Return the type to store. The model has no need of float64, which becomes float32."""
    return resolve_dtype("float32" if name == "float64" else name, num_params=0)


def float_entry(
    source: Folder,
    name: str,
    matrix: Part | Rule,
    places: Places,
    dtype: np.dtype,
    lora: LoRA | None,
) -> Entry:
    """Return a tensor of floats; its chunks raise CheckpointError for NaN, infinity, or a number
    too large for float16, also in the sum with the adapter."""

    def chunks() -> Iterator[np.ndarray]:
        for part, (match, start, stop) in places:
            update = update_of(lora, part.path, match.layer)
            with reading(match.tensor.file):  # or an error would be taken for one of the writing
                values = Values(match, part, start, stop, source.config, source.scheme)
                begin = 0
                for chunk in values.chunks():
                    if update is None:
                        yield cast(chunk, dtype, match.name)
                        continue
                    merged = cast(update(begin, chunk), dtype, match.name)
                    begin += chunk.size
                    if not all_finite(merged):
                        raise CheckpointError(
                            f"{match.name} and the adapter together give NaN or infinity.",
                            f"The sum for {part.path[-1]} is larger than {dtype.name} can hold.",
                            "Check the adapter's lora_alpha, or use one that was trained on this "
                            "model.",
                        )
                    yield merged

    return Entry(name, matrix.shape(source.config), dtype, chunks)


def quantized_entries(
    source: Folder,
    name: str,
    matrix: Part | Rule,
    places: Places,
    scheme: Scheme,
    scale_dtype: np.dtype,
) -> Iterator[Entry]:
    """Yield the integers and the scales of a matrix; each is computed twice rather than held."""

    def chunks(which: int, dtype: np.dtype) -> Iterator[np.ndarray]:
        for part, (match, start, stop) in places:
            with reading(match.tensor.file):
                values = Values(match, part, start, stop, source.config, source.scheme)
                for rows in values.row_pieces():
                    yield values.quantized(rows, scheme)[which].astype(dtype, copy=False)

    shapes = scheme.shapes(matrix.shape(source.config), matrix.column_axes)
    for which, (suffix, dtype) in enumerate([("", np.dtype(np.int8)), (SCALE, scale_dtype)]):
        yield Entry(name + suffix, shapes[which], dtype, functools.partial(chunks, which, dtype))


def update_of(lora: LoRA | None, path: tuple[str, ...], layer: int | None) -> Update | None:
    """Return how an adapter changes one of our parameters in one layer; None if it does not.

    The function takes a first element and values [n], whole rows of the flattened parameter, and
    returns W + scale * B A there in float32.
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
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for infinity
            return values.astype(np.float32) + (scale * (b[rows] @ a)).reshape(-1)

    return update
