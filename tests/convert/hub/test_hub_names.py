"""What counts as a name on a hub, and which files of a repository are needed."""

import sys

import pytest

from convert.hub.find import find_model, needed_files
from glm2_jax import CheckpointError, UsageError
from glm2_jax.choices import SOURCES

NAME = "someone/tiny"


def fails(error, *arguments, **keywords):
    with pytest.raises(error) as caught:
        find_model(*arguments, **keywords)
    return str(caught.value)


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "a/b/c", "../a", "a/..", "", "a/b\n", "a/" + "b" * 5000):
        assert "OWNER/NAME" in fails(UsageError, name, source="hf")
    for name in ("a/my--model", "a/v1..2", "a/b.git", "a/" + "b" * 120):  # of no model
        assert f"Folder {name} not found" in fails(CheckpointError, name)
    (tmp_path / "someone" / "tiny").mkdir(parents=True)
    assert str(find_model(NAME)) == NAME
    assert str(find_model("no/such/folder")) == "no/such/folder"  # whoever opens it says so
    assert "is a path" in fails(UsageError, NAME, revision="main")
    assert "Known: hf, modelscope" in fails(UsageError, NAME, source="elsewhere")
    monkeypatch.setattr("convert.hub.find.open_clients", None)
    for source in (None, *SOURCES):
        reason = fails(CheckpointError, "thudm/chatglm-6b-int4", source=source)
        assert "first generation" in reason
        reason = fails(CheckpointError, "zai-org/glm-4-9b-chat", source=source)
        assert "another tokenizer" in reason
        for revision in ("", "a/../b", "/a", "a b", "-x"):
            assert "is not a revision" in fails(UsageError, "a/b", source=source, revision=revision)


def test_the_client_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for package in ("huggingface_hub", "modelscope_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    for module in ("huggingface", "modelscope"):
        monkeypatch.delitem(sys.modules, f"convert.hub.{module}", raising=False)
    for source in SOURCES:
        assert "the extra hub, or: pip install" in fails(UsageError, NAME, source=source)
    assert "no downloaded model" in fails(CheckpointError, NAME)


def test_the_client_is_broken(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('broken')")
    for module in ("huggingface_hub", "convert.hub.huggingface"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    message = fails(UsageError, NAME, source="hf")
    assert "huggingface_hub, which cannot be imported" in message and "broken" in message


BASE = ["config.json", "tokenizer.model"]
BIN, SAFE = "pytorch_model.bin.index.json", "model.safetensors.index.json"


def test_which_files_are_needed():
    for names, shards, found in (
        (["pytorch_model.bin", "a.py"], [], ["pytorch_model.bin"]),
        ([BIN, "a.bin", "b.bin"], ["a.bin", "b.bin"], [BIN, "a.bin", "b.bin"]),
        ([SAFE, "a.safetensors", "pytorch_model.bin"], ["a.safetensors"], [SAFE, "a.safetensors"]),
        ([SAFE, "model.safetensors"], ["a.safetensors"], ["model.safetensors"]),
        ([SAFE[:-11], "manifest.json"], [], ["manifest.json", SAFE[:-11]]),
    ):  # fmt: skip
        index = {"weight_map": {str(i): name for i, name in enumerate(shards)}}
        assert needed_files([*names, *BASE], lambda name, index=index: index) == BASE + found
    for names, weights, message in (
        (["config.json"], {}, "tokenizer.model not found"),
        (BASE, {}, "No weights found"),
        ([*BASE, BIN], [], "0 of 0 files"),
        # What is fetched is what is read: as in a folder, no other set takes its place.
        ([*BASE, SAFE, "pytorch_model.bin"], {"a": "a.safetensors"}, "1 of 1"),
        ([*BASE, BIN, "a.py"], {"a": "a.py"}, "a.py"),
        ([*BASE, BIN, "x/a.bin"], {"a": "x/a.bin"}, "x/a.bin"),
    ):
        with pytest.raises(CheckpointError, match=message):
            needed_files(names, lambda name, weights=weights: {"weight_map": weights})
