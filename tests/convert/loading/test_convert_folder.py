"""Folders that cannot be opened, each refused by file and reason."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert import load_checkpoint
from convert.loading.folder import open_folder
from glm2_jax import CheckpointError
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
INDEX = "pytorch_model.bin.index.json"
OUTSIDE = (
    "../outside.bin", "/etc/passwd", "..\\x.bin", "C:x.bin", "..", "x.txt", ".x.bin", "a\0.bin",
    "a\n.bin", "\udc80.bin", "a" * 252 + ".bin", "模" * 84 + ".bin",
)  # fmt: skip


def refusal(folder):
    """The message, which says what, why, and what to do."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert caught.value.exit_code == 4
    assert all((caught.value.what, caught.value.why, caught.value.fix))
    return str(caught.value)


def shard(folder, number, kind="bin"):
    stem = "pytorch_model" if kind == "bin" else "model"
    return folder / f"{stem}-{number:05d}-of-00002.{kind}"


def test_what_is_no_folder(tmp_path, monkeypatch):
    message = refusal(tmp_path / "some" / "nowhere")
    assert "directory not found: " in message and f"nowhere ({tmp_path} exists)." in message
    assert "File name too long" in refusal("a" * 300)
    folder = write_official(tmp_path, shards=1)
    monkeypatch.chdir(folder)
    for given in (folder / "pytorch_model.bin", "pytorch_model.bin"):
        message = refusal(given)
        assert "is a file" in message and f"for example {folder}." in message


def test_files_that_are_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "It is empty" in refusal(tmp_path / "empty")
    for name in ("config.json", "tokenizer.model"):
        folder = write_official(tmp_path / name)
        (folder / name).unlink()
        assert f"{folder} holds no {name}" in refusal(folder)
    save(tmp_path / "own")
    (tmp_path / "own" / "manifest.json").unlink()
    assert "own holds no manifest.json" in refusal(tmp_path / "own")


def test_a_broken_configuration(tmp_path):
    path = write_official(tmp_path) / "config.json"
    for text, reason in (
        ("[]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a":' * 50_000, "cannot be parsed"),
        ("\xff", "cannot be parsed"),
    ):
        path.write_text(text, encoding="latin-1")
        message = refusal(tmp_path)
        assert reason in message and str(path) in message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": "glm"}, "HF-native"),
        ({"rmsnorm": False}, "rmsnorm"),
        ({"quantization_bit": "4"}, "quantization_bit = '4'"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
    ],
)
def test_the_configuration_of_another_model(tmp_path, changes, reason):
    assert reason in refusal(write_official(tmp_path, raw=changes))


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_shards_that_are_missing_swapped_or_truncated(tmp_path, kind):
    folder = write_official(tmp_path, kind=kind)
    first, second, aside = shard(folder, 1, kind), shard(folder, 2, kind), tmp_path / "x"
    first.rename(aside)
    message = refusal(folder)
    assert "lacks 1 of 2 shards" in message and first.name in message
    second.rename(first)
    aside.rename(second)
    message = refusal(folder)
    assert f"is not in {first.name}" in message and f"It is in {second.name}" in message
    os.truncate(second, second.stat().st_size - 1000)
    message = refusal(folder)
    assert str(second) in message and "truncated" in message
    shutil.copy(first, second)
    assert f"which is in {first.name}, too" in refusal(folder)
    second.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "git lfs pull" in refusal(folder)


def test_an_index_that_names_files_outside_or_none(tmp_path):
    path = write_official(tmp_path / "model") / INDEX
    write_weights(tmp_path, TENSORS, shards=1)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "outside.bin")
    for weight_map, reason in (
        *((dict.fromkeys(TENSORS, name), f"{INDEX} names the file") for name in OUTSIDE),
        ({"a": 1, "b": ["x"]}, f"{INDEX} names the file"),
        (None, "has no weight_map"),
        ({}, "has no weight_map"),
        (["x"], "has no weight_map"),
    ):
        edit_json(path, weight_map=weight_map)
        assert reason in refusal(path.parent)


def test_links_as_in_a_hub_cache(tmp_path):
    folder, snapshot = write_official(tmp_path / "blobs"), tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert load_checkpoint(snapshot).config == TINY
    shard(folder, 2).unlink()
    assert "symbolic link to a file that does not exist" in refusal(snapshot)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "pytorch_model.bin"])
def test_files_that_cannot_be_read(tmp_path, monkeypatch, name):
    """Pipes, devices, folders; missing permissions are simulated, because root may read all."""
    path = write_official(tmp_path, shards=1) / name
    data, opened = path.read_bytes(), Path.open
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        path.unlink()
        make(path)
        message = refusal(tmp_path)
        assert name in message and "not a plain file" in message
    path.rmdir()
    path.write_bytes(data)

    def refuse(path, *args, **kwargs):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    message = refusal(tmp_path)
    assert f"{path} cannot be read" in message and "Permission denied" in message


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


def test_all_problems_at_once_and_many_in_few_lines(tmp_path):
    changed = dict(TENSORS)
    del changed["transformer.output_layer.weight"]
    changed[EMBEDDING] = changed[EMBEDDING][:-1]
    changed["transformer.encoder.final_layernorm.weight"] = np.ones(32, np.int64)
    changed["transformer.something.weight"] = np.ones(3, np.float16)
    message = refusal(write_official(tmp_path, tensors=changed))
    for line in (
        "4 problems",
        "missing: transformer.output_layer.weight",
        f"wrong shape: {EMBEDDING} is (639, 32) instead of (640, 32)",
        "wrong type: transformer.encoder.final_layernorm.weight is int64",
        "unexpected: transformer.something.weight",
    ):
        assert line in message
    message = refusal(write_official(tmp_path, tensors={EMBEDDING: TENSORS[EMBEDDING]}))
    assert "16 problems" in message and "missing: ... and 13 more" in message
    extra = {f"x{i}": np.ones(1, np.float16) for i in range(30)}
    message = refusal(write_official(tmp_path, tensors=TENSORS | extra))
    assert "30 problems" in message and "unexpected: ... and 27 more" in message
    assert len(message.splitlines()) == 6
