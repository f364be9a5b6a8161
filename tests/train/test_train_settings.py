"""Recipes: flags from a YAML file, with those of the command on top, and numbers chosen by data."""

import argparse
import dataclasses
import math
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from glm2_jax.cli.parser import Parser
from glm2_jax.errors import GLMError, InputError, UsageError
from train import defaults, full, lora
from train.data.options import DataOptions
from train.options import AdapterOptions, EvaluationOptions, OutputOptions, TrainingOptions
from train.recipe import Recipe, parse


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


def recipe(*flags: str, command=lora) -> Recipe:
    return command.make_recipe(parse(command.parser(), ["--data", "d", "--output", "out", *flags]))


def test_flags_take_precedence_over_the_file(read):
    text = "lr: 2e-5\nbatch_size: 2\npack: true\ngrad-checkpoint: false\ndata: [a.json, b.json]\n"
    args = read(text + "compile-cache: off\n", "--batch-size=3")
    assert (args.lr, args.batch_size, args.pack, args.grad_checkpoint) == (2e-5, 3, True, "none")
    assert args.data == ["a.json", "b.json"] and args.compile_cache == "off"
    assert read("data: [a.json]\n", "--data", "c.json").data == ["c.json"]
    args = read("data: a\nsteps: 5\n", "--epochs", "2")  # which exclude each other
    assert (args.epochs, args.steps) == (2, None)
    assert read("data: a\ntp: 4\n").mesh == "tensor=4"


@pytest.mark.parametrize(
    ("text", "flags", "chosen"),
    [
        ("", [], None),
        ("", ["--grad-checkpoint"], "full"),
        ("", ["--grad-checkpoint", "products"], "products"),
        ("grad-checkpoint: true\n", [], "full"),
        ("grad-checkpoint: attention\n", [], "attention"),
        ("grad-checkpoint: attention\n", ["--no-grad-checkpoint"], "none"),
    ],
)
def test_gradient_checkpointing_is_a_flag_with_or_without_a_value(text, flags, chosen, read):
    assert read(text + "data: a\n", *flags).grad_checkpoint == chosen


@pytest.mark.parametrize(
    "flags", [["--grad-checkpoint", "some"], ["--no-grad-checkpoint", "products"]]
)
def test_a_wrong_value_of_gradient_checkpointing_is_named(flags, read, capsys):
    with pytest.raises(SystemExit):
        read("data: a\n", *flags)
    assert flags[1] in capsys.readouterr().err


def test_flags_and_defaults_make_a_recipe_that_repeats_the_command(tmp_path):
    given = ["--data", "b=2", "--pack", "--no-grad-checkpoint", "--tp", "2", "--source", "hf",
             "--model", "x/y", "--quantize-base", "int4", "--rope-scaling", "base"]  # fmt: skip
    found = recipe(*given)
    assert found.training.batch_size == 4 and found.training.lr is None
    assert (found.data.data, found.data.pack, found.choice.mesh) == (["d", "b=2"], True, "tensor=2")
    assert found.choice.quantize == "int4" and found.adapter is not None
    new = found.adapter.rank, found.adapter.alpha, found.adapter.target, found.adapter.rslora
    assert new == (8, 32, "attn", False)
    path: Path = tmp_path / "again.yml"
    path.write_text(yaml.safe_dump(found.settings()), encoding="utf-8")
    assert lora.make_recipe(parse(lora.parser(), ["--config", str(path)])) == found
    further = recipe("--init-adapter", "c", "--alpha", "6").settings()
    assert further["alpha"] == 6 and not {"rank", "target", "rslora"} & further.keys()
    whole = recipe(command=full)
    assert whole.adapter is None and whole.default_lr == 1e-5 and "rank" not in whole.settings()
    assert not whole.training.grad_checkpoint


def test_no_flag_is_left_out_of_a_recipe(parser):
    groups = (DataOptions, TrainingOptions, EvaluationOptions, OutputOptions, AdapterOptions)
    names = {field.name for group in groups for field in fields(group)}
    others = "model hub_source revision rope_scaling template family dtype device mesh"
    names |= {*others.split(), "quantize_base", "compile_cache", "tuned"}
    processes = {"coordinator", "num_processes", "process_id", "join_timeout", "heartbeat_timeout"}
    flags = {action.dest for action in parser._actions}
    assert names == flags - processes - {"help", "version", "debug", "config", "dry_run"}


def test_the_identity_is_what_parameters_depend_on():
    one = recipe("--model", "m", "--keep", "9")
    found = one.identity()
    assert found["command"] == "python -m train.lora" and found["--rank"] == 8
    assert not {"--data", "--model", "--keep", "--output", "--device"} & found.keys()
    training = dataclasses.replace(one.training, seed=3)
    assert dataclasses.replace(one, training=training).identity() == found | {"--seed": 3}


ALIASES = ["- &a0 [x, x]", *(f"- &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]


def test_bad_recipes_are_refused_in_a_line(parser, read, tmp_path, capsys):
    for text, error, words in (
        ("learning_rate: 1\n", UsageError, "learning_rate is not a setting"),
        ("config: other.yml\n", UsageError, "config is not a setting"),
        ("3: lr\n", UsageError, "3 is not a setting"),
        ("lr:\n", UsageError, "lr cannot be ''"),
        ("lr: [1e-4, 2e-4]\n", UsageError, "lr cannot be"),
        ("target: [attn, mlp]\n", UsageError, "as on a command line: attn,mlp"),
        ("lr: 1\nlr: 2\n", InputError, "lr is given twice"),
        ("grad_accum: 1\ngrad-accum: 2\n", UsageError, "grad-accum is given twice"),
        ("pack: 3\n", UsageError, "pack must be true or false"),
        ("- lr\n", InputError, "is not a recipe"),
        ("? [a, b]\n: c", InputError, "is not YAML"),
        ("lr: !!python/object/apply:os.getcwd []", UsageError, "lr cannot be"),
        ("lr:\n" + "\n".join(ALIASES), UsageError, "lr cannot be"),  # 9**29 words, written out
        ("lr: " + "[" * 3000, InputError, "nested too deeply"),
        ("data: [" + "a, " * 200_000 + "a]", InputError, "too long for a recipe"),
    ):
        with pytest.raises(GLMError, match=words) as refused:
            read(text)
        assert type(refused.value) is error and len(str(refused.value)) < 1000
    with pytest.raises(SystemExit):
        read("data: a\nlr: fast\n")
    assert "--lr" in capsys.readouterr().err
    with pytest.raises(InputError, match="none.yml"):
        parse(parser, ["--config", str(tmp_path / "none.yml")])


@pytest.mark.parametrize(
    ("parts", "accumulate", "epochs"), [(1, 1, 200), (8, 1, 25), (250, 3, 3), (100_000, 8, 3)]
)
def test_few_rows_get_smaller_steps_and_more_epochs(parts, accumulate, epochs):
    chosen = defaults.choose(recipe(), parts, 4096).training
    assert (chosen.grad_accum, chosen.epochs, chosen.lr) == (accumulate, epochs, 5e-5)
    assert epochs * math.ceil(parts / accumulate) >= 200
    given = recipe("--grad-accum", "3", "--steps", "7", "--lr", "0")
    assert defaults.choose(given, parts, 192) == given
    rates = [defaults.choose(recipe(), 1, width).training.lr for width in (192, 1024, 4096)]
    assert rates == [0.0011, 2e-4, 5e-5]  # narrow models get a higher one
