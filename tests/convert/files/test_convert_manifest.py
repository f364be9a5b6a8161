"""The manifest of our own format: what it does not list or cannot mean is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import load_checkpoint, open_folder, verify_checkpoint
from glm2_jax import CheckpointError, UsageError
from tests.support.checkpoints import TINY, edit_json, tiny_config
from tests.support.checkpoints import save as save_own


def save(folder, **kwargs):
    save_own(folder, **kwargs)
    return folder


def refusal(folder):
    """Loading and verifying refuse for the same reason."""
    messages = []
    for action in (load_checkpoint, verify_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            action(folder)
        messages.append(str(caught.value))
    return messages


def test_files_that_the_manifest_does_not_list(tmp_path):
    """One tensor moves into a new file, which a new index names; or nothing is listed."""
    folder = save(tmp_path / "own")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = dict.fromkeys(tensors, "model.safetensors") | {"final_norm": "evil.safetensors"}
    save_file({"final_norm": np.zeros_like(tensors.pop("final_norm"))}, folder / "evil.safetensors")
    save_file(tensors, folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match="does not list: evil.safetensors, model.*index"):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        verify_checkpoint(folder)
    folder = save(tmp_path / "two")  # a second set of weights is left out, one of ours is refused
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert open_folder(folder).weights.left_out == ("pytorch_model.bin",)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"head": "a.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match="does not list: model.safetensors.index.json"):
        load_checkpoint(folder)
    edit_json(save(tmp_path / "none") / "manifest.json", files={})
    for message in refusal(tmp_path / "none"):
        assert "does not list: config.json, tokenizer.model, model.safetensors" in message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "other"}, "not a manifest of this project"),
        ({"format_version": 2}, "another version"),
        ({"files": None}, "damaged"),
        ({"files": {"../x": {"size": 1, "sha256": ""}}}, "not a plain file name"),
        ({"template": "alpaca"}, "template is 'alpaca'"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"rope_kind": "yarn"}, "rope_kind is 'yarn'"),
        ({"format_version": 10**400}, "format_version 1000"),
        ({"files": [["a", 1]]}, "files an object"),
        ({"files": {"a\0": {"size": 1, "sha256": ""}}}, r"'a\x00'"),
        ({"files": {"a": {"size": 1e400, "sha256": ""}}}, "the size or the checksum of 'a'"),
        ({"files": {"a": []}}, "damaged"),
    ],
)
def test_values_that_no_version_writes(tmp_path, changes, reason):
    folder = save(tmp_path / "own")
    edit_json(folder / "manifest.json", **changes)
    for message in refusal(folder):
        assert reason in message and "manifest.json" in message and len(message) < 500


@pytest.mark.parametrize("key", ["quantization", "quantisation"])  # the second: before 0.2
def test_a_quantization_that_the_weights_do_not_have(tmp_path, key):
    folder = save(tmp_path / "own")
    (folder / "tokenizer_config.json").write_text("{")  # not listed, so it is not read
    assert load_checkpoint(folder).config == TINY
    edit_json(folder / "manifest.json", **{key: "int4"})
    with pytest.raises(CheckpointError, match="missing: layers.0.q_scale"):
        load_checkpoint(folder)


def test_an_impossible_template_or_tokenizer(tmp_path):
    folder = save(tmp_path / "own")
    edit_json(folder / "manifest.json", template="chatglm3")
    with pytest.raises(CheckpointError, match="'chatglm3' is not supported for a chatglm2 model"):
        load_checkpoint(folder)
    assert load_checkpoint(folder, template="raw").template == "raw"
    own = load_checkpoint(save(tmp_path / "three", config=tiny_config(family="chatglm3")))
    assert own.template == "chatglm3"
    for template in ("chatglm3", "alpaca"):  # is never written
        with pytest.raises(UsageError, match=f"{template}' is not supported for a chatglm2 model"):
            save(tmp_path / "new", template=template)
    with pytest.raises(CheckpointError, match="tokenizer does not belong"):
        save(tmp_path / "new", config=tiny_config(vocab_size=300))
    assert not (tmp_path / "new").exists()
