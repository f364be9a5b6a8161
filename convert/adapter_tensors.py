"""The tensors of adapter folders, and the arrays of this project that they stand for.

PEFT names a tensor after the matrix that it adapts, and models name their matrices in two ways:
"chatglm" are the published ones, "glm" those of `GlmForCausalLM`, where q, k and v are apart. Every
matrix there has an A and a B; here a fused matrix has one A, and a B for each of its parts.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.gather import gathered
from convert.names import FLOATS
from convert.peft_config import PeftConfig
from convert.stored import StoredTensor
from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError
from glm2_jax.lora import TARGETS, LoRA, adapter_shapes


class Module(NamedTuple):
    """A matrix that PEFT adapts: its name in a layer, our target, and whose rows it holds."""

    path: str
    target: str
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """The last part of its path, which nothing else in a layer has."""
        return self.path.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The matrices of a model.

    Attributes:
        block: what stands before the number of a layer.
        begins: regular expression of the same in a file, which may have been saved from inside.
        modules: the matrices.
    """

    block: str
    begins: str
    modules: tuple[Module, ...]

    def full_name(self, module: Module, layer: int) -> str:
        """The name of a matrix in the model."""
        return f"{self.block}{layer}.{module.path}"

    def find(self, name: str) -> tuple[Module, int, str] | None:
        """The matrix, its layer, and "A" or "B", of the name of a stored tensor."""
        match = re.fullmatch(
            rf"(?:base_model\.model\.)?{self.begins}(0|[1-9]\d{{0,5}})\.([\w.]+)"
            r"\.lora_([AB])(?:\.\w+)?\.weight",
            name,
        )
        found = next((x for x in self.modules if match and x.path == match[2]), None)
        return (found, int(match[1]), match[3]) if match and found else None


LAYOUTS = {
    "chatglm": Layout(
        "transformer.encoder.layers.",
        r"(?:transformer\.)?encoder\.layers\.",
        (
            Module("self_attention.query_key_value", "query_key_value", ("q", "k", "v")),
            Module("self_attention.dense", "dense", ("b",)),
            Module("mlp.dense_h_to_4h", "dense_h_to_4h", ("b",)),
            Module("mlp.dense_4h_to_h", "dense_4h_to_h", ("b",)),
        ),
    ),
    "glm": Layout(
        "model.layers.",
        r"(?:model\.)?layers\.",
        (
            Module("self_attn.q_proj", "query_key_value", ("q",)),
            Module("self_attn.k_proj", "query_key_value", ("k",)),
            Module("self_attn.v_proj", "query_key_value", ("v",)),
            Module("self_attn.o_proj", "dense", ("b",)),
            Module("mlp.gate_up_proj", "dense_h_to_4h", ("b",)),
            Module("mlp.down_proj", "dense_4h_to_h", ("b",)),
        ),
    ),
}

# Parts of the names of embedding and head, in either layout.
_ENDS = {"embed_tokens", "lm_head", "embedding", "word_embeddings", "output_layer"}
_SHOWN = 3  # problems named in one line

Pairs = dict[tuple[Module, int], dict[str, StoredTensor]]  # -> {"A": .., "B": ..}


class _Piece(NamedTuple):
    """What one stored matrix adds to its rows: scale * B (A x)."""

    module: Module
    a: np.ndarray  # [R, columns]
    b: np.ndarray  # [rows, R]
    scale: float


def split_lora(
    lora: LoRA, layout: Layout
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, int]]]:
    """An adapter as the stored tensors of a layout: A is copied, the rows of B are divided.

    Where a target is divided, a matrix gets only those ranks that its own B uses in some layer, and
    is left out if there are none: so what `join_tensors` joined comes apart as it was.

    Returns:
        Names in the model -> float32 A [R, columns] and B [rows, R]; and the target and the rank of
        each matrix, under its last name.
    """
    tensors, modules = {}, {}
    for target in (target for target in TARGETS if target in lora.layers):
        arrays = {
            part: np.asarray(gathered(x), np.float32) for part, x in lora.layers[target].items()
        }
        L, R = arrays["a"].shape[:2]
        a = arrays["a"].reshape(L, R, -1)
        for module in (x for x in layout.modules if x.target == target):
            b = np.concatenate([arrays[x].reshape(L, -1, R) for x in module.parts], axis=1)
            used = _used_ranks(arrays, module)
            if not used.any():
                continue
            modules[module.name] = target, int(used.sum())
            for layer in range(L):
                name = layout.full_name(module, layer)
                tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a[layer, used])
                tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b[layer][:, used])
    return tensors, modules


