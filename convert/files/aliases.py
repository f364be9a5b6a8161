"""Other names of published tensors: what wrappers and trainers make of them."""

import itertools
from collections.abc import Iterable, Mapping

import numpy as np

from convert.files.tensor import StoredTensor
from glm2_jax.errors import CheckpointError

# Parts of a name that wrappers of a model add: DataParallel and DDP, torch.compile, DeepSpeed,
# FSDP, activation checkpoints, PEFT. They may stand anywhere.
_WRAPPERS = frozenset({
    "module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_fpw_module",
    "_checkpoint_wrapped_module", "base_layer",
})  # fmt: skip
# The same at the beginning alone: attributes that hold the model, or its inner one.
_HOLDERS = frozenset({"base_model", "pretrained_model", "model", "transformer"})
# The layouts' own names and those that public training scripts give, without what holds them. A
# head that is "cast to float" is a Sequential of one.
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
    """Whether a tensor follows from the configuration (the rotary frequencies): never read."""
    return name.rpartition(".")[2] in ("inv_freq", "original_inv_freq")


def plain_name(name: str) -> str:
    """A tensor's name without wrappers; the same for all names of one tensor."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    short = ".".join(itertools.dropwhile(lambda part: part in _HOLDERS, parts))
    return _SYNONYMS.get(short, short)


def resolve_aliases(
    tensors: Mapping[str, StoredTensor], names: Iterable[str]
) -> dict[str, StoredTensor]:
    """Gives tensors that are stored under other names those of `names`; unknown ones keep theirs.

    Args:
        tensors: what a folder holds.
        names: of the layout.

    Raises:
        CheckpointError: two names of one tensor whose values differ.
    """
    known = {plain_name(name): name for name in names}
    stored_as: dict[str, str] = {}
    result: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        target = known.get(plain_name(name), name)
        first = stored_as.setdefault(target, name)
        if first != name and not _same(result[target], tensor):
            raise CheckpointError(
                f"{first[:200]} and {name[:200]} are two names of one tensor, and their values "
                "differ.",
                f"They are {_form(result[target])} and {_form(tensor)}; which of them the model "
                "is to use is not known.",
                f"Save the weights again with one of them, the trained one, as {target}.",
            )
        if first == name or name == target:
            result[target] = tensor
    return result


def _form(tensor: StoredTensor) -> str:
    return f"{tensor.dtype.name} {tensor.shape} in {tensor.file.name}"


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers, read a few megabytes at a time."""
    if one == other:  # the same place in the same file, as torch.save stores a shared tensor
        return True
    if one.shape != other.shape:
        return False
    if not one.shape:
        return np.array_equal(one.read(), other.read(), equal_nan=True)
    step = max(_COMPARED_ELEMENTS * one.shape[0] // max(one.elements, 1), 1)
    arrays = one.read(), other.read()
    return all(
        np.array_equal(*(_numbers(array[at : at + step]) for array in arrays), equal_nan=True)
        for at in range(0, one.shape[0], step)
    )


def _numbers(block: np.ndarray) -> np.ndarray:
    """In a type that holds every stored number exactly."""
    return block.astype(np.float64)
