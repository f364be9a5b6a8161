"""What a training chooses by itself, warns of, and reports: few rows are to teach something."""

import json
import math
import shlex

import numpy as np
import pytest
import yaml

from convert import open_folder
from glm2_jax.errors import InputError
from infer.engine.load import demo_folder
from tests.support.training_data import open_rows
from train import defaults, full, lora, run
from train.data import vocabulary
from train.loop import Position
from train.recipe import Recipe
from train.run_folder.log import Log, losses, read_log

FAST = ["--batch-size", "2", "--rank", "2", "--max-length", "64", "--dropout", "0"]


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "data.jsonl"
    rows = [{"instruction": f"{i}?", "output": "你好"} for i in range(6)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def train(data, output, *flags: str) -> int:
    return lora.main(["--data", data, "--output", str(output), *FAST, *flags])


def recipe(*flags: str) -> Recipe:
    return lora.make_recipe(lora.parser().parse_args(["--data", "d", "--output", "out", *flags]))


@pytest.mark.parametrize(
    ("parts", "accumulate", "epochs"),
    [(1, 1, 200), (8, 1, 25), (75, 1, 3), (250, 3, 3), (534, 8, 3), (100_000, 8, 3)],
)
def test_few_rows_get_smaller_steps_and_more_epochs(parts, accumulate, epochs):
    chosen = defaults.choose(recipe(), parts, 4096).training
    assert (chosen.grad_accum, chosen.epochs, chosen.lr) == (accumulate, epochs, 5e-5)
    assert epochs * math.ceil(parts / accumulate) >= 200
    given = recipe("--grad-accum", "3", "--steps", "7", "--lr", "0")
    assert defaults.choose(given, parts, 192) == given


def test_narrow_models_get_a_higher_rate():
    rates = [defaults.choose(recipe(), 1, width).training.lr for width in (192, 1024, 4096)]
    assert rates == [0.0011, 2e-4, 5e-5]
    of_full = full.make_recipe(full.parser().parse_args(["--data", "d"]))
    assert defaults.choose(of_full, 1, 192).training.lr == 0.00021


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (("--grad-accum", "8", "--epochs", "3"), "--grad-accum 1 --epochs 25"),
        (("--grad-accum", "1", "--steps", "20"), "--steps 200"),
    ],
)
def test_too_few_steps_are_warned_of_with_what_helps(given, remedy, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out-2").mkdir()
    defaults.warn_of_few_steps(recipe(*given), 8, 50)
    assert capsys.readouterr().err == ""
    defaults.warn_of_few_steps(recipe(*given), 8, 20)
    shown = capsys.readouterr().err
    assert "only 20 optimizer steps" in shown and f"Try {remedy} --output out-3" in shown


def test_the_remedy_works_as_it_is_typed(data, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    monkeypatch.setattr(defaults, "WANTED_STEPS", 13)
    monkeypatch.setattr(defaults, "FEW_STEPS", 13)
    short = ["--epochs", "1", "--grad-accum", "4"]
    assert train(data, tmp_path / "a", *short) == 0
    shown = capsys.readouterr().err
    assert "chosen for this data and model: --lr 0.0011\n" in shown
    assert "step 1/1, loss" in shown
    recipe = yaml.safe_load((tmp_path / "a" / "recipe.yml").read_text())
    identity = json.loads((tmp_path / "a" / "run.json").read_text())
    assert recipe["lr"] == identity["--lr"] == 0.0011 and recipe["epochs"] == 1.0
    remedy = shlex.split(shown.partition("Try ")[2].splitlines()[0])
    assert remedy == ["--grad-accum", "1", "--epochs", "5", "--output", str(tmp_path / "a-2")]
    plan = ["--eval-every", "5", "--val-data", data, "--plot", str(tmp_path / "loss.png")]
    assert train(data, tmp_path / "a", *short, *remedy, *plan) == 0
    shown = capsys.readouterr().err
    assert "warning" not in shown and "step 1/15, loss" in shown and "step 15/15, loss" in shown
    lines = read_log(tmp_path / "a-2" / "log.jsonl")
    trained = {x["step"]: x["loss"] for x in lines if x["split"] == "train"}
    seen = {x["step"]: x["loss"] for x in lines if x["split"] == "validation"}
    assert list(trained) == [1, 10, 15] and list(seen) == [0, 5, 10, 15]
    assert f"training loss {trained[1]:.4g} -> {trained[15]:.4g} (step 1 -> 15)" in shown
    assert f"validation loss {seen[0]:.4g} -> {seen[15]:.4g} (step 0 -> 15)" in shown
    assert seen[15] < seen[0]
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_log_has_the_first_and_the_last_step(tmp_path, capsys):
    for total, until in ((7, 7), (30, 13), (1, 1)):
        path = tmp_path / f"{total}.jsonl"
        with Log(total, every=10, path=path) as log:
            for step in range(1, until + 1):
                log.step(step, 5, None, loss=1.0)
            log.finish()
            log.finish()
        wanted = sorted({1, until} | set(range(10, until + 1, 10)))
        assert [line["step"] for line in read_log(path)] == wanted
    assert capsys.readouterr().err.count("step") == 2 + 3 + 1


def test_the_fall_of_losses_is_reported():
    position = Position()
    for step, loss in ((1, 4.0), (2, math.nan), (3, 1.0)):
        position.note_loss("training", step, loss)
    position.losses = {"validation": [[0, None], [3, None]], **position.losses}
    assert json.loads(json.dumps(vars(position), allow_nan=False)) == vars(position)
    assert losses(position.losses) == [
        "training loss 4 -> 1 (step 1 -> 3), 75 % lower",
        "validation loss not finite -> not finite (step 0 -> 3)",
    ]


def test_the_outcome_of_a_run_is_refused_or_reported(capsys):
    with pytest.raises(InputError, match="all 2 steps were skipped"):
        run._check_outcome(Position(step=2, skipped=2), choosing=False)
    with pytest.raises(InputError, match="no validation loss was finite"):
        run._check_outcome(Position(step=2), choosing=True)
    position = Position(step=5, best=1.0, best_step=3, skipped=1)
    run._check_outcome(position, choosing=True)
    run._report(position, 6, choosing=True)
    shown = capsys.readouterr().err
    assert "the best evaluation was after step 3, loss 1\n" in shown
    assert "1 of 5 steps were skipped" in shown and "ended after step 5 of 6" in shown


def test_rows_without_a_learned_token_are_refused(data, tmp_path, monkeypatch):
    opened = run.open_dataset

    def nothing_learned(*args):
        dataset = opened(*args)
        dataset.learned = np.zeros_like(dataset.learned)
        return dataset

    monkeypatch.setattr(run, "open_dataset", nothing_learned)
    with pytest.raises(InputError, match="the training rows have no token"):
        train(data, tmp_path / "a")


def test_characters_that_the_demo_cannot_spell_are_reported(tmp_path, monkeypatch):
    demo = open_folder(demo_folder())
    options = {"tokenizer": demo.tokenizer, "template": demo.template}
    known = open_rows(tmp_path / "a", [{"instruction": "你好", "output": "你好"}], **options)
    assert vocabulary.unknown_characters(known) is None
    rows = [{"instruction": "你好\n\x1b饕餮", "output": "饕。"}] * 3
    strange = open_rows(tmp_path / "b", rows, **options)
    line = vocabulary.unknown_characters(strange) or ""
    assert "12 of the data's 24 characters are" in line and "饕 餮" in line
    assert "\x1b" not in line and "\n" not in line
    monkeypatch.setattr(vocabulary, "_ROWS", 2)
    line = vocabulary.unknown_characters(strange) or ""
    assert "8 of the data's 16 characters in the first 2 rows" in line
