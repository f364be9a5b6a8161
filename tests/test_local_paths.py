"""Paths of object storage and of the network are refused in three lines, by tools and functions."""

from pathlib import Path

import pytest

from convert import cli, from_pytorch, load_checkpoint, open_folder
from convert.adapter import load_adapter
from convert.destination import check_destination
from convert.hub import find_model
from glm2_jax.errors import UsageError
from infer import generate
from tests.checkpoints import TINY
from train import lora

URLS = ["gs://bucket/model", "S3://bucket/model", "https://host/model", "file:///model", "az://b/c"]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "function",
    [
        cli.path_argument,
        find_model,
        load_checkpoint,
        open_folder,
        lambda url: load_adapter(url, TINY),
        lambda url: check_destination(url, False),
    ],
)
def test_a_url_is_refused(url, function):
    for path in (url, Path(url)) if function is not cli.path_argument else (url,):
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
        cli.path_argument("https://huggingface.co/THUDM/chatglm2-6b")


@pytest.mark.parametrize(
    "path", ["a/b", "./x:y", "C:/models", "THUDM/chatglm2-6b", "数据/训练.jsonl"]
)
def test_other_paths_are_left_alone(path):
    assert cli.path_argument(path) == path
