"""Folders of every family through our own format and back; those of ChatGLM-6B with every tensor
that the published ones have, in its type."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import load_checkpoint
from convert.loading.folder import open_folder
from convert.random import random_entries
from convert.writing.pytorch import export_folder
from glm2_jax import PRESETS
from tests.support.checkpoints import convert_folder
from tests.support.family_folders import FAMILIES, random_folder
from tests.support.shared_data import shared_path
from tests.support.sp_model import chatglm_model


def tensors_of(folder) -> dict[str, np.ndarray]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def check(tensors, weights: str) -> None:
    """Norms are float32 and frequencies float16, whatever the weights are."""
    for name, value in tensors.items():
        own = {"layernorm": "float32", "inv_freq": "float16"}
        wanted = next((own[part] for part in own if part in name), weights)
        assert value.dtype == wanted, name
    embed, head = tensors["transformer.word_embeddings.weight"], tensors["lm_head.weight"]
    np.testing.assert_array_equal(embed, head)
    for layer in range(2):
        found = tensors[f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"]
        np.testing.assert_array_equal(found, np.array([1, 10000**-0.5], np.float16))


@pytest.mark.parametrize("family", FAMILIES)
def test_through_our_own_format_and_back(tmp_path, family):
    folder = random_folder(family, tmp_path)
    source = open_folder(folder)
    convert_folder(source, tmp_path / "own")
    own = open_folder(tmp_path / "own")
    layout = "glm" if family == "glm4-0414" else "chatglm"
    export_folder(own, tmp_path / "back", layout=layout)
    back = open_folder(tmp_path / "back")
    assert source.config == own.config == back.config
    assert source.tokenizer.special == own.tokenizer.special == back.tokenizer.special
    written = tensors_of(tmp_path / "back")
    for name, value in tensors_of(folder).items():
        np.testing.assert_array_equal(written.pop(name), value)
    assert not written


def test_a_random_folder_of_chatglm_6b(tmp_path):
    folder = random_folder("chatglm", tmp_path)
    tensors = tensors_of(folder)
    assert len(tensors) == 13 * 2 + 4
    check(tensors, "float16")
    loaded = load_checkpoint(folder, dtype="float32")
    assert loaded.config.block.tied_head and "head" not in loaded.params
    assert loaded.summary.stored_dtype == "float16"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_export_of_chatglm_6b(tmp_path, dtype):
    folder = random_folder("chatglm", tmp_path)
    export_folder(open_folder(folder), tmp_path / "new", layout="chatglm", dtype=dtype)
    check(tensors_of(tmp_path / "new"), dtype)
    assert (tmp_path / "new" / "ice_text.model").read_bytes() == chatglm_model()


def test_the_names_are_the_published_ones():
    index = json.loads(shared_path("glm-family/configs/chatglm-6b.index.json").read_text())
    entries = random_entries(PRESETS["chatglm-6b"], "float16", 0)
    assert {entry.name for entry in entries} == index["weight_map"].keys()
    assert len(entries) == 368
    with np.load(shared_path("glm-family/chatglm6b_rope_tables.npz")) as tables:
        np.testing.assert_array_equal(next(entries[1].chunks()), tables["inv_freq_float16"])
    base = random_entries(PRESETS["glm-large-chinese"], "float16", 0)
    assert not any("inv_freq" in entry.name or "lm_head" in entry.name for entry in base)
