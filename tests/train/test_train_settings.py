"""Recipes: flags from a YAML file, with those of the command on top, as one value."""

import argparse
import dataclasses
from dataclasses import fields

import pytest
import yaml

from glm2_jax.cli.parser import Parser
from glm2_jax.errors import GLMError, InputError, UsageError
from train import full, lora
from train.data.options import DataOptions
from train.options import EvaluationOptions, OutputOptions, TrainingOptions
from train.recipe import AdapterOptions, parse
from train.run_folder.folder import write_recipe


@pytest.fixture(scope="module")
def parser() -> Parser:
    return lora.parser()


@pytest.fixture
def read(parser, tmp_path):
    """Parses a recipe file of this text, below some flags."""

    def parsed(text: str, *flags: str) -> argparse.Namespace:
        path = tmp_path / "recipe.yml"
        path.write_text(text, encoding="utf-8")
        return parse(parser, ["--config", str(path), *flags])

    return parsed


def test_flags_take_precedence_over_the_file(read):
    text = "lr: 2e-5\nbatch_size: 2\npack: true\ngrad-checkpoint: false\ndata: [a.json, b.json]\n"
    args = read(text + "compile-cache: off\n", "--batch-size=3")
    assert (args.lr, args.batch_size, args.pack, args.grad_checkpoint) == (2e-5, 3, True, False)
    assert args.data == ["a.json", "b.json"] and args.compile_cache == "off"
    assert read("data: [a.json]\n", "--data", "c.json").data == ["c.json"]
    args = read("data: a\nsteps: 5\n", "--epochs", "2")  # which exclude each other
    assert (args.epochs, args.steps) == (2, None)
    assert read("data: a\ntp: 4\n").mesh == "tensor=4"


def test_flags_and_defaults_make_a_recipe(parser):
    given = ["--data", "a", "--data", "b", "--pack", "--no-grad-checkpoint", "--tp", "2"]
    recipe = lora.make_recipe(parse(parser, given))
    assert recipe.training.batch_size == 4 and recipe.training.lr is None
    assert (recipe.data.data, recipe.data.pack, recipe.choice.mesh) == (
        ["a", "b"],
        True,
        "tensor=2",
    )
    assert recipe.choice.quantize is None and recipe.choice.path is None
    adapter = recipe.adapter
    assert adapter is not None
    assert (adapter.rank, adapter.alpha, adapter.target, adapter.rslora) == (8, 32, "attn", False)
    further = lora.make_recipe(parse(parser, [*given, "--init-adapter", "c", "--alpha", "6"]))
    written = further.settings()
    assert written["alpha"] == 6 and not {"rank", "target", "rslora"} & written.keys()
    whole = full.make_recipe(parse(full.parser(), ["--data", "a"]))
    assert whole.adapter is None and whole.default_lr == 1e-5 and "rank" not in whole.settings()


def test_a_written_recipe_repeats_the_command(parser, tmp_path):
    given = [
        "--data", "a", "--data", "b=2", "--pack", "--no-grad-checkpoint", "--tp", "2", "--source",
        "hf", "--model", "x/y", "--quantize-base", "int4", "--rope-scaling", "base", "--lr", "1e-3",
    ]  # fmt: skip
    recipe = lora.make_recipe(parse(parser, given))
    write_recipe(tmp_path / "again.yml", recipe.settings())
    again = lora.make_recipe(parse(parser, ["--config", str(tmp_path / "again.yml")]))
    assert again == recipe
    assert yaml.safe_load((tmp_path / "again.yml").read_text())["data"] == ["a", "b=2"]


def test_no_flag_is_left_out_of_a_recipe(parser):
    groups = (DataOptions, TrainingOptions, EvaluationOptions, OutputOptions, AdapterOptions)
    names = {field.name for group in groups for field in fields(group)}
    others = "model hub_source revision rope_scaling template family dtype device mesh"
    names |= {*others.split(), "quantize_base", "compile_cache"}
    processes = {"coordinator", "num_processes", "process_id", "join_timeout", "heartbeat_timeout"}
    flags = {action.dest for action in parser._actions}
    assert names == flags - processes - {"help", "version", "debug", "config"}


def test_the_identity_is_what_parameters_depend_on(parser):
    recipe = lora.make_recipe(parse(parser, ["--data", "a", "--model", "m", "--keep", "9"]))
    found = recipe.identity()
    assert found["command"] == "python -m train.lora" and found["--rank"] == 8
    assert not {"--data", "--model", "--keep", "--output", "--device"} & found.keys()
    training = dataclasses.replace(recipe.training, seed=3)
    assert dataclasses.replace(recipe, training=training).identity() == found | {"--seed": 3}


ALIASES = ["- &a0 [x, x]", *(f"- &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("learning_rate: 1\n", UsageError, "learning_rate is not a setting"),
        ("config: other.yml\n", UsageError, "config is not a setting"),
        ("no-grad-checkpoint: true\n", UsageError, "no-grad-checkpoint is not a setting"),
        ("3: lr\n", UsageError, "3 is not a setting"),
        ("lr: {a: 1}\n", UsageError, "lr cannot be"),
        ("lr:\n", UsageError, "lr cannot be ''"),
        ("lr: [1e-4, 2e-4]\n", UsageError, "lr cannot be"),
        ("lr: 1\nlr: 2\n", InputError, "lr is given twice"),
        ("grad_accum: 1\ngrad-accum: 2\n", UsageError, "grad-accum is given twice"),
        ("pack: 3\n", UsageError, "pack must be true or false"),
        ("- lr\n", InputError, "is not a recipe"),
        ("lr: [\n", InputError, "is not YAML"),
        ("? [a, b]\n: c", InputError, "is not YAML"),
        ("lr: !!python/object/apply:os.getcwd []", UsageError, "lr cannot be"),
        ("lr:\n" + "\n".join(ALIASES), UsageError, "lr cannot be"),  # 9**29 words, written out
        ("lr: " + "[" * 3000, InputError, "nested too deeply"),
        ("lr: " + "{a: " * 3000, InputError, "nested too deeply"),
        ("data: [" + "a, " * 200_000 + "a]", InputError, "too long for a recipe"),
    ],
    ids=range(18),
)
def test_bad_recipes_are_refused_in_a_line(read, text, error, words):
    with pytest.raises(GLMError, match=words) as refused:
        read(text)
    assert type(refused.value) is error and len(str(refused.value)) < 1000


def test_bad_values_and_files(parser, read, tmp_path, capsys):
    with pytest.raises(SystemExit):
        read("data: a\nlr: fast\n")
    assert "--lr" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(parser, ["--config"])
    assert "argument --config" in capsys.readouterr().err
    with pytest.raises(InputError, match="none.yml"):
        parse(parser, ["--config", str(tmp_path / "none.yml")])
