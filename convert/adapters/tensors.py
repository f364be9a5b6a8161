"""The tensors of adapter folders, and the arrays of this project that they stand for.

PEFT names a tensor after the matrix that it adapts. Every matrix there has an A and a B; here a
fused matrix has one A, and a B for each of its parts.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.core import FrozenDict

from convert.adapters.layouts import Layout, Module, Place, layouts_of
from convert.files.tensor import StoredTensor
from convert.layouts.names import FLOATS
from convert.layouts.peft_config import CONFIG, Choice, PeftConfig
from glm2_jax.config import GLMConfig
from glm2_jax.dora import MAGNITUDE
from glm2_jax.errors import CheckpointError, UsageError
from glm2_jax.lora import TARGETS, LoRA, adapter_shapes
from glm2_jax.runtime.gather import gathered

# Parts of the names of embedding and head, in either layout.
_ENDS = {"embed_tokens", "lm_head", "embedding", "word_embeddings", "output_layer"}
# The name of a stored tensor: the matrix, and "A" or "B", or the magnitude of DoRA.
_STORED = re.compile(
    r"(?:base_model\.model\.)?(.+)\.lora_(?:([AB])(?:\.\w+)?\.weight|(magnitude_vector)(?:\.\w+){0,2})"
)
_VECTOR = "magnitude_vector"
_SHOWN = 3  # problems named in one line

Arrays = Mapping[str, Mapping[str, np.ndarray]]  # target -> part -> with a leading axis of layers


@dataclasses.dataclass(frozen=True)
class Shape:
    """How the matrices of an adapter folder are placed in the arrays of a `LoRA` that was read
    apart: each has ranks that no other uses, and B is as it is stored."""

    layout: Layout
    choices: Mapping[Place, Choice]  # rank and alpha of each matrix
    ranks: Mapping[Place, slice]  # where each is in the ranks of its target
    # Factors of B, so that the target's scale is right for it: float32 [L, R], 0 where a rank
    # belongs to another part, or to none.
    gates: Arrays
    selection: Mapping[str, Any]  # the keys of the configuration that describe all this

    @property
    def is_plain(self) -> bool:
        """Whether the arrays are the adapter without any factor."""
        return all((gate == 1).all() for parts in self.gates.values() for gate in parts.values())

    def num_params(self, lora: LoRA) -> int:
        """Return the number of elements of the stored tensors."""

        def per_rank(module: Module) -> int:
            arrays = lora.layers[module.target]
            L, R = arrays["a"].shape[:2]
            return sum(arrays[part].size for part in ("a", *module.parts)) // (L * R)

        def magnitudes(module: Module) -> int:
            arrays = lora.layers[module.target]
            found = (arrays.get(MAGNITUDE + part) for part in module.parts)
            return sum(len(x[0].reshape(-1)) for x in found if x is not None)

        return sum(
            choice.rank * per_rank(module) + magnitudes(module)
            for (module, _), choice in self.choices.items()
        )

    def effective(self, lora: LoRA) -> LoRA:
        """Return the adapter that the arrays stand for; gradients through it are zero wherever the
        folder holds nothing."""
        layers = {target: dict(arrays) for target, arrays in lora.layers.items()}
        for target, parts in self.gates.items():
            for part, gate in parts.items():
                b = layers[target][part]
                shape = (gate.shape[0], *[1] * (b.ndim - 2), gate.shape[1])
                layers[target][part] = b * gate.reshape(shape)
        return dataclasses.replace(lora, layers=layers)


def on_host(lora: LoRA) -> Arrays:
    """Return the arrays of an adapter in float32 numpy."""
    return {
        target: {part: np.asarray(gathered(x), np.float32) for part, x in arrays.items()}
        for target, arrays in lora.layers.items()
    }


def used_ranks(arrays: Arrays, layout: Layout) -> dict[Place, np.ndarray]:
    """Return the ranks that each matrix of a layout needs, bool [R].

    If a target is divided, a matrix gets only those ranks that its B uses in some layer, and is
    left out if there are none: so what `join_tensors` joined comes apart as it was. Layers where
    all of a target is zero have no adapter.
    """
    found = {}
    for module in (x for x in layout.modules if x.target in arrays):
        parts = {name: arrays[module.target][name] for name in TARGETS[module.target].up}
        L, R = arrays[module.target]["a"].shape[:2]
        used = {name: x.any(tuple(range(x.ndim - 1))) for name, x in parts.items()}
        own = np.any([used[name] for name in module.parts], axis=0)
        lengths = (arrays[module.target].get(MAGNITUDE + part) for part in module.parts)
        alone = not own.any() and any(x is not None and x.any() for x in lengths)
        if alone or len(module.parts) == len(parts) or not any(x.any() for x in used.values()):
            own = np.ones(R, bool)  # the target is not divided, or B is zero: it is new
        layers = [
            x for x in range(L) if any(array[x].any() for array in arrays[module.target].values())
        ]
        if own.any():
            found |= {(module, layer): own for layer in layers or range(L)}
    return found


def split_arrays(
    arrays: Arrays, layout: Layout, ranks: Mapping[Place, Any]
) -> dict[str, np.ndarray]:
    """Return name in the model -> float32 A [R, columns] or B [rows, R], as they are stored: A is
    copied, the rows of B are divided. `ranks` says which ranks of its target a matrix has."""
    tensors = {}
    for (module, layer), own in ranks.items():
        a, *rows = (arrays[module.target][part][layer] for part in ("a", *module.parts))
        a, name = a[own], f"{layout.full_name((module, layer))}.lora_"
        tensors[f"{name}A.weight"] = np.ascontiguousarray(a.reshape(len(a), -1))
        b = [np.ascontiguousarray(x[..., own]).reshape(-1, len(a)) for x in rows]
        order = module.rule.order([x.shape for x in rows])
        tensors[f"{name}B.weight"] = _as_stored(np.concatenate(b), order)
        found = (arrays[module.target].get(MAGNITUDE + part) for part in module.parts)
        lengths = [x[layer].reshape(-1) for x in found if x is not None]
        if lengths:
            tensors[name + _VECTOR] = _as_stored(np.concatenate(lengths), order)
            if not tensors[name + _VECTOR].all():
                raise UsageError(
                    f"This DoRA adapter cannot be written with one matrix {module.name}.",
                    "It adapts only a part of its rows; the others need the lengths of the base.",
                    "Keep the layout that it has.",
                )
    return tensors


def _as_stored(ours: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Return rows in the order in which folders have them."""
    stored = np.empty_like(ours)
    stored[slice(None) if order is None else order] = ours
    return stored


