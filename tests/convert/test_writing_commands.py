"""What all commands that write a folder or a file have in common."""

import importlib
import json
import shutil
from collections import namedtuple

import pytest

from convert.adapters.adapter import Adapter, save_adapter
from tests.convert.writing.test_to_pytorch import random_lora
from tests.support.checkpoints import names, tiny_config, write_official
from tests.support.commands import exit_code

COMMANDS = {
    "from_pytorch": ["a", "new"],
    "merge_lora": ["a", "lora", "new", "--skip-check"],
    "to_gguf": ["a", "new", "--type", "f16"],
    "to_peft": ["lora", "new", "--layout", "glm", "--base", "a"],
    "to_pytorch": ["a", "new", "--layout", "chatglm", "--adapter", "lora"],
}
READ = ["a", "lora"]


@pytest.fixture(params=COMMANDS)
def command(request, tmp_path, monkeypatch):
    if request.param == "to_gguf":
        pytest.importorskip("gguf", reason="the package gguf is not installed")
    monkeypatch.chdir(tmp_path)
    write_official(tmp_path / "a")
    save_adapter(tmp_path / "lora", Adapter(random_lora()))
    return request.param


def run(command, *flags, to="new"):
    """The exit code of the command."""
    argv = [to if x == "new" else x for x in COMMANDS[command]]
    return exit_code(importlib.import_module(f"convert.{command}").main, *argv, *flags)


def test_a_dry_run_writes_nothing(command, tmp_path, capsys):
    assert run(command, "--dry-run") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["destination"], plan["written"]) == ("new", False)
    assert names(tmp_path) == READ
    assert run(command) == 0
    output = capsys.readouterr()
    assert output.out == "new\n" and names(tmp_path) == [*READ, "new"]
    files = (tmp_path / "new").rglob("*") if command != "to_gguf" else [tmp_path / "new"]
    size = sum(file.stat().st_size for file in files)
    assert plan["bytes"] < size < plan["bytes"] + 60_000  # and headers, vocabulary, small files


def test_nothing_is_replaced(command, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/mine").write_text("kept")
    for flags in ([], ["--dry-run"]):
        assert run(command, *flags) == 2
        assert "exists" in (err := capsys.readouterr().err) or "is a folder" in err
    assert names(tmp_path / "new") == ["mine"] and names(tmp_path) == [*READ, "new"]
    source = COMMANDS[command][0]
    before = names(tmp_path / source)
    assert run(command, to=source) == 2 and names(tmp_path / source) == before


def test_too_little_space_is_known_before(command, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 500, 500))
    for flags in ([], ["--dry-run"]):
        assert run(command, *flags) == 3
        assert "500 are free" in capsys.readouterr().err
    assert names(tmp_path) == READ


def test_an_interruption_leaves_nothing(command, tmp_path, monkeypatch):
    def stop(*arguments):
        assert len(names(tmp_path)) == 3  # the new one under its temporary name
        raise KeyboardInterrupt

    monkeypatch.setattr("convert.files.safetensors_writer.HashingFile.write", stop)
    monkeypatch.setattr("convert.writing.gguf.Tensor.byte_chunks", stop)
    assert run(command) == 130
    assert names(tmp_path) == READ


def test_an_adapter_of_another_base(command, tmp_path, capsys):
    if command == "from_pytorch":
        return
    flags = ["--adapter", "lora"] if command == "to_gguf" else []
    save_adapter(tmp_path / "lora", Adapter(random_lora(), base="0" * 64))
    assert run(command, *flags) == 4
    assert "another base" in capsys.readouterr().err and names(tmp_path) == READ
    assert run(command, *flags, "--force-adapter") == 0
    assert "forced" in capsys.readouterr().err
    save_adapter(tmp_path / "lora", Adapter(random_lora(tiny_config(hidden_size=64))))
    assert run(command, *flags, "--force-adapter") == 4
    assert "does not fit the model" in capsys.readouterr().err


def test_what_is_not_a_model(command, tmp_path, capsys):
    shutil.rmtree(tmp_path / "a")
    assert run(command) == 4
    assert "a" in capsys.readouterr().err and names(tmp_path) == ["lora"]
    shutil.copytree(tmp_path / "lora", tmp_path / "a")
    assert run(command) == 4
    assert "LoRA adapter" in capsys.readouterr().err and names(tmp_path) == READ
