"""What a training chooses by itself, warns of, and reports: few rows are to teach something."""

import argparse
import json
import math
import shlex

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from glm2_jax.errors import InputError
from train import defaults, lora, run
from train.data import vocabulary
from train.loop import Position
from train.run_folder.log import Log, losses, read_log
from train.step import Metrics

FAST = ["--batch-size", "2", "--rank", "2", "--max-length", "64", "--dropout", "0"]


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "data.jsonl"
    rows = [{"instruction": f"{i}?", "output": "你好"} for i in range(6)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def train(data, output, *flags: str) -> int:
    return lora.main(["--data", data, "--output", str(output), *FAST, *flags])


def flags(**given):
    unset = dict.fromkeys(("lr", "grad_accum", "epochs", "steps"))
    return argparse.Namespace(
        **(unset | {"lr_of_wide_model": 5e-5, "output": "out", "checkpoints": None} | given)
    )


@pytest.mark.parametrize(
    ("parts", "accumulate", "epochs"),
    [(1, 1, 200), (8, 1, 25), (75, 1, 3), (250, 3, 3), (534, 8, 3), (100_000, 8, 3)],
)
def test_few_rows_get_smaller_steps_and_more_epochs(parts, accumulate, epochs):
    chosen = defaults.choose(flags(), parts, 4096)
    assert (chosen.grad_accum, chosen.epochs, chosen.lr) == (accumulate, epochs, 5e-5)
    assert epochs * math.ceil(parts / accumulate) >= 200
    given = flags(grad_accum=3, steps=7, lr=0.0)
    chosen = defaults.choose(given, parts, 192)
    assert vars(chosen) == vars(given)


def test_narrow_models_get_a_higher_rate():
    rates = [defaults.choose(flags(), 1, width).lr for width in (192, 1024, 4096)]
    assert rates == [0.0011, 2e-4, 5e-5]
    assert defaults.choose(flags(lr_of_wide_model=1e-5), 1, 192).lr == 0.00021


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"grad_accum": 8, "epochs": 3.0}, "--grad-accum 1 --epochs 25"),
        ({"grad_accum": 1, "steps": 20}, "--steps 200"),
    ],
)
def test_too_few_steps_are_warned_of_with_what_helps(given, remedy, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out-2").mkdir()
    defaults.warn_of_few_steps(flags(**given), 8, 50)
    assert capsys.readouterr().err == ""
    defaults.warn_of_few_steps(flags(**given), 8, 20)
    shown = capsys.readouterr().err
    assert "only 20 optimizer steps" in shown and f"Try {remedy} --output out-3" in shown


def test_the_remedy_works_as_it_is_typed(data, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    monkeypatch.setattr(defaults, "WANTED_STEPS", 61)
    short = ["--epochs", "1", "--grad-accum", "4"]
    assert train(data, tmp_path / "a", *short) == 0
    shown = capsys.readouterr().err
    assert "chosen for this data and model: --lr 0.0011\n" in shown
    assert "step 1/1, loss" in shown
    remedy = shlex.split(shown.partition("Try ")[2].splitlines()[0])
    assert remedy == ["--grad-accum", "1", "--epochs", "21", "--output", str(tmp_path / "a-2")]
    plan = ["--eval-every", "21", "--val-data", data, "--plot", str(tmp_path / "loss.png")]
    assert train(data, tmp_path / "a", *short, *remedy, *plan) == 0
    shown = capsys.readouterr().err
    assert "warning" not in shown and "step 1/63, loss" in shown and "step 63/63, loss" in shown
    lines = read_log(tmp_path / "a-2" / "log.jsonl")
    trained = {x["step"]: x["loss"] for x in lines if x["split"] == "train"}
    seen = {x["step"]: x["loss"] for x in lines if x["split"] == "validation"}
    assert list(trained) == [1, *range(10, 61, 10), 63] and list(seen) == [0, 21, 42, 63]
    assert f"training loss {trained[1]:.4g} -> {trained[63]:.4g} (step 1 -> 63)" in shown
    assert f"validation loss {seen[0]:.4g} -> {seen[63]:.4g} (step 0 -> 63)" in shown
    assert trained[63] < 0.5 * trained[1]
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_the_recipe_holds_what_was_chosen_and_repeats_it(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(defaults, "WANTED_STEPS", 5)
    assert train(data, tmp_path / "a", "--save-every", "1") == 0
    recipe = yaml.safe_load((tmp_path / "a" / "recipe.yml").read_text())
    assert (recipe["lr"], recipe["grad-accum"], recipe["epochs"]) == (0.0011, 1, 3.0)
    identity = json.loads((tmp_path / "a" / "run.json").read_text())
    assert (identity["--grad-accum"], identity["--epochs"]) == (1, 3.0)
    again = [tmp_path / "a" / "recipe.yml", tmp_path / "b"]
    assert lora.main(["--config", str(again[0]), "--output", str(again[1])]) == 0
    results = [(tmp_path / x / "adapter_model.safetensors").read_bytes() for x in "ab"]
    assert results[0] == results[1]
    assert capsys.readouterr().err.count("chosen for") == 1


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


def test_how_far_losses_fell_is_said():
    position = Position()
    for step, loss in ((1, 4.0), (2, math.nan), (3, 1.0)):
        position.note_loss("training", step, loss)
    position.losses = {"validation": [[0, None], [3, None]], **position.losses}
    assert json.loads(json.dumps(vars(position), allow_nan=False)) == vars(position)
    assert losses(position.losses) == [
        "training loss 4 -> 1 (step 1 -> 3), 75 % lower",
        "validation loss not finite -> not finite (step 0 -> 3)",
    ]


def test_what_the_demo_cannot_spell_is_said(data, tmp_path, capsys):
    assert train(data, tmp_path / "a", "--check-data") == 0
    assert "vocabulary" not in capsys.readouterr().err
    strange = tmp_path / "strange.jsonl"
    row = {"instruction": "你好\n\x1b饕餮", "output": "饕。"}
    strange.write_text(json.dumps(row), encoding="utf-8")
    assert train(str(strange), tmp_path / "a", "--check-data") == 0
    shown = capsys.readouterr().err
    assert "4 of the data's 8 characters" in shown and "饕 餮" in shown and "\x1b" not in shown
    assert "\\n" not in shown  # a note is one line


def learns(state, batch, number):
    """A step that costs nothing."""
    return state, Metrics(*map(jnp.asarray, (1.0, 1.0, 1, True, False)))


def never_finite(state, batch, number):
    return state, Metrics(*map(jnp.asarray, (math.nan, math.nan, 1, False, True)))


class Scripted:
    """Validation whose losses are given."""

    script: tuple[float, ...] = ()

    def __init__(self, *args):
        self._left = list(self.script)

    def __call__(self, params, lora):
        loss = self._left.pop(0)
        return {"validation": {"loss": loss, "perplexity": loss}}


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("script", "steps", "best"),
    [
        ((NAN, NAN, NAN), 2, None),
        ((3.0, NAN, NAN), 2, None),
        ((3.0, INF, INF), 2, None),
        ((NAN, NAN, 2.0, 1.0, NAN, 1.5), 5, 3),
        ((3.0, 2.0, NAN, NAN), 3, 1),
    ],
)
def test_no_loss_that_is_not_finite_is_the_best(
    script, steps, best, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run, "Validation", Scripted)
    monkeypatch.setattr(run, "_announced", lambda *args: learns)
    monkeypatch.setattr(Scripted, "script", script)
    looking = ["--steps", "6", "--val-data", data, "--eval-every", "1", "--early-stop", "2"]
    result = tmp_path / "a" / "adapter_model.safetensors"
    if best is None:
        with pytest.raises(InputError, match="no validation loss was finite"):
            train(data, tmp_path / "a", *looking)
        with pytest.raises(InputError, match="no validation loss was finite"):
            train(data, tmp_path / "a", *looking, "--resume", "auto")
    else:
        assert train(data, tmp_path / "a", *looking) == 0
    shown = capsys.readouterr().err
    assert result.exists() == (best is not None)
    lowest = min(filter(math.isfinite, script)) if best else 0
    said = f"the best evaluation was after step {best}, loss {lowest:.4g}\n" in shown
    assert said == (best is not None)
    bad = sum(not math.isfinite(x) for x in script[: steps + 1])
    assert shown.count("is not finite") == bad
    lines = (tmp_path / "a" / "log.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert max(line["step"] for line in parsed) == steps
    for path in (tmp_path / "a" / "state").rglob("*"):
        assert not path.is_file() or path.suffix or b"NaN" not in path.read_bytes()


def test_a_position_with_nan_as_its_best_has_none():
    assert Position(step=3, best=NAN, best_step=2).best is None


def test_a_run_that_changed_nothing_is_no_success(data, tmp_path):
    bad = ["--steps", "2", "--lr", "1e30", "--warmup", "0", "--clip", "0", "--nan-policy", "skip"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_announced", lambda *args: never_finite)
        with pytest.raises(InputError, match="all 2 steps were left out"):
            train(data, tmp_path / "a", *bad)


def test_rows_without_a_learned_token_are_refused(data, tmp_path, monkeypatch):
    opened = run.open_dataset

    def nothing_learned(*args):
        dataset = opened(*args)
        dataset.learned = np.zeros_like(dataset.learned)
        return dataset

    monkeypatch.setattr(run, "open_dataset", nothing_learned)
    with pytest.raises(InputError, match="the training rows have no token"):
        train(data, tmp_path / "a")


def test_only_some_rows_are_looked_at_for_the_vocabulary(data, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(vocabulary, "_ROWS", 2)
    rows = [{"instruction": "饕", "output": "好"}] * 3
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(str(path), tmp_path / "a", "--check-data") == 0
    assert "2 of the data's 4 characters in the first 2 rows" in capsys.readouterr().err
