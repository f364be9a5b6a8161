"""`python -m train.lora` and `train.full` from their flags to their result, on the demo model."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file

from convert import open_folder
from glm2_jax.errors import CheckpointError, InputError, UsageError
from tests.support.paths import ROOT
from train import full, lora
from train.run_folder.log import read_log

WEIGHTS = "adapter_model.safetensors"
SMALL = [
    "--batch-size", "2", "--grad-accum", "2", "--lr", "1e-3", "--rank", "2", "--log-every", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of compiled programs that this process shares with those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
        switch_cache(True)
        yield str(tmp_path_factory.mktemp("compiled"))
        switch_cache(False)


def switch_cache(on: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", on)
    compilation_cache.reset_cache()


@pytest.fixture
def data(tmp_path) -> str:
    rows = [
        {"instruction": f"{i} 号茶叫什么", "input": "", "output": f"它叫青山{i}号。"}
        for i in range(9)
    ]
    return write(tmp_path / "data.jsonl", rows)


def write(path: Path, rows: list) -> str:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def train(cache, data, output, *more: str) -> int:
    flags = ["--data", data, "--output", str(output), "--compile-cache", cache]
    return lora.main([*flags, *SMALL, "--steps", "6", *more])


def test_a_run_leaves_adapter_log_recipe_and_checkpoints(cache, data, tmp_path, capsys):
    assert train(cache, data, tmp_path / "a", "--save-every", "2") == 0
    found = load_file(tmp_path / "a" / WEIGHTS)
    assert any("query_key_value.lora_A.weight" in name for name in found)
    lines = read_log(tmp_path / "a" / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"lr", "grad_norm", "tokens_per_second", "memory_bytes"} <= set(lines[0])
    assert sorted(path.name for path in (tmp_path / "a" / "state").iterdir()) == ["4", "6"]
    shown = capsys.readouterr()
    assert "step 6/6" in shown.err and shown.out == ""

    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (2, ["query_key_value"])
    recipe = str(tmp_path / "a" / "recipe.yml")
    assert lora.main(["--config", recipe, "--output", str(tmp_path / "b")]) == 0
    again = load_file(tmp_path / "b" / WEIGHTS)
    assert {name: x.tobytes() for name, x in again.items()} == {
        name: x.tobytes() for name, x in found.items()
    }


def command(cache, data, output, *more: str) -> list[str]:
    flags = ["--data", data, "--output", str(output), "--compile-cache", cache, *SMALL, *more]
    return [sys.executable, "-m", "train.lora", *flags]


def test_killed_anywhere_it_ends_as_if_never_stopped(cache, data, tmp_path):
    often = ["--steps", "6", "--save-every", "1", "--dropout", "0.2"]
    assert train(cache, data, tmp_path / "whole", *often) == 0
    resumed = command(cache, data, tmp_path / "killed", *often, "--resume", "auto")
    rng = random.Random(7)
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(resumed, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:  # from the first step on, at any moment
            if line.startswith("step"):
                break
        time.sleep(rng.random() * 0.2)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.stderr.close()
    assert kills > 0
    done = subprocess.run(resumed, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, killed = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    lines = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "killed")]
    assert [[x["step"] for x in log] for log in lines] == [[1, 2, 3, 4, 5, 6]] * 2
    assert [x["loss"] for x in lines[0]] == [x["loss"] for x in lines[1]]


def test_a_closed_terminal_saves_and_ends_with_143(cache, data, tmp_path):
    endless = command(cache, data, tmp_path / "a", "--steps", "4000", "--save-every", "4000")
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    process = subprocess.Popen(endless, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGHUP, before)
    with process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGHUP)
                break
        rest = process.stderr.read()
    assert process.returncode == 143
    assert "resume with --resume auto" in rest
    (step,) = (tmp_path / "a" / "state").iterdir()
    assert int(step.name) >= 3 and not (tmp_path / "a" / WEIGHTS).exists()


def test_changed_flags_and_data_are_named_and_nothing_is_lost(cache, data, tmp_path):
    assert train(cache, data, tmp_path / "a") == 0
    with pytest.raises(UsageError, match="holds a training already"):
        train(cache, data, tmp_path / "a")
    with pytest.raises(UsageError, match="--rank was 2 and is 4") as refusal:
        train(cache, data, tmp_path / "a", "--resume", "auto", "--rank", "4")
    assert "--init-adapter" not in refusal.value.fix  # it would be refused
    (tmp_path / "a" / "adapter_config.json").rename(tmp_path / "config.json")
    with pytest.raises(UsageError, match="--steps was 6 and is 9") as refusal:
        train(cache, data, tmp_path / "a", "--resume", "auto", "--steps", "9")
    start = f"--init-adapter {tmp_path / 'a'}"
    place = f"--output {tmp_path / 'a-2'}"
    assert refusal.value.fix.endswith(
        f", or once it has ended, start from its result: {start} {place}."
    )
    (tmp_path / "config.json").rename(tmp_path / "a" / "adapter_config.json")
    with pytest.raises(UsageError, match="--steps was 6 and is 9") as refusal:
        train(cache, data, tmp_path / "a", "--steps", "9")
    assert refusal.value.fix.endswith(f"--output, or start from its result: {start} {place}.")
    more = ["--steps", "9", *start.split(), *place.split(), "--resume", "auto"]
    assert train(cache, data, tmp_path / "a", *more) == 0
    assert (tmp_path / "a-2" / WEIGHTS).exists()
    Path(data).write_text(json.dumps({"instruction": "a", "output": "b"}))
    with pytest.raises(UsageError, match="data was"):
        train(cache, data, tmp_path / "a", "--resume", "auto")
    with pytest.raises(UsageError, match="--init-adapter was null"):
        train(
            cache, data, tmp_path / "a", "--resume", "auto", "--init-adapter", str(tmp_path / "a")
        )


def test_sets_are_evaluated(cache, data, tmp_path, capsys):
    general = write(tmp_path / "general.jsonl", [{"instruction": "你好", "output": "你好！"}])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("3 号茶叫什么\n", encoding="utf-8")
    more = ["--val-split", "0.25", "--guard-data", general, "--eval-every", "3"]
    assert train(cache, data, tmp_path / "a", *more, "--sample-prompts", str(prompts)) == 0
    lines = [x for x in read_log(tmp_path / "a" / "log.jsonl") if x["split"] != "train"]
    assert [(x["step"], x["split"]) for x in lines] == [
        (step, split) for step in (0, 3, 6) for split in ("validation", "guard")
    ]
    assert all(x["perplexity"] == pytest.approx(np.exp(x["loss"])) for x in lines)
    assert capsys.readouterr().err.count("3 号茶叫什么 -> ") == 3


def test_early_stopping_returns_the_best_parameters(cache, data, tmp_path, capsys):
    """The model forgets from the first step what it knew."""
    known = write(
        tmp_path / "known.jsonl",
        [{"instruction": "早上好", "output": "早上好！祝你今天一切顺利。"}],
    )
    rate = ["--lr", "1e-2", "--schedule", "constant", "--warmup", "0", "--dropout", "0"]
    looking = ["--val-data", known, "--eval-every", "1", "--early-stop", "2"]
    assert train(cache, data, tmp_path / "a", *rate, *looking) == 0
    lines = read_log(tmp_path / "a" / "log.jsonl")
    found = {x["step"]: x["loss"] for x in lines if x["split"] == "validation" and x["step"]}
    best = min(found, key=lambda step: found[step])
    assert max(found) == best + 2 < 6
    assert f"the best evaluation was after step {best}" in capsys.readouterr().err
    assert train(cache, data, tmp_path / "b", *rate, "--steps", str(best)) == 0
    results = [load_file(tmp_path / name / WEIGHTS) for name in "ab"]
    for name, array in results[0].items():
        np.testing.assert_array_equal(array, results[1][name])


def test_a_step_that_is_not_finite_changes_nothing(cache, data, tmp_path, capsys):
    more = ["--lr", "1e30", "--warmup", "0", "--clip", "0", "--save-every", "1"]
    with pytest.raises(InputError, match=r"step 2 is NaN or infinite; its rows: .*:\d"):
        train(cache, data, tmp_path / "a", *more)
    assert [path.name for path in (tmp_path / "a" / "state").iterdir()] == ["1"]
    more += ["--nan-policy", "skip", "--steps", "4"]
    assert train(cache, data, tmp_path / "b", *more) == 0
    assert "3 of 4 steps were skipped" in capsys.readouterr().err
    assert np.isfinite(load_file(tmp_path / "b" / WEIGHTS).popitem()[1]).all()


def test_check_data_reads_everything_and_stops(data, tmp_path, capsys):
    with open(data, "a", encoding="utf-8") as file:
        file.write('{"instruction": "a"\n')
    code = lora.main(["--data", data, "--check-data", "--output", str(tmp_path / "a")])
    assert code == 3 and f"{data}:10" in capsys.readouterr().out
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        (["--target", "q_proj"], UsageError, "matches nothing"),
        (["--dropout", "1"], UsageError, "dropout"),
        (["--model", "/nowhere"], CheckpointError, "nowhere"),
        (["--plot", "loss.txt"], UsageError, "must end in .png"),
        (["--plot", "/nowhere/loss.png"], InputError, "cannot be written"),
        (["--log-jsonl", "-"], InputError, "cannot be written"),
        (["--max-length", "5000"], UsageError, "more than the"),
        (["--val-split", "0.99"], UsageError, "leaves none for training"),
        (["--early-stop", "2"], UsageError, "--early-stop needs --eval-every"),
        (["--early-stop", "2", "--eval-every", "1"], UsageError, "--early-stop needs --val"),
    ],
)
def test_bad_flags(cache, data, tmp_path, flags, error, words):
    if "--plot" in flags:
        pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    with pytest.raises(error, match=words):
        train(cache, data, tmp_path / "a", *flags)
    assert not (tmp_path / "a" / "state").exists()


def test_all_parameters(cache, data, tmp_path):
    flags = ["--data", data, "--output", str(tmp_path / "a"), "--compile-cache", cache]
    assert full.main([*flags, "--steps", "3", "--batch-size", "2", "--lr", "1e-3"]) == 0
    with pytest.raises(UsageError, match="--batch-size was 2 and is 4") as refusal:
        full.main([*flags, "--steps", "3", "--lr", "1e-3", "--resume", "auto"])
    result = f"--model {tmp_path / 'a' / 'model'} --output {tmp_path / 'a-2'}"
    assert refusal.value.fix.endswith(f"start from its result: {result}.")
    assert open_folder(tmp_path / "a" / "model").stored_dtype == "float32"