class _Piece(NamedTuple):
    """A stored matrix: it adds scale * B (A x) to its rows."""

    a: np.ndarray  # [R, columns]
    b: np.ndarray  # [rows, R]
    scale: float
    lengths: np.ndarray | None  # [rows], the magnitude of DoRA


def join_tensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    config: GLMConfig,
    peft: PeftConfig,
    *,
    apart: bool = False,
) -> tuple[LoRA, Shape]:
    """Return the arrays of an adapter, layers stacked, from the stored tensors of either layout.

    Matrices that are one target here share the ranks of an equal A; otherwise their ranks follow
    each other, and B is zero where a rank belongs to another one. Smaller ranks of some layers are
    filled with zeros; where scales differ B is multiplied with the ratio.

    `path` is the file, for messages. With `apart` no A is shared, and B is left as it is stored:
    the arrays for training to continue, from which `Shape.effective` makes the adapter.

    Returns:
        The adapter, its arrays float32 in numpy; and their `Shape`, valid only if they are apart.

    Raises:
        CheckpointError: NaN or infinity, or tensors that are missing, unexpected, or of a wrong
            shape or type.
    """
    adapted = {match[1] for match in map(_STORED.fullmatch, tensors) if match}
    known = [(layout, layout.places(config.num_layers)) for layout in layouts_of(config)]
    layout, places = max(known, key=lambda x: len(adapted & x[1].keys()))
    chosen = peft.choose(list(places), ends=layout.ends, usual=layout.usual)
    _refuse_ends(path, layout, tensors, chosen)
    choices = {place: chosen[name] for name, place in places.items() if name in chosen}
    stored = _find_pairs(path, layout, places, tensors, config, choices, _sides(peft))
    layers, scales, gates, ranks = {}, {}, {}, {}
    for target in TARGETS:
        pieces = {}
        for place, choice in choices.items():
            if place[0].target == target:
                name = layout.full_name(place)
                a, b, *more = (_read(stored[place, x], f"lora_{x} of {name}") for x in _sides(peft))
                pieces[place] = _Piece(a, b, peft.scale(choice), more[0] if more else None)
        if pieces:
            scales[target] = max((piece.scale for piece in pieces.values()), key=abs)
            stack = _stack(target, pieces, scales[target], config, apart)
            layers[target], gates[target], own = stack
            ranks |= own
    lora = LoRA(layers, FrozenDict(scales), peft.dropout)
    return lora, Shape(layout, choices, ranks, gates, peft.selection)