def _used_ranks(arrays: Mapping[str, np.ndarray], module: Module) -> np.ndarray:
    """bool [R]: the ranks to write; all where the target is whole, or new, with B still zero."""
    used = {part: x.any(tuple(range(x.ndim - 1))) for part, x in arrays.items() if part != "a"}
    if len(module.parts) == len(used) or not any(x.any() for x in used.values()):
        return np.ones(arrays["a"].shape[1], bool)
    return np.any([used[part] for part in module.parts], axis=0)


def join_tensors(
    path: Path, tensors: Mapping[str, StoredTensor], config: GLMConfig, peft: PeftConfig
) -> tuple[dict[str, Any], dict[str, float]]:
    """The arrays of an adapter, layers stacked, from the stored tensors of either layout.

    Matrices that are one target here share their A if it is the same; otherwise their ranks follow
    each other, and B is zero where a rank is another's. Where ranks differ among layers the smaller
    ones are filled with zeros; where scales differ B makes up for it.

    Args:
        path: the file, for messages.
        tensors: what it holds.
        config: the model.
        peft: the adapter's configuration.

    Returns:
        Target -> float32 arrays as in `LoRA.layers`, and target -> scale.

    Raises:
        CheckpointError: NaN or infinity, or all that is missing, unexpected, or of a wrong shape or
            type.
    """
    found = {name: sum(map(bool, map(x.find, tensors))) for name, x in LAYOUTS.items()}
    layout = LAYOUTS[max(found, key=lambda name: found[name])]
    pairs = _find_pairs(path, layout, tensors, config, peft)
    layers, scale = {}, {}
    for target in TARGETS:
        if any(module.target == target for module, _ in pairs):
            layers[target], scale[target] = _stack(layout, target, pairs, config, peft)
    return layers, scale


def _find_pairs(
    path: Path,
    layout: Layout,
    tensors: Mapping[str, StoredTensor],
    config: GLMConfig,
    peft: PeftConfig,
) -> Pairs:
    """The A and B of every adapted matrix, checked against the model."""
    _refuse_ends(path, tensors)
    pairs: Pairs = {}
    problems = []
    for name, tensor in tensors.items():
        found = layout.find(name)
        if found is None:
            problems.append(f"unexpected: {name[:200]}")
            continue
        module, layer, side = found
        if layer >= config.num_layers:
            problems.append(f"unexpected: {name}, the model has {config.num_layers} layers")
        elif side in pairs.setdefault((module, layer), {}):
            problems.append(f"twice: {name}")
        else:
            pairs[module, layer][side] = tensor
            rank = peft.rank_of(layout.full_name(module, layer))
            problems.extend(_misfits(name, tensor, _shapes(config, module, rank)[side]))
    for (module, layer), pair in pairs.items():
        problems.extend(
            f"missing: lora_{x} of {layout.full_name(module, layer)}" for x in "AB" if x not in pair
        )
    if not peft.some_layers:
        problems.extend(
            f"missing: {layout.full_name(module, layer)}"
            for module in dict.fromkeys(module for module, _ in pairs)
            for layer in range(config.num_layers)
            if (module, layer) not in pairs
        )
    if not tensors:
        problems.append("no tensors at all")
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(
            f"The adapter {path.parent} does not fit the model: {count}.",
            "; ".join([*problems[:_SHOWN], *more]),
            "Take the model that it was trained on. What can be adapted: "
            f"{', '.join(module.name for module in layout.modules)}.",
        )
    return pairs


