"""Folders of ChatGLM-6B are written with every tensor that the published one has, in its type."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import load_checkpoint
from convert.loading.folder import open_folder
from convert.random import official_config, random_entries, write_random
from convert.writing.pytorch import export_folder
from glm2_jax import PRESETS, Tokenizer
from tests.support.shared_data import shared_file, shared_path
from tests.support.sp_model import chatglm_model

SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 4}
SIZES |= {"num_kv_heads": 4, "head_dim": 8, "vocab_size": 640}


@pytest.fixture
def chatglm(tmp_path):
    """A random folder, and its tensors."""
    tokenizer = Tokenizer.from_bytes(chatglm_model(), "chatglm")
    ids = {f"{name}_token_id": tokenizer.special[f"[{kind}]"] for name, kind in MASKS.items()}
    ids |= {"sop_token_id": tokenizer.special["<sop>"], "eos_token_id": tokenizer.eos_id}
    config = dataclasses.replace(PRESETS["chatglm-6b"], **SIZES, **ids)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    (tmp_path / "ice_text.model").write_bytes(chatglm_model())
    raw = official_config(str(tmp_path / "config.json"))
    write_random(tmp_path / "random", raw, tmp_path)
    return tmp_path / "random", tensors_of(tmp_path / "random")


MASKS = {"mask": "MASK", "gmask": "gMASK"}


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
        np.testing.assert_array_equal(found, np.float16([1, 10000**-0.5]))


def test_a_random_folder(chatglm):
    folder, tensors = chatglm
    assert len(tensors) == 13 * 2 + 4
    check(tensors, "float16")
    loaded = load_checkpoint(folder, dtype="float32")
    assert loaded.config.block.tied_head and "head" not in loaded.params
    assert loaded.summary.stored_dtype == "float16"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_export_is_the_folder_again(chatglm, tmp_path, dtype):
    folder, tensors = chatglm
    source = open_folder(folder)
    export_folder(source, tmp_path / "own", layout="chatglm", dtype=dtype)
    written = tensors_of(tmp_path / "own")
    check(written, dtype)
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value)
    assert open_folder(tmp_path / "own").config == source.config


def test_the_names_are_the_published_ones():
    index = json.loads(shared_file("glm-family/configs/chatglm-6b.index.json"))
    entries = random_entries(PRESETS["chatglm-6b"], "float16", 0)
    assert {entry.name for entry in entries} == index["weight_map"].keys()
    assert len(entries) == 368
    tables = np.load(shared_path("glm-family/chatglm6b_rope_tables.npz"))
    (values,) = entries[1].chunks()
    np.testing.assert_array_equal(values, tables["inv_freq_float16"])
    base = random_entries(
        dataclasses.replace(PRESETS["glm-large-chinese"], num_layers=1), "float16", 0
    )
    assert not any("inv_freq" in entry.name or "lm_head" in entry.name for entry in base)
