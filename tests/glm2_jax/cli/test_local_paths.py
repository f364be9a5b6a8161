"""Paths of object storage and of the network are refused in three lines, by tools and functions."""

from pathlib import Path

import pytest

from convert import from_pytorch, load_checkpoint, open_folder, random
from convert.adapters.adapter import load_adapter
from convert.hub.find import find_model
from convert.writing.destination import check_destination
from glm2_jax.cli import main as cli
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.files import real_path
from glm2_jax.errors import CheckpointError, InputError, UsageError
from infer.chat import files
from infer.engine.load import demo_folder
from infer.evaluate import __main__ as evaluate
from infer.explain import __main__ as explain
from infer.generate import __main__ as generate
from tests.support.checkpoints import TINY
from train import lora

FUNCTIONS = [
    path_argument,
    find_model,
    load_checkpoint,
    open_folder,
    lambda url: load_adapter(url, TINY),
    lambda url: check_destination(url, False),
]
URLS = ["gs://bucket/model", "S3://bucket/model", "https://host/model", "file:///model", "az://b/c"]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "function",
    FUNCTIONS,
)
def test_a_url_is_refused(url, function):
    for path in (url, Path(url)) if function is not path_argument else (url,):
        with pytest.raises(UsageError) as caught:
            function(path)
        lines = str(caught.value).splitlines()
        assert len(lines) == 3 and str(path) in lines[0] and "file system" in lines[0]


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (generate.main, ["--model", "gs://b/m", "--prompt", "x"]),
        (from_pytorch.main, ["here", "gs://b/m"]),
        (lora.main, ["--model", "m", "--data", "gs://b/m", "--output", "o"]),
        (lora.main, ["--model", "m", "--data", "d", "--mix-data", "gs://b/m=2", "--output", "o"]),
    ],
)
def test_tools_refuse_it_before_they_begin(main, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ending:
        cli.run_main(main, arguments)
    out, error = capsys.readouterr()
    assert (ending.value.code, out, len(error.splitlines())) == (2, "", 3)
    assert error.startswith("error: gs://b/m") and "gcsfuse" in error
    assert list(tmp_path.iterdir()) == []


def test_a_hub_is_named_to_who_pastes_its_address():
    with pytest.raises(UsageError, match="OWNER/NAME with --source"):
        path_argument("https://huggingface.co/THUDM/chatglm2-6b")


@pytest.mark.parametrize(
    "path", ["a/b", "./x:y", "C:/models", "THUDM/chatglm2-6b", "数据/训练.jsonl"]
)
def test_other_paths_are_left_alone(path):
    assert path_argument(path) == path


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_name_that_no_file_can_have(function):
    with pytest.raises(UsageError, match=r"a\\x00b is not a path"):
        function("a\0b")


def test_links_are_followed_as_far_as_they_lead(tmp_path):
    for name, target in {"loop": "loop", "a": "b", "b": "a", "new": "missing"}.items():
        (tmp_path / name).symlink_to(target)
    assert real_path(tmp_path / "new") == tmp_path / "missing"
    for name in ("loop", "a"):
        with pytest.raises(InputError, match="a symbolic link that leads back to itself"):
            real_path(tmp_path / name)
    with pytest.raises(InputError, match="leads back to itself"):
        files.save(str(tmp_path / "loop"), None)  # type: ignore[arg-type]


BATCH = ["--batch-file", "lines.jsonl", "--max-new-tokens", 1, "--output"]
ANSWERS = ["--data", "lines.jsonl", "--task", "generation", "--predictions"]


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (explain.main, ["--length", 3, "--html"]),
        (generate.main, BATCH),
        (evaluate.main, ANSWERS),
        (from_pytorch.main, [demo_folder()]),
    ],
)
@pytest.mark.parametrize(
    "path", ["loop", "loop/x", "n" * 300, "folder/", "file/x", "missing/x/y", "\0", "folder/.", "/"]
)
def test_a_place_that_cannot_be_written(main, arguments, path, tmp_path, monkeypatch, capsys):
    if main is from_pytorch.main and path in ("folder/", "folder/.", "missing/x/y"):
        pytest.skip("an empty folder is filled, and a new one is made")
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("folder").mkdir()
    Path("file").write_text("x")
    Path("lines.jsonl").write_text('{"prompt": "hi", "instruction": "hi", "output": "ho"}\n')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ending:
        cli.run_main(main, [*map(str, arguments), path])
    error = capsys.readouterr().err
    assert ending.value.code in (2, 3) and "error: " in error and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before and Path("loop").is_symlink()


@pytest.mark.parametrize("path", [".", "/"])
def test_a_folder_is_no_configuration(path):
    with pytest.raises(CheckpointError):
        random.official_config(path)


@pytest.mark.parametrize("name", [f"{'n' * 97}/x", "a--b/x", "a/x--y", "a/x.git", "a/x."])
def test_a_name_that_no_hub_has(name):
    with pytest.raises(CheckpointError, match="There is no folder"):
        find_model(name)