def _refuse_ends(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuses what adapts, or holds anew, the embedding or the head."""
    found = [name for name in tensors if _ENDS.intersection(name.split("."))]
    if found:
        stored = not any("lora_" in name for name in found)
        raise CheckpointError(
            f"The adapter {path.parent} {'holds' if stored else 'adapts'} the embedding or the "
            "head, which is not supported.",
            f"Its {path.name} has {found[0][:200]}.",
            "Train it without, or merge it into its base with the peft library"
            + ("; save_embedding_layers=False leaves out what is the base's own." * stored or "."),
        )


def _shapes(config: GLMConfig, module: Module, rank: int) -> dict[str, tuple[int, int]]:
    """Of the stored A and B."""
    shapes = adapter_shapes(config, module.target, rank)
    rows = sum(math.prod(shapes[part][:-1]) for part in module.parts)
    return {"A": (rank, math.prod(shapes["a"][1:])), "B": (rows, rank)}


def _misfits(name: str, tensor: StoredTensor, expected: tuple[int, int]) -> list[str]:
    problems = []
    if tensor.shape != expected:
        problems.append(f"wrong shape: {name} is {tensor.shape} instead of {expected}")
    if tensor.dtype.name not in FLOATS:
        problems.append(f"wrong type: {name} is {tensor.dtype.name}, not a float")
    return problems


def _stack(
    layout: Layout, target: str, pairs: Pairs, config: GLMConfig, peft: PeftConfig
) -> tuple[dict[str, np.ndarray], float]:
    """The float32 arrays of a target, layers stacked, and their common scale."""
    pieces: dict[int, list[_Piece]] = {}
    order = {module: place for place, module in enumerate(layout.modules)}
    for module, layer in sorted(pairs, key=lambda key: order[key[0]]):
        if module.target == target:
            name = layout.full_name(module, layer)
            a, b = (_read(pairs[module, layer][x], f"lora_{x} of {name}") for x in "AB")
            pieces.setdefault(layer, []).append(_Piece(module, a, b, peft.scale_of(name)))
    scale = max((x.scale for found in pieces.values() for x in found), key=abs)
    shared = {layer: _one_a(found) for layer, found in pieces.items()}
    rank = max(
        len(found[0].a) if shared[layer] else sum(len(x.a) for x in found)
        for layer, found in pieces.items()
    )
    shapes = adapter_shapes(config, target, rank)
    arrays = {x: np.zeros((config.num_layers, *shape), np.float32) for x, shape in shapes.items()}
    for layer, found in pieces.items():
        first = 0
        for piece in found:
            ranks = slice(first, first + len(piece.a))
            arrays["a"][layer, ranks] = piece.a.reshape(len(piece.a), *shapes["a"][1:])
            b = piece.b if piece.scale == scale else piece.b * np.float32(piece.scale / scale)
            start = 0
            for part in piece.module.parts:
                stop = start + math.prod(shapes[part][:-1])
                rows = b[start:stop].reshape(*shapes[part][:-1], len(piece.a))
                arrays[part][layer, ..., ranks] = rows
                start = stop
            first = first if shared[layer] else ranks.stop
    return arrays, scale


def _one_a(pieces: list[_Piece]) -> bool:
    """Whether the matrices of one target have the same A, as a fused one has that came apart."""
    return all(np.array_equal(piece.a, pieces[0].a) for piece in pieces)


def _read(tensor: StoredTensor, name: str) -> np.ndarray:
    array = np.asarray(tensor.read()).astype(np.float32)
    check_finite(name, array)
    return array


def check_finite(name: str, array: np.ndarray) -> None:
    """Refuses NaN and infinity.

    Raises:
        CheckpointError: names what holds them.
    """
    if not np.isfinite(array).all():
        raise CheckpointError(
            f"{name} holds NaN or infinity.",
            "The training that made it went wrong, or the file is damaged.",
            "Take an earlier checkpoint of the training.",
        )
