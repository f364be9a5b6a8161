"""`python -m train.lora` and `train.full` from their flags to their result, on a tiny model."""

import json
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file

from convert import open_folder
from glm2_jax.errors import CheckpointError, InputError, UsageError
from tests.support.checkpoints import save, tiny_config
from tests.support.paths import ROOT
from tests.support.training_data import alpaca, write_rows
from train import defaults, full, lora
from train.run_folder.log import read_log

WEIGHTS = "adapter_model.safetensors"
CONFIG = tiny_config(num_layers=1)
SHAPE = ["--batch-size", "2", "--grad-accum", "2", "--rank", "2"]  # one program for most tests
STEPS = 24


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of compiled programs that this process shares with those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
        for on in (True, False):
            jax.config.update("jax_enable_compilation_cache", on)
            compilation_cache.reset_cache()
            if on:
                yield tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    rows = [alpaca(f"{i} 号茶叫什么", f"它叫青山{i}号。") for i in range(9)]
    return str(write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", rows))


@pytest.fixture(scope="module")
def flags(cache, data, tmp_path_factory) -> list[str]:
    """The flags of every run."""
    model = tmp_path_factory.mktemp("model")
    save(model, config=CONFIG)
    more = ["--model", str(model), "--data", data, "--max-length", "64", "--log-every", "1"]
    return [*more, *SHAPE, "--compile-cache", str(cache)]


@pytest.fixture
def train(flags, tmp_path):
    def run(output: str, *more: str, method=lora) -> int:
        return method.main([*flags, "--lr", "1e-3", "--output", str(tmp_path / output), *more])

    return run


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """A run that nothing stopped."""
    path = tmp_path_factory.mktemp("whole") / "a"
    more = ["--lr", "1e-3", "--steps", str(STEPS), "--save-every", "1", "--dropout", "0.2"]
    assert lora.main([*flags, *more, "--output", str(path)]) == 0
    return path


def test_a_run_leaves_adapter_log_recipe_and_checkpoints(whole):
    assert any("query_key_value.lora_A.weight" in name for name in load_file(whole / WEIGHTS))
    config = json.loads((whole / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (2, ["query_key_value"])
    lines = read_log(whole / "log.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"lr", "grad_norm", "tokens_per_second", "memory_bytes"} <= set(lines[0])
    kept = {path.name for path in (whole / "state").iterdir()}
    assert kept == {str(STEPS - 1), str(STEPS)}


def started(command: list[str]) -> subprocess.Popen:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGHUP, before)
    assert process.stderr is not None
    assert any(line.startswith("step") for line in process.stderr)
    return process


def test_stopped_anywhere_it_ends_as_if_never_stopped(whole, tmp_path):
    """By a closed terminal, and killed at any moment from the first step on."""
    again = ["--config", str(whole / "recipe.yml"), "--output", str(tmp_path / "a"),
             "--resume", "auto"]  # fmt: skip
    command = [sys.executable, "-m", "train.lora", *again]
    with started(command) as process:
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None and "resume with --resume auto" in process.stderr.read()
    assert process.returncode == 143
    assert (tmp_path / "a" / "state").exists() and not (tmp_path / "a" / WEIGHTS).exists()
    rng, kills = random.Random(7), 0
    for _ in range(2):
        with started(command) as process:
            time.sleep(rng.random() * 0.2)
            process.kill()
            kills += process.wait() == -signal.SIGKILL
    assert kills > 0
    assert lora.main(again) == 0
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    lines = [read_log(path / "log.jsonl") for path in (whole, tmp_path / "a")]
    one, other = ([(x["step"], x["loss"]) for x in log] for log in lines)
    assert one == other


def test_the_remedy_for_few_steps_works_as_it_is_typed(
    flags, cache, data, whole, tmp_path, capsys, monkeypatch
):
    """Also every evaluation, with numbers that need no other program."""
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    monkeypatch.setattr(defaults, "WANTED_STEPS", 7)
    monkeypatch.setattr(defaults, "FEW_STEPS", 7)
    short = [*flags, "--output", str(tmp_path / "a"), "--grad-accum", "4", "--epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("train.run._train", lambda *args: 0)
        assert lora.main(short) == 0
    shown = capsys.readouterr().err
    assert "warning: only 2 optimizer steps" in shown
    (tmp_path / "a-2").mkdir()
    remedy = shlex.split(shown.partition("Try ")[2].splitlines()[0])
    assert remedy == ["--grad-accum", "2", "--epochs", "3", "--output", str(tmp_path / "a-2")]

    (tmp_path / "prompts").write_text("3 号茶叫什么\n", encoding="utf-8")
    general = write_rows(tmp_path / "general.jsonl", [alpaca("你好", "你好！")])
    plan = ["--eval-every", "5", "--val-data", data, "--guard-data", str(general),
            "--plot", str(tmp_path / "loss.png"), "--sample-prompts", str(tmp_path / "prompts"),
            "--schedule", "linear", "--warmup", "0", "--weight-decay", "0.1",
            "--clip", "2"]  # fmt: skip
    steps = {path for path in cache.iterdir() if "train_step" in path.name}
    assert lora.main([*short, *remedy, *plan]) == 0
    assert steps and steps == {path for path in cache.iterdir() if "train_step" in path.name}
    shown = capsys.readouterr()
    assert shown.out == "" and "warning" not in shown.err and "step 9/9, loss" in shown.err
    rate = float(f"{5e-5 * 4096 / CONFIG.hidden_size:.2g}")
    assert f"chosen for this data and model: --lr {rate:g}\n" in shown.err
    recipe = yaml.safe_load((tmp_path / "a-2" / "recipe.yml").read_text())
    identity = json.loads((tmp_path / "a-2" / "run.json").read_text())
    assert recipe["lr"] == identity["--lr"] == rate and recipe["epochs"] == 3.0
    lines = read_log(tmp_path / "a-2" / "log.jsonl")
    trained = {x["step"]: x["loss"] for x in lines if x["split"] == "train"}
    seen = {x["step"]: x["loss"] for x in lines if x["split"] == "validation"}
    assert list(trained) == list(range(1, 10)) and list(seen) == [0, 5, 9] and seen[9] < seen[0]
    assert [x["step"] for x in lines if x["split"] == "guard"] == [0, 5, 9]
    assert shown.err.count("3 号茶叫什么 -> ") == 3
    assert f"training loss {trained[1]:.4g} -> {trained[9]:.4g} (step 1 -> 9)" in shown.err
    assert f"validation loss {seen[0]:.4g} -> {seen[9]:.4g} (step 0 -> 9)" in shown.err
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_changed_flags_and_data_are_named_and_nothing_is_lost(train, data, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", Path(data).read_text("utf-8").splitlines())
    given = ["a", "--steps", "2", "--data", f"{rows}=2"]
    assert train(*given) == 0
    with pytest.raises(UsageError, match="holds a training already"):
        train(*given)
    with pytest.raises(UsageError, match="--rank was 2 and is 4") as refusal:
        train(*given, "--resume", "auto", "--rank", "4")
    assert "--init-adapter" not in refusal.value.fix  # it would be refused
    start, place = f"--init-adapter {tmp_path / 'a'}", f"--output {tmp_path / 'a-2'}"
    with pytest.raises(UsageError, match="--steps was 2 and is 3") as refusal:
        train(*given, "--resume", "auto", "--steps", "3")
    assert refusal.value.fix.endswith(f", or start from its result: {start} {place}.")
    with pytest.raises(UsageError, match="--init-adapter was null"):
        train(*given, "--resume", "auto", *start.split())
    assert train(*given, "--steps", "3", *start.split(), *place.split(), "--resume", "auto") == 0
    assert (tmp_path / "a-2" / WEIGHTS).exists()
    write_rows(rows, [alpaca()])
    with pytest.raises(UsageError, match="data was"):
        train(*given, "--resume", "auto")


def test_early_stopping_returns_the_best_parameters(train, tmp_path, capsys):
    """The other answers become less likely from the first steps on."""
    others = write_rows(tmp_path / "others", [alpaca(f"{i} 号茶叫什么", "xyz") for i in range(9)])
    rate = ["--lr", "0.1", "--schedule", "constant", "--warmup", "0"]
    looking = ["--val-data", str(others), "--eval-every", "1", "--early-stop", "2"]
    assert train("a", *rate, "--steps", "6", *looking) == 0
    lines = read_log(tmp_path / "a" / "log.jsonl")
    found = {x["step"]: x["loss"] for x in lines if x["split"] == "validation" and x["step"]}
    best = min(found, key=lambda step: found[step])
    assert max(found) == best + 2 < 6
    assert f"the best evaluation was after step {best}" in capsys.readouterr().err
    assert train("b", *rate, "--steps", str(best)) == 0
    results = [load_file(tmp_path / name / WEIGHTS) for name in "ab"]
    for name, array in results[0].items():
        np.testing.assert_array_equal(array, results[1][name])


def test_all_parameters(flags, tmp_path):
    more = ["--output", str(tmp_path / "a"), "--steps", "3", "--lr", "1e-3"]
    rank = flags.index("--rank")
    more += flags[:rank] + flags[rank + 2 :]
    assert full.main(more) == 0
    with pytest.raises(UsageError, match="--batch-size was 2 and is 4") as refusal:
        full.main([*more, "--batch-size", "4", "--resume", "auto"])
    result = f"--model {tmp_path / 'a' / 'model'} --output {tmp_path / 'a-2'}"
    assert refusal.value.fix.endswith(f"start from its result: {result}.")
    assert open_folder(tmp_path / "a" / "model").stored_dtype == "float32"


def test_what_is_refused_before_anything_is_written(train, data, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    for words, error, said in (
        ("--target q_proj", UsageError, "matches nothing"),
        ("--dropout 1", UsageError, "dropout"),
        ("--model /nowhere", CheckpointError, "nowhere"),
        ("--plot loss.txt", UsageError, "must end in .png"),
        ("--log-jsonl -", InputError, "cannot be written"),
        ("--val-split 0.99", UsageError, "leaves none for training"),
        ("--early-stop 2", UsageError, "--early-stop needs --eval-every"),
        ("--early-stop 2 --eval-every 1", UsageError, "--early-stop needs --val"),
    ):
        with pytest.raises(error, match=said):
            train("a", *words.split())
        assert not (tmp_path / "a" / "state").exists()
    bad = write_rows(tmp_path / "bad.jsonl", ["nonsense"])
    capsys.readouterr()
    assert train("b", "--data", str(bad), "--check-data") == 3
    assert f"{bad}:1" in capsys.readouterr().out and not (tmp_path / "b").exists()
