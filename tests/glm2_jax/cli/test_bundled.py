"""What is installed with the packages, by its name from any folder."""

import os
import tomllib
from pathlib import Path

import pytest

from convert import inspect
from convert.hub.find import find_model
from glm2_jax.cli.bundled import HOME, MODELS, RECIPES, ROWS, find_bundled
from glm2_jax.cli.text_input import read_utf8
from glm2_jax.datasets.index import DataFile
from glm2_jax.datasets.rows import read_rows
from glm2_jax.errors import CheckpointError, InputError, UsageError
from tests.support.paths import ROOT
from train import lora
from train.recipe import parse

PAIRS = "train/demo/pairs.jsonl"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_all_names_stand_for_files_that_are_installed():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    patterns = {
        (*package.split("."), *pattern.split("/"))
        for package, found in setup["package-data"].items()
        for pattern in found
    }
    for place in (*MODELS.values(), *RECIPES.values(), *ROWS.values()):
        files = [HOME / place] if (HOME / place).is_file() else list((HOME / place).iterdir())
        assert files, place
        for file in files:
            parts = file.relative_to(HOME).parts
            assert {parts, (*parts[:-1], "*"), (*parts[:-1], f"*{file.suffix}")} & patterns, file
    assert sorted(RECIPES) == sorted(path.stem for path in (HOME / "train/recipes").iterdir())


def test_what_the_user_has_comes_first(tmp_path):
    assert find_bundled("demo", MODELS) == find_bundled("infer/demo", MODELS)
    assert find_bundled("demo", MODELS) == str(HOME / "infer/demo") == find_bundled("demo/", MODELS)
    for other in ("", "Demo", "./demo", "pairs", "train/demo", "train/demo/data.py", "demo\0"):
        assert find_bundled(other, MODELS | ROWS) == other
    (tmp_path / "demo").mkdir()
    assert find_bundled(Path("demo"), MODELS) == "demo"
    os.symlink("nowhere", "small")  # even a broken link of the user is not replaced
    assert find_bundled("small", RECIPES) == "small"


def test_a_model(capsys):
    assert find_model("demo") == HOME / "infer/demo"
    inspect.main(["demo"])
    assert "2,337,600" in capsys.readouterr().out
    with pytest.raises(UsageError, match="'demo' is not the name of a model on a hub"):
        find_model("demo", source="hf")
    with pytest.raises(CheckpointError, match="directory not found: dem "):
        inspect.main(["dem"])
    os.mkdir("demo")
    with pytest.raises(CheckpointError, match="(?s)demo holds no config.*hides the bundled model"):
        inspect.main(["demo"])


def test_rows_are_read_by_the_name_that_the_docs_show():
    text = (HOME / PAIRS).read_text("utf-8")
    assert read_utf8(PAIRS) == text
    for rows in (list(read_rows(PAIRS)), list(DataFile(PAIRS).rows())):
        assert len(rows) == len(text.splitlines())
    assert next(read_rows(PAIRS))[0] == f"{PAIRS}:1"  # errors call a row as the user did
    with pytest.raises(InputError, match="file not found"):
        read_utf8("train/demo/pair.jsonl")


def test_recipes():
    parser = lora.parser()
    args = parse(parser, ["--config", "demo", "--data", PAIRS])
    assert (args.lr, args.mix_data) == (2e-3, PAIRS)
    assert parse(parser, ["--config=lora_r8", "--data", "x", "--rank", "2"]).rank == 2
    assert parse(parser, ["--config", "small", "--data", "x"]).steps == 300
    with pytest.raises(
        InputError, match="neither a file nor a bundled recipe: demo, lora_r8, small"
    ):
        parse(parser, ["--config", "tiny", "--data", "x"])
