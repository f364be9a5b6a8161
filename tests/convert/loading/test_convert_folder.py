"""Folders that cannot be opened, each refused by file and reason."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert import load_checkpoint
from convert.loading.folder import open_folder
from glm2_jax import CheckpointError, UsageError
from tests.support.checkpoints import (
    TINY,
    edit_json,
    official_tensors,
    random_params,
    save,
    tiny_config,
    write_official,
    write_weights,
)

TENSORS = official_tensors(TINY, random_params(TINY))
EMBEDDING = "transformer.embedding.word_embeddings.weight"


def refusal(folder, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, **kwargs)
    assert caught.value.exit_code == 4
    return str(caught.value)


def three_lines(folder):
    """The message, which says what, why, and what to do."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert all((caught.value.what, caught.value.why, caught.value.fix))
    return str(caught.value)


def shard(folder, number, of=2, kind="bin"):
    stem = "pytorch_model" if kind == "bin" else "model"
    return folder / f"{stem}-{number:05d}-of-{of:05d}.{kind}"


def test_missing_folder(tmp_path):
    message = three_lines(tmp_path / "some" / "nowhere")
    assert "directory not found: " in message
    assert f"nowhere ({tmp_path} exists)." in message


def test_a_file_instead_of_a_folder(tmp_path, monkeypatch):
    folder = write_official(tmp_path, shards=1)
    message = refusal(folder / "pytorch_model.bin")
    assert "is a file" in message and f"for example {folder}" in message
    monkeypatch.chdir(folder)
    assert f"for example {folder}." in three_lines("pytorch_model.bin")


def test_files_that_are_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "It is empty" in refusal(tmp_path / "empty")
    for name in ("config.json", "tokenizer.model"):
        folder = write_official(tmp_path / name)
        (folder / name).unlink()
        assert f"{folder} holds no {name}" in refusal(folder)
    folder = write_official(tmp_path / "ckpt", shards=1)
    (folder / "pytorch_model.bin").rename(folder / "model.ckpt")
    message = refusal(folder)
    assert "holds no weights" in message and "model.ckpt" in message
    assert "rename it to pytorch_model.bin" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be parsed"),
        ("[]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a":' * 50_000, "cannot be parsed"),
        ("\xff", "cannot be parsed"),
    ],
)
def test_a_broken_configuration(tmp_path, text, reason):
    folder = write_official(tmp_path)
    (folder / "config.json").write_text(text, encoding="latin-1")
    message = three_lines(folder)
    assert reason in message and "config.json" in message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": "glm"}, "HF-native"),
        ({"_name_or_path": "THUDM/glm-4-9b-chat"}, "GLM-4 is not supported"),
        ({"rmsnorm": False}, "rmsnorm"),
        ({"quantization_bit": 3}, "quantization_bit = 3"),
        ({"quantization_bit": "4"}, "quantization_bit = '4'"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
    ],
)
def test_the_configuration_of_another_model(tmp_path, changes, reason):
    assert reason in refusal(write_official(tmp_path, raw=changes))


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_shards_that_are_missing_swapped_or_truncated(tmp_path, kind):
    folder = write_official(tmp_path, kind=kind)
    first, second, aside = shard(folder, 1, kind=kind), shard(folder, 2, kind=kind), tmp_path / "x"
    first.rename(aside)
    message = refusal(folder)
    assert "lacks 1 of 2 shards" in message and first.name in message
    second.rename(first)
    aside.rename(second)
    message = refusal(folder)
    assert f"is not in {first.name}" in message and f"It is in {second.name}" in message
    assert "swapped" in message
    os.truncate(second, second.stat().st_size - 1000)
    message = refusal(folder)
    assert str(second) in message and "truncated" in message


def test_shards_and_tensors_that_appear_twice(tmp_path):
    folder = write_official(tmp_path)
    second = shard(folder, 2).read_bytes()
    shutil.copy(shard(folder, 1), shard(folder, 2))
    assert "must appear once" in refusal(folder)
    shard(folder, 2).write_bytes(second)
    index = (folder / "pytorch_model.bin.index.json").read_bytes()
    write_weights(folder, TENSORS, shards=1)
    (folder / "pytorch_model.bin").rename(shard(folder, 2))
    (folder / "pytorch_model.bin.index.json").write_bytes(index)
    assert f"is in {shard(folder, 1).name} and in {shard(folder, 2).name}" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    ["../outside.bin", "/etc/passwd", "..\\x.bin", "C:x.bin", "..", "x.txt", ".x.bin"]
    + ["a\0.bin", "a\n.bin", "\udc80.bin", "a" * 252 + ".bin", "模" * 84 + ".bin"],
)
def test_an_index_that_names_a_file_outside(tmp_path, name):
    folder = write_official(tmp_path / "model")
    write_weights(tmp_path, TENSORS, shards=1)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "outside.bin")
    edit_json(folder / "pytorch_model.bin.index.json", weight_map=dict.fromkeys(TENSORS, name))
    message = refusal(folder)
    assert "pytorch_model.bin.index.json names the file" in message


