"""Recipes: flags from a YAML file, with those of the command on top."""

import pytest

from glm2_jax.cli.parser import Parser
from glm2_jax.errors import GLMError, InputError, UsageError
from train import recipe as settings
from train.options import add_output_options, add_training_options
from train.run_folder.folder import write_recipe


@pytest.fixture
def parser() -> Parser:
    result = Parser(prog="train")
    settings.add_config_flag(result)
    add_training_options(result, lr=5e-5, remat=True)
    add_output_options(result, "out")
    result.add_argument("--data", action="append")
    result.add_argument("--pack", action="store_true")
    return result


def recipe(folder, text: str) -> str:
    path = folder / "recipe.yml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_lie_on_top_of_the_file(parser, tmp_path):
    text = "lr: 2e-5\nbatch_size: 2\npack: true\ngrad-checkpoint: false\ndata: [a.json, b.json]\n"
    args = settings.parse(parser, ["--config", recipe(tmp_path, text), "--batch-size=3"])
    assert (args.lr, args.batch_size, args.pack, args.grad_checkpoint) == (2e-5, 3, True, False)
    assert args.data == ["a.json", "b.json"]


def test_data_of_the_command_replaces_that_of_the_file(parser, tmp_path):
    path = recipe(tmp_path, "data: [a.json]\n")
    assert settings.parse(parser, ["--data", "c.json", "--config", path]).data == ["c.json"]


def test_what_the_command_excludes_is_not_taken_from_the_file(parser, tmp_path):
    args = settings.parse(parser, ["--epochs", "2", "--config", recipe(tmp_path, "steps: 5\n")])
    assert (args.epochs, args.steps) == (2, None)


def test_off_is_a_text(parser, tmp_path):
    args = settings.parse(parser, ["--config", recipe(tmp_path, "compile-cache: off\n")])
    assert args.compile_cache == "off"


def test_config_without_a_name(parser, capsys):
    with pytest.raises(SystemExit):
        settings.parse(parser, ["--config"])
    assert capsys.readouterr().err.startswith("train: argument --config")


def test_without_a_file_flags_and_defaults_count(parser):
    assert settings.parse(parser, ["--steps", "5"]).steps == 5
    args = settings.parse(parser, [])
    assert (args.batch_size, args.lr, args.lr_of_wide_model) == (4, None, 5e-5)


def test_what_was_resolved_repeats_the_command(parser, tmp_path):
    args = settings.parse(parser, ["--data", "a", "--data", "b", "--pack", "--no-grad-checkpoint"])
    write_recipe(tmp_path / "again.yml", settings.as_recipe(parser, args))
    again = settings.parse(parser, ["--config", str(tmp_path / "again.yml")])
    assert {**vars(again), "config": None} == {**vars(args), "config": None}


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("learning_rate: 1\n", UsageError, "learning_rate is no setting"),
        ("config: other.yml\n", UsageError, "config is no setting"),
        ("lr: {a: 1}\n", UsageError, "lr cannot be"),
        ("lr:\n", UsageError, "lr cannot be ''"),
        ("lr: [1e-4, 2e-4]\n", UsageError, "lr cannot be"),
        ("lr: 1\nlr: 2\n", InputError, "lr is there twice"),
        ("grad_accum: 1\ngrad-accum: 2\n", UsageError, "grad-accum is there twice"),
        ("no-grad-checkpoint: true\n", UsageError, "no-grad-checkpoint is no setting"),
        ("pack: 3\n", UsageError, "pack is true or false"),
        ("- lr\n", InputError, "is no recipe"),
        ("3: lr\n", UsageError, "3 is no setting"),
        ("lr: [\n", InputError, "is not YAML"),
    ],
)
def test_bad_recipes(parser, tmp_path, text, error, words):
    with pytest.raises(error, match=words):
        settings.parse(parser, ["--config", recipe(tmp_path, text)])


def test_a_bad_value_is_said_as_that_of_a_flag(parser, tmp_path, capsys):
    with pytest.raises(SystemExit):
        settings.parse(parser, ["--config", recipe(tmp_path, "lr: fast\n")])
    assert "--lr" in capsys.readouterr().err


def test_a_recipe_that_is_not_there(parser, tmp_path):
    with pytest.raises(InputError, match="none.yml"):
        settings.parse(parser, ["--config", str(tmp_path / "none.yml")])


ALIASES = ["- &a0 [x, x]", *(f"- &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lr:\n" + "\n".join(ALIASES), "lr cannot be"),  # 9 to the power of 29 words, written out
        ("lr: " + "[" * 3000, "nested too deeply"),
        ("lr: " + "{a: " * 3000, "nested too deeply"),
        ("data: [" + "a, " * 200_000 + "a]", "too long for a recipe"),
        ("? [a, b]\n: c", "is not YAML"),
        ("lr: !!python/object/apply:os.getcwd []", "lr cannot be"),
    ],
    ids=["aliases", "lists", "mappings", "long", "key", "tag"],
)
def test_hostile_recipes_are_refused_in_a_line(parser, tmp_path, text, problem):
    with pytest.raises(GLMError, match=problem) as refused:
        settings.parse(parser, ["--config", recipe(tmp_path, text)])
    assert len(str(refused.value)) < 1000