def _stack(
    target: str, pieces: Mapping[Place, _Piece], scale: float, config: GLMConfig, apart: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[Place, slice]]:
    """Return a target's arrays, layers stacked, their gates, and the ranks of each matrix."""
    ranks: dict[Place, slice] = {}
    for (module, layer), piece in pieces.items():
        others = {x: found for x, found in ranks.items() if x[1] == layer}
        # A fused matrix that was divided has the same A in all of its parts.
        same = [r for x, r in others.items() if not apart and np.array_equal(pieces[x].a, piece.a)]
        first = max((found.stop for found in others.values()), default=0)
        ranks[module, layer] = same[0] if same else slice(first, first + len(piece.a))
    L, R = config.num_layers, max(found.stop for found in ranks.values())
    shapes = adapter_shapes(config, target, R)
    arrays = {x: np.zeros((L, *size), np.float32) for x, size in shapes.items()}
    gates = {x: np.zeros((L, R), np.float32) for x in shapes if x != "a"}
    if any(piece.lengths is not None for piece in pieces.values()):
        arrays |= {MAGNITUDE + x: np.zeros((L, *shapes[x][:-1]), np.float32) for x in gates}
    for (module, layer), piece in pieces.items():
        own = ranks[module, layer]
        arrays["a"][layer, own] = piece.a.reshape(-1, *shapes["a"][1:])
        ratio = np.float32(piece.scale / scale) if scale else np.float32(1)
        b, start = piece.b if apart or ratio == 1 else piece.b * ratio, 0
        order = module.rule.order([shapes[part] for part in module.parts])
        b = b if order is None else b[order]
        lengths = piece.lengths
        lengths = lengths if lengths is None or order is None else lengths[order]
        for part in module.parts:
            shape = shapes[part][:-1]
            stop = start + math.prod(shape)
            arrays[part][layer, ..., own] = b[start:stop].reshape(*shape, -1)
            gates[part][layer, own] = ratio
            if lengths is not None:
                arrays[MAGNITUDE + part][layer] = lengths[start:stop].reshape(shape)
            start = stop
    return arrays, gates, ranks


def _sides(peft: PeftConfig) -> tuple[str, ...]:
    """Return what an adapted matrix has: A and B, and with DoRA its magnitude."""
    return ("A", "B", _VECTOR) if peft.dora else ("A", "B")


def _find_pairs(
    path: Path,
    layout: Layout,
    places: Mapping[str, Place],
    tensors: Mapping[str, StoredTensor],
    config: GLMConfig,
    choices: Mapping[Place, Choice],
    sides: Sequence[str],
) -> dict[tuple[Place, str], StoredTensor]:
    """Return the `_sides` of every adapted matrix, checked against model and configuration."""
    pairs: dict[tuple[Place, str], StoredTensor] = {}
    problems = [] if tensors else ["no tensors at all"]
    for name, tensor in tensors.items():
        match = _STORED.fullmatch(name)
        place = places.get(match[1]) if match else None
        if match is None or place is None:
            problems.append(f"unexpected: {name[:200]}")
        elif place not in choices or (side := match[2] or match[3]) not in sides:
            problems.append(f"unexpected: {name}, {CONFIG} does not adapt it")
        elif (place, side) in pairs:
            problems.append(f"twice: {name}")
        else:
            pairs[place, side] = tensor
            shapes = adapter_shapes(config, place[0].target, choices[place].rank)
            rows = sum(math.prod(shapes[part][:-1]) for part in place[0].parts)
            rank = shapes["a"][0]
            stored = {"A": (rank, math.prod(shapes["a"][1:])), "B": (rows, rank), _VECTOR: (rows,)}
            expected = stored[side]
            if tensor.shape != expected:
                problems.append(f"wrong shape: {name} is {tensor.shape} instead of {expected}")
            if tensor.dtype.name not in FLOATS:
                problems.append(f"wrong type: {name} is {tensor.dtype.name}, not a float")
    problems += [
        f"missing: lora_{side} of {layout.full_name(place)}"
        for place in choices
        for side in sides
        if (place, side) not in pairs
    ]
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise CheckpointError(
            f"The adapter {path.parent} does not fit the model ({config.num_layers} layers): "
            f"{len(problems)} problem{'s' * (len(problems) > 1)}.",
            "; ".join([*problems[:_SHOWN], *more]),
            f"Use the model that it was trained on; copy the adapter again, or correct {CONFIG}. "
            f"What can be adapted: {', '.join(module.name for module in layout.modules)}.",
        )
    return pairs


def _refuse_ends(
    path: Path, layout: Layout, tensors: Mapping[str, StoredTensor], chosen: Mapping[str, Choice]
) -> None:
    """Refuse an adapter of the embedding or the head, or one that holds them."""
    found = [name for name in tensors if _ENDS.intersection(name.split("."))]
    ends = [name for name in layout.ends if name in chosen]
    if found or ends:
        raise CheckpointError(
            f"The adapter {path.parent} adapts or holds the embedding or the head, which is not "
            "supported.",
            f"Its {path.name} has {found[0][:200]}." if found else f"{CONFIG} adapts {ends[0]}.",
            "Train it without them (save_embedding_layers=False leaves them out), or merge it into "
            "its base with the peft library.",
        )


def _read(tensor: StoredTensor, name: str) -> np.ndarray:
    array = np.asarray(tensor.read()).astype(np.float32)
    check_finite(name, array)
    return array


def check_finite(name: str, array: np.ndarray) -> None:
    """Refuse NaN and infinity in the array of that name."""
    if not np.isfinite(array).all():
        raise CheckpointError(
            f"{name} holds NaN or infinity.",
            "The training diverged, or the file is damaged.",
            "Use an earlier checkpoint of the training.",
        )
