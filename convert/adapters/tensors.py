"""The tensors of adapter folders, and the arrays of this project that they stand for.

PEFT names a tensor after the matrix that it adapts (see `convert.adapters.layouts`). Every matrix
there has an A and a B; here a fused matrix has one A, and a B for each of its parts.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.core import FrozenDict

from convert.adapters.layouts import Layout, Module, Place, layout_of
from convert.files.tensor import StoredTensor
from convert.layouts.names import FLOATS
from convert.layouts.peft_config import CONFIG, Choice, PeftConfig
from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError
from glm2_jax.lora import TARGETS, LoRA, adapter_shapes
from glm2_jax.runtime.gather import gathered

# Parts of the names of embedding and head, in either layout.
_ENDS = {"embed_tokens", "lm_head", "embedding", "word_embeddings", "output_layer"}
_SHOWN = 3  # problems named in one line

Pairs = dict[Place, dict[str, StoredTensor]]  # -> {"A": .., "B": ..}
Gates = dict[str, dict[str, np.ndarray]]  # target -> part -> float32 [L, R]


class _Piece(NamedTuple):
    """A stored matrix: it adds scale * B (A x) to its rows."""

    module: Module
    a: np.ndarray  # [R, columns]
    b: np.ndarray  # [rows, R]
    scale: float


class _Stack(NamedTuple):
    """The matrices of one target: float32 arrays as in `LoRA.layers`, and as in `Shape`."""

    arrays: dict[str, Any]
    scale: float
    ranks: dict[Place, slice]
    gates: dict[str, np.ndarray]


class Written(NamedTuple):
    """How an adapted matrix is written, in all layers that have it."""

    rank: int
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """How the matrices of an adapter folder are placed in the arrays of a `LoRA` that was read
    apart: each has ranks that no other uses, and B is as it is stored.

    Attributes:
        layout: names the matrices.
        choices: rank and alpha of each matrix.
        ranks: where each is in the ranks of its target.
        gates: factors of B of each part in each rank, so that the target's scale is right for it; 0
            where a rank belongs to another part, or to none.
        selection: the keys of the configuration that describe all this.
    """

    layout: Layout
    choices: Mapping[Place, Choice]
    ranks: Mapping[Place, slice]
    gates: Gates
    selection: Mapping[str, Any]

    @property
    def is_plain(self) -> bool:
        """Whether the arrays are the adapter without any factor."""
        return all((gate == 1).all() for parts in self.gates.values() for gate in parts.values())

    def num_params(self, lora: LoRA) -> int:
        """Return the number of elements of the stored tensors."""
        total = 0
        for (module, _), ranks in self.ranks.items():
            arrays = lora.layers[module.target]
            L, R = arrays["a"].shape[:2]
            elements = sum(arrays[part].size for part in ("a", *module.parts))
            total += (ranks.stop - ranks.start) * elements // (L * R)
        return total

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

    def tensors(self, lora: LoRA) -> dict[str, np.ndarray]:
        """Return name in the model -> float32 A [R, columns] or B [rows, R], as they are stored."""
        found = {}
        for target, arrays in _on_host(lora).items():
            for place in (place for place in self.ranks if place[0].target == target):
                (module, layer), ranks = place, self.ranks[place]
                a = arrays["a"][layer, ranks]
                rows = [arrays[part][layer, ..., ranks] for part in module.parts]
                b = np.concatenate([x.reshape(-1, len(a)) for x in rows])
                _add_pair(found, self.layout.full_name(place), a.reshape(len(a), -1), b)
        return found


def split_lora(lora: LoRA, layout: Layout) -> tuple[dict[str, np.ndarray], dict[Module, Written]]:
    """Return an adapter as the stored tensors of a layout: A is copied, the rows of B are divided.

    If a target is divided, a matrix gets only those ranks that its B uses in some layer, and is
    left out if there are none: so what `join_tensors` joined comes apart as it was. Layers where
    all of a target is zero have no adapter.

    Returns:
        Name in the model -> float32 A [R, columns] or B [rows, R]; and what is written of each
        matrix.
    """
    tensors, modules = {}, {}
    for target, arrays in _on_host(lora).items():
        L, R = arrays["a"].shape[:2]
        a = arrays["a"].reshape(L, R, -1)
        layers = [x for x in range(L) if any(array[x].any() for array in arrays.values())]
        for module in (x for x in layout.modules if x.target == target):
            b = np.concatenate([arrays[x].reshape(L, -1, R) for x in module.parts], axis=1)
            used = _used_ranks(arrays, module)
            if not used.any():
                continue
            modules[module] = Written(int(used.sum()), tuple(layers or range(L)))
            for layer in modules[module].layers:
                name = layout.full_name((module, layer))
                _add_pair(tensors, name, a[layer, used], b[layer][:, used])
    return tensors, modules


def _on_host(lora: LoRA) -> dict[str, dict[str, np.ndarray]]:
    """Return float32 arrays of each target, in the order of `TARGETS`."""
    return {
        target: {
            part: np.asarray(gathered(x), np.float32) for part, x in lora.layers[target].items()
        }
        for target in TARGETS
        if target in lora.layers
    }


def _add_pair(tensors: dict[str, np.ndarray], name: str, a: np.ndarray, b: np.ndarray) -> None:
    tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a)
    tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b)


def _used_ranks(arrays: Mapping[str, np.ndarray], module: Module) -> np.ndarray:
    """Return bool [R], the ranks to write; all if the target is not divided, or new (B is zero)."""
    used = {part: x.any(tuple(range(x.ndim - 1))) for part, x in arrays.items() if part != "a"}
    if len(module.parts) == len(used) or not any(x.any() for x in used.values()):
        return np.ones(arrays["a"].shape[1], bool)
    return np.any([used[part] for part in module.parts], axis=0)


def join_tensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    config: GLMConfig,
    peft: PeftConfig,
    *,
    apart: bool = False,
) -> tuple[LoRA, Shape]:
    """Return the arrays of an adapter, layers stacked, from the stored tensors of either layout.

    Matrices that are one target here share their A if it is the same; otherwise their ranks follow
    each other, and B is zero where a rank belongs to another one. Smaller ranks of some layers are
    filled with zeros; where scales differ B is multiplied with the ratio.

    Args:
        path: the file, for messages.
        tensors: what it holds.
        config: the model.
        peft: the adapter's configuration.
        apart: share no A, and leave B as it is stored: the arrays for training to continue, from
            which `Shape.effective` makes the adapter.

    Returns:
        The adapter, its arrays float32 in numpy; and their `Shape`, valid only if they are apart.

    Raises:
        CheckpointError: NaN or infinity, or tensors that are missing, unexpected, or of a wrong
            shape or type.
    """
    layout = layout_of(tensors)
    places = layout.places(config.num_layers)
    chosen = peft.choose(list(places), ends=layout.ends, usual=layout.usual)
    _refuse_ends(path, layout, tensors, chosen)
    choices = {place: chosen[name] for name, place in places.items() if name in chosen}
    pairs = _find_pairs(path, layout, tensors, config, choices)
    pieces: dict[str, dict[int, list[_Piece]]] = {}  # target -> layer -> in the layout's order
    for (module, layer), choice in choices.items():
        name = layout.full_name((module, layer))
        a, b = (_read(pairs[module, layer][x], f"lora_{x} of {name}") for x in "AB")
        piece = _Piece(module, a, b, peft.scale(choice))
        pieces.setdefault(module.target, {}).setdefault(layer, []).append(piece)
    stacks = {
        target: _stack(target, pieces[target], config, apart)
        for target in TARGETS
        if target in pieces
    }
    lora = LoRA(
        {target: stack.arrays for target, stack in stacks.items()},
        FrozenDict({target: stack.scale for target, stack in stacks.items()}),
        peft.dropout,
    )
    ranks = {place: ranks for stack in stacks.values() for place, ranks in stack.ranks.items()}
    gates = {target: stack.gates for target, stack in stacks.items()}
    return lora, Shape(layout, choices, ranks, gates, peft.selection)


def _find_pairs(
    path: Path,
    layout: Layout,
    tensors: Mapping[str, StoredTensor],
    config: GLMConfig,
    choices: Mapping[Place, Choice],
) -> Pairs:
    """Return the A and B of every adapted matrix, checked against model and configuration."""
    pairs: Pairs = {}
    problems = [] if tensors else ["no tensors at all"]
    for name, tensor in tensors.items():
        found = layout.find(name)
        if found is None:
            problems.append(f"unexpected: {name[:200]}")
            continue
        module, layer, side = found
        place = module, layer
        if layer >= config.num_layers:
            problems.append(f"unexpected: {name}, the model has {config.num_layers} layers")
        elif place not in choices:
            problems.append(f"unexpected: {name}, {CONFIG} does not adapt it")
        elif side in pairs.setdefault(place, {}):
            problems.append(f"twice: {name}")
        else:
            pairs[place][side] = tensor
            expected = _stored_shape(config, module, choices[place].rank, side)
            if tensor.shape != expected:
                problems.append(f"wrong shape: {name} is {tensor.shape} instead of {expected}")
            if tensor.dtype.name not in FLOATS:
                problems.append(f"wrong type: {name} is {tensor.dtype.name}, not a float")
    problems += [
        f"missing: lora_{side} of {layout.full_name(place)}"
        for place in choices
        for side in "AB"
        if side not in pairs.get(place, {})
    ]
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise CheckpointError(
            f"The adapter {path.parent} does not fit the model: {len(problems)} "
            f"problem{'s' * (len(problems) > 1)}.",
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


def _stored_shape(config: GLMConfig, module: Module, rank: int, side: str) -> tuple[int, int]:
    """Return the shape of the stored A or B."""
    shapes = adapter_shapes(config, module.target, rank)
    if side == "A":
        return rank, math.prod(shapes["a"][1:])
    return sum(math.prod(shapes[part][:-1]) for part in module.parts), rank


def _stack(target: str, pieces: dict[int, list[_Piece]], config: GLMConfig, apart: bool) -> _Stack:
    """Return a target's arrays, layers stacked; see `join_tensors`."""
    scale = max((x.scale for found in pieces.values() for x in found), key=abs)
    # A fused matrix that was divided has the same A in all of its parts.
    shared = {
        layer: not apart and all(np.array_equal(x.a, found[0].a) for x in found)
        for layer, found in pieces.items()
    }
    rank = max(
        len(found[0].a) if shared[layer] else sum(len(x.a) for x in found)
        for layer, found in pieces.items()
    )
    shapes = adapter_shapes(config, target, rank)
    L = config.num_layers
    arrays = {x: np.zeros((L, *size), np.float32) for x, size in shapes.items()}
    gates = {x: np.zeros((L, rank), np.float32) for x in shapes if x != "a"}
    places = {}
    for layer, found in pieces.items():
        first = 0
        for piece in found:
            ranks = slice(first, first + len(piece.a))
            arrays["a"][layer, ranks] = piece.a.reshape(len(piece.a), *shapes["a"][1:])
            ratio = np.float32(piece.scale / scale) if scale else np.float32(1)
            b = piece.b if apart or ratio == 1 else piece.b * ratio
            start = 0
            for part in piece.module.parts:
                stop = start + math.prod(shapes[part][:-1])
                rows = b[start:stop].reshape(*shapes[part][:-1], len(piece.a))
                arrays[part][layer, ..., ranks] = rows
                gates[part][layer, ranks] = ratio
                start = stop
            places[piece.module, layer] = ranks
            first = first if shared[layer] else ranks.stop
    return _Stack(arrays, scale, places, gates)


def _read(tensor: StoredTensor, name: str) -> np.ndarray:
    array = np.asarray(tensor.read()).astype(np.float32)
    check_finite(name, array)
    return array


def check_finite(name: str, array: np.ndarray) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckpointError: with the name of the array.
    """
    if not np.isfinite(array).all():
        raise CheckpointError(
            f"{name} holds NaN or infinity.",
            "The training diverged, or the file is damaged.",
            "Use an earlier checkpoint of the training.",
        )
