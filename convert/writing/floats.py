"""The tensors of a new folder, read from an opened one a few rows at a time.

Floats are dequantized, merged with an adapter's B A in float32, and cast last; integers and scales
are passed on as they are stored, or quantized on the way.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from convert.files.manifest import Manifest
from convert.files.safetensors_writer import Entry
from convert.files.tensor import reading
from convert.layouts.names import SCALE, Match, Rule
from convert.loading.folder import Folder
from convert.loading.values import Values, all_finite, cast
from glm2_jax.dora import MAGNITUDE
from glm2_jax.errors import CheckpointError
from glm2_jax.lora import ADAPTED, LoRA
from glm2_jax.parts import Part
from glm2_jax.runtime.dtypes import resolve_dtype
from glm2_jax.schemes import Scheme

Progress = Callable[[int, int], None]  # called with the bytes written and to write
# One of our parameters in one layer: the stored tensor that holds it, and its first element there
# and the one after its last.
Place = tuple[Match, Part, int, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A folder to write: the type of the floats, how matrices are quantized, what it consists of,
    and the folder that it is read from; without a manifest it is for PyTorch programs."""

    dtype: np.dtype
    scheme: Scheme | None
    entries: list[Entry]
    files: Mapping[str, bytes]  # name -> content of all but the weights
    manifest: Manifest | None = None
    source: Path | None = None

    @property
    def nbytes(self) -> int:
        """Size of the weights in bytes."""
        return sum(entry.nbytes for entry in self.entries)


def float_dtype(name: str) -> np.dtype:
    """Return the type to store. The model has no need of float64, which becomes float32."""
    return resolve_dtype("float32" if name == "float64" else name, num_params=0)


def plan_tensors(
    source: Folder,
    rules: Sequence[Rule],
    dtype: np.dtype,
    scheme: Scheme | None,
    scale_dtype: np.dtype,
    lora: LoRA | None,
) -> list[Entry]:
    """Return the tensors of a folder under other rules, in the order of the source's files, so that
    disks read forwards.

    Their chunks raise CheckpointError for NaN, infinity, or a number too large for float16, also in
    the sum with the adapter.
    """
    config = source.config
    rule_of = {part.path: rule for rule in rules for part in rule.parts}
    stored: dict[tuple[tuple[str, ...], int | None], Place] = {
        (part.path, match.layer): (match, part, start, stop)
        for match in source.matches
        for part, start, stop in match.rule.ranges(config)
    }
    entries = []
    for rule, layer in dict.fromkeys((rule_of[path], layer) for path, layer in stored):
        name, shape = rule.full_name(layer), rule.shape(config)
        places = [stored[part.path, layer] for part in rule.parts]
        if scheme is None or not rule.quantized(scheme):
            kind = np.dtype(rule.dtype or dtype)
            chunks = partial(_floats, source, places, kind, lora)
            entries.append(Entry(name, shape, kind, _ordered(chunks, rule, source, shape)))
            continue
        form = scheme.of(rule.parts[0].name)
        shapes = form.shapes(shape, rule.column_axes)
        for which, kind in enumerate((np.dtype(np.int8), scale_dtype)):
            chunks = partial(_quantized, source, places, form, which, kind)
            chunks = _ordered(chunks, rule, source, shapes[which])
            entries.append(Entry(name + SCALE * which, shapes[which], kind, chunks))
    return entries


def _ordered(
    chunks: Callable[[], Iterator[np.ndarray]], rule: Rule, source: Folder, shape: tuple[int, ...]
) -> Callable[[], Iterator[np.ndarray]]:
    """Return the chunks of a tensor with its rows as the rule stores them: one, if in another order
    than ours."""
    order = rule.order([part.shape(source.config) for part in rule.parts])
    if order is None:
        return chunks

    def whole() -> Iterator[np.ndarray]:
        ours = np.concatenate([chunk.reshape(-1) for chunk in chunks()]).reshape(shape)
        stored = np.empty_like(ours)
        stored[order] = ours
        yield stored.reshape(-1)

    return whole


def _floats(
    source: Folder, places: Sequence[Place], dtype: np.dtype, lora: LoRA | None
) -> Iterator[np.ndarray]:
    for match, part, start, stop in places:
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
                        f"The sum for {part.name} is larger than {dtype.name} can hold.",
                        "Check the adapter's lora_alpha, or use one trained on this model.",
                    )
                yield merged


def _quantized(
    source: Folder, places: Sequence[Place], scheme: Scheme, which: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Yield the integers or the scales; each is computed twice rather than held."""
    for match, part, start, stop in places:
        with reading(match.tensor.file):
            values = Values(match, part, start, stop, source.config, source.scheme)
            for rows in values.row_pieces():
                yield values.quantized(rows, scheme)[which].astype(dtype, copy=False)


def update_of(
    lora: LoRA | None, path: tuple[str, ...], layer: int | None
) -> Callable[[int, np.ndarray], np.ndarray] | None:
    """Return how an adapter changes one of our parameters in one layer; None if it does not.

    The function takes a first element and values [n], complete rows of the flattened parameter, and
    returns W + scale * B A there in float32, with DoRA each row at the length of its magnitude.
    """
    target, name = ADAPTED.get(path[-1], ("", ""))
    if lora is None or layer is None or target not in lora.layers:
        return None
    weights, scale = lora.layers[target], np.float32(lora.scale[target])
    b = np.asarray(weights[name][layer], np.float32)
    rank = b.shape[-1]
    a = np.asarray(weights["a"][layer], np.float32).reshape(rank, -1)
    b, columns = b.reshape(-1, rank), a.shape[1]
    lengths = weights[MAGNITUDE + name][layer] if MAGNITUDE + name in weights else None

    def update(start: int, values: np.ndarray) -> np.ndarray:
        rows = slice(start // columns, (start + values.size) // columns)
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for infinity
            merged = values.astype(np.float32) + (scale * (b[rows] @ a)).reshape(-1)
            if lengths is None:
                return merged
            merged, wanted = merged.reshape(-1, columns), lengths.reshape(-1)[rows]
            norms = np.linalg.norm(merged, axis=1)
            gain = np.divide(wanted, norms, out=np.ones_like(norms), where=wanted != 0)
            return (merged * gain[:, None]).reshape(-1)

    return update