def test_an_index_without_a_map_of_names(tmp_path):
    folder = write_official(tmp_path)
    for weight_map in (None, {}, [], "x"):
        edit_json(folder / "pytorch_model.bin.index.json", weight_map=weight_map)
        assert "has no weight_map" in refusal(folder)
    edit_json(folder / "pytorch_model.bin.index.json", weight_map={"a": 1, "b": ["x"]})
    assert "names the file" in refusal(folder)


def test_links_as_in_a_hub_cache(tmp_path):
    folder = write_official(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert load_checkpoint(snapshot).config == TINY
    shard(folder, 2).unlink()
    message = refusal(snapshot)
    assert "symbolic link to a file that does not exist" in message


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.model", "pytorch_model-00001-of-00002.bin"]
)
def test_pipes_folders_and_devices_are_not_read(tmp_path, name):
    path = write_official(tmp_path) / name
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        path.unlink()
        make(path)
        assert name in three_lines(tmp_path) and "not a plain file" in three_lines(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "pytorch_model.bin"])
def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, name):
    """Simulated, because root may read everything."""
    opened = Path.open

    def refuse(path, *args, **kwargs):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    write_official(tmp_path, shards=1)
    monkeypatch.setattr(Path, "open", refuse)
    message = refusal(tmp_path)
    assert f"{tmp_path / name} cannot be read" in message and "Permission denied" in message


def test_a_folder_whose_name_is_too_long():
    assert "File name too long" in refusal("a" * 300)


def test_a_file_that_was_cut_while_it_was_read(tmp_path):
    folder = open_folder(write_official(tmp_path, shards=1))
    os.truncate(tmp_path / "pytorch_model.bin", 100)
    with pytest.raises(CheckpointError, match="pytorch_model.bin was truncated"):
        folder.matches[-1].tensor.read()


def test_a_tokenizer_that_is_broken_or_of_another_model(tmp_path):
    assert "tokenizer.model" in refusal(write_official(tmp_path, tokenizer=b"nonsense"))
    write_official(tmp_path, tiny_config(vocab_size=300))
    message = refusal(tmp_path)
    assert "tokenizer does not belong to this model" in message and "the model has 300" in message


def test_int4_rows_of_an_odd_length(tmp_path):
    config = tiny_config(hidden_size=33)
    tensors = official_tensors(config, random_params(config))
    tensors |= {f"{name}_scale": np.ones(1, np.float16) for name in TENSORS if "layers" in name}
    write_official(tmp_path, config, tensors=tensors, raw={"quantization_bit": 4})
    assert "rows that int4-row cannot pack" in refusal(tmp_path)


def test_a_template_that_the_family_has_not(tmp_path):
    write_official(tmp_path)
    with pytest.raises(UsageError, match="'chatglm3' is not supported for a chatglm2 model"):
        load_checkpoint(tmp_path, template="chatglm3")


def test_a_repository_cloned_without_lfs(tmp_path):
    folder = write_official(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    shard(folder, 1).write_text(pointer)
    assert "git lfs pull" in refusal(folder)


def test_all_problems_at_once(tmp_path):
    changed = dict(TENSORS)
    del changed["transformer.output_layer.weight"]
    changed[EMBEDDING] = changed[EMBEDDING][:-1]
    changed["transformer.encoder.final_layernorm.weight"] = np.ones(32, np.int64)
    changed["transformer.something.weight"] = np.ones(3, np.float16)
    changed["transformer.prefix_encoder.embedding.weight"] = np.ones(3, np.float16)
    layer = "transformer.encoder.layers.0.self_attention.query_key_value"
    changed[f"{layer}.lora_A.weight"] = np.ones(3, np.float16)
    message = refusal(write_official(tmp_path, tensors=changed))
    for line in (
        "6 problems",
        "missing: transformer.output_layer.weight",
        f"wrong shape: {EMBEDDING} is (639, 32) instead of (640, 32)",
        "wrong type: transformer.encoder.final_layernorm.weight is int64",
        "unexpected: transformer.something.weight",
        "a PEFT model that was saved without merging its adapter (1 such tensors)",
    ):
        assert line in message


def test_many_problems_are_abbreviated(tmp_path):
    message = refusal(write_official(tmp_path, tensors={EMBEDDING: TENSORS[EMBEDDING]}))
    assert "16 problems" in message and "missing: ... and 13 more" in message
    extra = {f"x{i}": np.ones(1, np.float16) for i in range(30)}
    message = refusal(write_official(tmp_path, tensors=TENSORS | extra))
    assert "30 problems" in message and "unexpected: ... and 27 more" in message
    assert len(message.splitlines()) == 6


def test_our_own_folder_without_its_manifest(tmp_path):
    save(tmp_path / "own")
    (tmp_path / "own" / "manifest.json").unlink()
    assert "own holds no manifest.json" in refusal(tmp_path / "own")


def test_the_rotary_frequencies_are_dropped(tmp_path):
    without = {name: array for name, array in TENSORS.items() if "inv_freq" not in name}
    assert len(without) == len(TENSORS) - 1
    assert load_checkpoint(write_official(tmp_path, tensors=without)).config == TINY
