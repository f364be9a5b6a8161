"""Tensors under other names: read where they are the same, refused by name where they differ."""

import shutil

import numpy as np
import pytest

from convert import export_folder, open_folder
from convert.files.shards import open_weights
from convert.layouts.names import SCALE
from glm2_jax import CheckpointError
from tests.support.checkpoints import (
    TINY,
    official_tensors,
    random_params,
    write_official,
    write_quantized,
    write_weights,
)

TENSORS = official_tensors(TINY, random_params(TINY))
HEAD, EMBED = "transformer.output_layer.weight", "transformer.embedding.word_embeddings.weight"
NORM = "transformer.encoder.final_layernorm.weight"

# What is replaced in the names, by what; "^" stands for the start of a name.
WRAPPED = {
    "DataParallel": ("^", "module."),
    "compiled, parallel": ("^", "_orig_mod.module."),
    "DeepSpeed": ("^", "_forward_module.module."),
    "merged PEFT": ("^", "base_model.model."),
    "TRL": ("^", "pretrained_model."),
    "the inner model": ("^transformer.", ""),
    "FSDP": ("layers.0.", "layers.0._fsdp_wrapped_module."),
    "recomputed": ("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "PEFT without its adapter": ("query_key_value.", "query_key_value.base_layer."),
}


def renamed(tensors, wrapper):
    old, new = WRAPPED[wrapper]
    return {f"^{name}".replace(old, new, 1).removeprefix("^"): x for name, x in tensors.items()}


def write(folder, tensors, source, kind="bin", shards=2):
    """Other weights in a copy of a folder."""
    weights = shutil.ignore_patterns("model-*", "model.*", "pytorch_model*")
    shutil.copytree(source, folder, ignore=weights)
    write_weights(folder, tensors, kind=kind, shards=shards)
    return folder


def assert_same_model(first, second):
    before, after = (
        {(match.rule, match.layer): match for match in open_folder(folder).matches}
        for folder in (first, second)
    )
    assert before.keys() == after.keys()
    for key, match in before.items():
        np.testing.assert_array_equal(match.tensor.read(), after[key].tensor.read())
        if match.scale is not None:
            np.testing.assert_array_equal(match.scale.read(), after[key].scale.read())


def stored(folder):
    return {name: tensor.read() for name, tensor in open_weights(folder).tensors.items()}


def test_wrapped_names(tmp_path):
    """Of the official, the quantized and the HF-native layout."""
    source = write_official(tmp_path / "source", tensors=TENSORS)
    packed = write_quantized(tmp_path / "packed", 4)
    export_folder(open_folder(source), tmp_path / "glm", layout="glm")
    for number, wrapper in enumerate(WRAPPED):
        tensors = renamed(TENSORS, wrapper)
        assert tensors.keys() != TENSORS.keys()
        assert_same_model(source, write(tmp_path / f"{number}", tensors, source))
    for wrapper in ("PEFT without its adapter", "the inner model"):
        tensors = renamed(stored(packed), wrapper)
        assert any(name.endswith(SCALE) for name in tensors)
        assert_same_model(packed, write(tmp_path / wrapper, tensors, packed))
    tensors = renamed(stored(tmp_path / "glm"), "FSDP")
    tensors["transformer.output_layer.weight"] = tensors.pop("lm_head.weight")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tensors["model.rotary_emb.original_inv_freq"] = np.ones(2, np.float32)
    folder = write(tmp_path / "other", tensors, tmp_path / "glm", "safetensors")
    assert_same_model(tmp_path / "glm", folder)


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        (HEAD, "transformer.output_layer.0.weight"),
        (HEAD, "base_model.model.lm_head.weight"),
        (EMBED, "model.embed_tokens.weight"),
        (NORM, "transformer.final_layernorm.weight"),
    ],
)
def test_a_second_name(tmp_path, name, alias):
    """Alone, with the same numbers, in another float type, and with other numbers."""
    source = write_official(tmp_path / "source", tensors=TENSORS)
    first, wider = {alias: TENSORS[name]}, {alias: TENSORS[name].astype(np.float32)}
    alone = {key: array for key, array in TENSORS.items() if key != name} | first
    for number, tensors in enumerate((alone, TENSORS | first, first | TENSORS, TENSORS | wider)):
        shards = 1 + number % 2
        assert_same_model(source, write(tmp_path / f"same{number}", tensors, source, shards=shards))
    changed = TENSORS[name].copy()
    changed.reshape(-1)[-1] += 1
    for number, value in enumerate((changed, changed[:-1], changed.astype(np.float32))):
        folder = write(tmp_path / f"other{number}", TENSORS | {alias: value}, source)
        with pytest.raises(CheckpointError, match="two names of one tensor") as caught:
            open_folder(folder)
        assert name in str(caught.value) and alias in str(caught.value)


def test_values_are_compared_to_the_last_piece(tmp_path, monkeypatch):
    """NaN is the same as NaN."""
    monkeypatch.setattr("convert.files.aliases._COMPARED_ELEMENTS", 100)
    source = write_official(tmp_path / "source", tensors=TENSORS)
    head = TENSORS[HEAD].copy()
    head[0, 0] = np.nan
    both = TENSORS | {HEAD: head, "lm_head.weight": head}
    assert len(open_folder(write(tmp_path / "same", both, source)).matches) == 17
    changed = head.copy()
    changed[-1, -1] += 1
    with pytest.raises(CheckpointError, match="their values differ"):
        open_folder(write(tmp_path / "other", both | {"lm_head.weight": changed}, source))
    student = {f"student.{name}": array for name, array in TENSORS.items()}  # not an alias
    with pytest.raises(CheckpointError, match=r"unexpected: student\.transformer"):
        open_folder(write(tmp_path / "student", student, source))
