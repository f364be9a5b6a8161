"""Paths that are no files, or that cannot be written, are refused by tools and functions."""

from pathlib import Path

import pytest

from convert import from_pytorch, load_checkpoint, open_folder, random
from convert.adapters.adapter import load_adapter
from convert.hub.find import find_model
from convert.writing.destination import check_destination
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.files import real_path
from glm2_jax.errors import CheckpointError, InputError, UsageError
from infer.chat import files
from infer.engine.load import demo_folder
from infer.evaluate import __main__ as evaluate
from infer.explain import __main__ as explain
from infer.generate import __main__ as generate
from tests.support.checkpoints import TINY
from tests.support.commands import exit_code
from train import lora


def test_what_is_not_a_path_is_refused():
    for function in (
        path_argument,
        find_model,
        load_checkpoint,
        open_folder,
        lambda url: load_adapter(url, TINY),
        lambda url: check_destination(url, False),
    ):
        urls = ["gs://bucket/model", "S3://bucket/model", Path("https://host/model")]
        for url in urls[: 2 if function is path_argument else 3]:
            with pytest.raises(UsageError, match="OWNER/NAME with --source") as caught:
                function(url)
            lines = str(caught.value).splitlines()
            assert len(lines) == 3 and str(url) in lines[0] and "file system" in lines[0]
        with pytest.raises(UsageError, match=r"a\\x00b is not a path"):
            function("a\0b")


def test_tools_refuse_it_before_they_begin(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for main, *arguments in (
        (generate.main, "--model", "gs://b/m", "--prompt", "x"),
        (from_pytorch.main, "here", "gs://b/m"),
        (lora.main, "--model", "m", "--data", "d", "--mix-data", "gs://b/m=2", "--output", "o"),
    ):
        assert exit_code(main, *arguments) == 2
        out, error = capsys.readouterr()
        assert (out, len(error.splitlines())) == ("", 3) and error.startswith("error: gs://b/m")
        assert list(tmp_path.iterdir()) == []


def test_what_a_path_may_be():
    for path in ("a/b", "./x:y", "C:/models", "THUDM/chatglm2-6b", "数据/训练.jsonl"):
        assert path_argument(path) == path
    for path in (".", "/"):
        with pytest.raises(CheckpointError):
            random.official_config(path)
    for name in (f"{'n' * 97}/x", "a--b/x", "a/x--y", "a/x.git", "a/x."):  # of no hub
        with pytest.raises(CheckpointError, match="not found, and no downloaded"):
            find_model(name)


def test_links_are_followed_as_far_as_they_lead(tmp_path):
    for name, target in {"loop": "loop", "a": "b", "b": "a", "new": "missing"}.items():
        (tmp_path / name).symlink_to(target)
    assert real_path(tmp_path / "new") == tmp_path / "missing"
    for opened in (real_path, lambda path: files.save(path, None)):  # type: ignore[arg-type]
        for name in ("loop", "a"):
            with pytest.raises(InputError, match="a symbolic link that points to itself"):
                opened(str(tmp_path / name))


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("folder").mkdir()
    Path("file").write_text("x")
    Path("lines.jsonl").write_text('{"prompt": "hi", "instruction": "hi", "output": "ho"}\n')
    before = sorted(tmp_path.rglob("*"))
    paths = ["loop", "loop/x", "n" * 300, "file/x", "\0", "/", "folder/", "missing/x/y"]
    for main, *arguments in (
        (explain.main, "--length", 3, "--html"),
        (generate.main, "--batch-file", "lines.jsonl", "--max-new-tokens", 1, "--output"),
        (evaluate.main, "--data", "lines.jsonl", "--task", "generation", "--predictions"),
        (from_pytorch.main, demo_folder()),
    ):
        # The last one fills an empty folder and makes a new one.
        for path in paths[: 6 if main is from_pytorch.main else 8]:
            assert exit_code(main, *arguments, path) in (2, 3)
            error = capsys.readouterr().err
            assert "error: " in error and "Traceback" not in error
            assert sorted(tmp_path.rglob("*")) == before and Path("loop").is_symlink()
