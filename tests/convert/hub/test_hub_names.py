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


@pytest.mark.parametrize(
    "name", ["tiny", "a/b/c", "../a", "a/..", "https://a.b/c", "", "a/b\n", "a/" + "b" * 5000]
)
def test_what_is_not_a_name(name):
    assert "OWNER/NAME" in fails(UsageError, name, source="hf")


@pytest.mark.parametrize("name", ["a/my--model", "a/v1..2", "a/b.git", "a/" + "b" * 120])
def test_a_path_that_no_model_can_have_as_its_name_is_not_found(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert f"Folder {name} not found" in fails(CheckpointError, name)


def test_paths_stay_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "tiny").mkdir(parents=True)
    assert str(find_model(NAME)) == NAME
    assert str(find_model("no/such/folder")) == "no/such/folder"  # whoever opens it says so
    assert "is a path" in fails(UsageError, NAME, revision="main")
    assert "Known: hf, modelscope" in fails(UsageError, NAME, source="elsewhere")


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


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("thudm/chatglm-6b-int4", "first generation"),
        ("zai-org/glm-4-9b-chat", "another tokenizer"),
    ],
)
def test_names_that_are_known_not_to_work(monkeypatch, name, reason):
    monkeypatch.setattr("convert.hub.find.open_clients", None)
    for source in (None, *SOURCES):
        assert reason in fails(CheckpointError, name, source=source)


@pytest.mark.parametrize("revision", ["", "a/../b", "/a", "a b", "-x"])
def test_what_is_not_a_revision(monkeypatch, revision):
    monkeypatch.setattr("convert.hub.find.open_clients", None)
    for source in (None, *SOURCES):
        assert "is not a revision" in fails(UsageError, NAME, source=source, revision=revision)


BASE = ["config.json", "tokenizer.model"]
BIN, SAFE = "pytorch_model.bin.index.json", "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("names", "shards", "found"),
    [
        (["pytorch_model.bin", "a.py"], [], ["pytorch_model.bin"]),
        (["pytorch_model.bin", "model.safetensors"], [], ["model.safetensors"]),
        ([BIN, "a.bin", "b.bin"], ["a.bin", "b.bin"], [BIN, "a.bin", "b.bin"]),
        ([SAFE, "a.safetensors", "pytorch_model.bin"], ["a.safetensors"], [SAFE, "a.safetensors"]),
        ([SAFE, "model.safetensors"], ["a.safetensors"], ["model.safetensors"]),
        ([BIN, "a.bin", "pytorch_model.bin"], ["a.bin"], ["pytorch_model.bin"]),
        (
            ["tokenizer_config.json", "manifest.json", "model.safetensors", "optimizer.bin"],
            [],
            ["tokenizer_config.json", "manifest.json", "model.safetensors"],
        ),
    ],
)
def test_which_files_are_needed(names, shards, found):
    index = {"weight_map": {str(i): name for i, name in enumerate(shards)}}
    assert needed_files([*names, *BASE], lambda name: index) == BASE + found


@pytest.mark.parametrize(
    ("names", "index", "message"),
    [
        (["config.json"], {}, "tokenizer.model not found"),
        (BASE, {}, "No weights found"),
        ([*BASE, BIN], {"weight_map": {"a": "a.bin"}}, "1 of 1 files"),
        ([*BASE, BIN], {"weight_map": []}, "0 of 0 files"),
        # What is fetched is what is read: as in a folder, no other set takes its place.
        ([*BASE, SAFE, "pytorch_model.bin"], {"weight_map": {"a": "a.safetensors"}}, "1 of 1"),
        ([*BASE, BIN, "a.py"], {"weight_map": {"a": "a.py"}}, "a.py"),
        ([*BASE, BIN, "x/a.bin"], {"weight_map": {"a": "x/a.bin"}}, "x/a.bin"),
    ],
)
def test_repositories_that_cannot_be_opened(names, index, message):
    with pytest.raises(CheckpointError, match=message):
        needed_files(names, lambda name: index)
