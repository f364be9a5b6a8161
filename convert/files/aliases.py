"""Recognizes published tensors under the names that wrappers and trainers give them."""

import itertools
from collections.abc import Iterable, Mapping

import numpy as np

from convert.files.tensor import StoredTensor
from glm2_jax.errors import CheckpointError

# Parts of a name that wrappers of a model add, anywhere: DataParallel and DDP, torch.compile,
# DeepSpeed, FSDP, activation checkpoints, PEFT.
_WRAPPERS = frozenset({
    "module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_fpw_module",
    "_checkpoint_wrapped_module", "base_layer",
})  # fmt: skip
# Attributes that hold the model, or its inner one: at the beginning of a name only.
_HOLDERS = frozenset({"base_model", "pretrained_model", "model", "transformer", "glm"})
# Names of the other layout and of public training scripts, without what holds them. A head that is
# "cast to float" is a Sequential of one.
_SYNONYMS = {
    "lm_head.weight": "output_layer.weight",
    "lm_head.0.weight": "output_layer.weight",
    "output_layer.0.weight": "output_layer.weight",
    "word_embeddings.weight": "embedding.word_embeddings.weight",
    "embed_tokens.weight": "embedding.word_embeddings.weight",
    "final_layernorm.weight": "encoder.final_layernorm.weight",
    "norm.weight": "encoder.final_layernorm.weight",
}
_COMPARED_ELEMENTS = 4 * 2**20


def is_computed(name: str) -> bool:
    """Return whether a tensor follows from the configuration (rotary frequencies): never read."""
    return name.rpartition(".")[2] in ("inv_freq", "original_inv_freq")


def plain_name(name: str) -> str:
    """Return a tensor's name without wrappers; the same for all names of one tensor."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    short = ".".join(itertools.dropwhile(lambda part: part in _HOLDERS, parts))
    return _SYNONYMS.get(short, short)


def resolve_aliases(
    tensors: Mapping[str, StoredTensor], names: Iterable[str]
) -> dict[str, StoredTensor]:
    """Give tensors that are stored under other names those of `names`; unknown ones keep theirs.

    Two names of one tensor whose values differ are a `CheckpointError`.
    """
    known = {plain_name(name): name for name in names}
    stored_as: dict[str, str] = {}
    result: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        target = known.get(plain_name(name), name)
        first = stored_as.setdefault(target, name)
        if first != name and not same_numbers(result[target], tensor):
            forms = (f"{x.dtype.name} {x.shape} in {x.file.name}" for x in (result[target], tensor))
            raise CheckpointError(
                f"{first[:200]} and {name[:200]} are two names of one tensor, and their values "
                "differ.",
                f"They are {' and '.join(forms)}; only one of them can be right.",
                f"Save the weights again with only the trained one, named {target}.",
            )
        if first == name or name == target:
            result[target] = tensor
    return result


def same_numbers(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors hold the same numbers, read a few megabytes at a time."""
    if one == other:  # the same place in the same file, as torch.save stores a shared tensor
        return True
    if one.shape != other.shape:
        return False
    arrays = [np.atleast_1d(tensor.read()) for tensor in (one, other)]
    step = max(_COMPARED_ELEMENTS * len(arrays[0]) // max(one.elements, 1), 1)
    return all(
        np.array_equal(
            *(array[at : at + step].astype(np.float64) for array in arrays),  # exact
            equal_nan=True,
        )
        for at in range(0, len(arrays[0]), step)
    )
