"""The same command trains in one process, and in two of four devices each, with the same losses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.checkpoints import random_params, save, tiny_config
from tests.training_data import alpaca, write_rows
from train import lora
from train.log import read_log

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true"}  # compiling is what costs
STEPS = 4
WEIGHTS = "adapter_model.safetensors"

pytestmark = pytest.mark.skipif(
    "--mesh" not in lora.parser()._option_string_actions, reason="training takes no mesh yet"
)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """(the words that train three rows at once, but for --output)."""
    folder = tmp_path_factory.mktemp("given")
    config = tiny_config(num_layers=1)
    save(folder / "model", random_params(config), config)
    write_rows(folder / "d.jsonl", [alpaca(f"Q{i}", "A" * (i + 1)) for i in range(7)])
    flags = {"data": folder / "d.jsonl", "model": folder / "model", "batch-size": 3, "rank": 2,
             "grad-accum": 1, "steps": STEPS, "save-every": 1, "log-every": 1, "lr": 1e-2,
             "dtype": "float32", "max-length": 64, "keep": STEPS, "dropout": 0,
             "compile-cache": folder / "compiled"}  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "train.lora", *words, "--no-grad-checkpoint"]


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """The folder of a run in one process."""
    output = tmp_path_factory.mktemp("alone")
    run([*command, "--output", output])
    return output


@pytest.fixture(scope="module")
def together(command, tmp_path_factory):
    """The folder of a run in two processes, and what it said.

    Three rows on data=4: one is added, and counts for nothing.
    """
    output = tmp_path_factory.mktemp("together")
    launcher = [sys.executable, "-m", "infer.launch", "--num-processes", "2",
                "--devices-per-process", "4", "--"]  # fmt: skip
    return output, run([*launcher, *command, "--output", output, "--mesh", "data=4,tensor=2"])


def run(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return done.stderr


def losses(output):
    return [line["loss"] for line in read_log(output / "log.jsonl")]


def test_two_processes_train_as_one_does(alone, together):
    output, told = together
    assert "process 1" not in told
    assert told.count("the result is in") == told.count(f"step {STEPS}/{STEPS}") == 1
    assert len(losses(alone)) == STEPS
    np.testing.assert_allclose(losses(output), losses(alone), rtol=1e-5)
    found, wanted = load_file(output / WEIGHTS), load_file(alone / WEIGHTS)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=1e-4)


def test_one_process_goes_on_with_the_checkpoint_of_two(command, alone, together, tmp_path):
    """As if the two had been lost after their second step."""
    output = shutil.copytree(together[0], tmp_path / "output")
    for step in range(3, STEPS + 1):
        shutil.rmtree(output / "state" / str(step))
    assert "going on after step 2" in run([*command, "--output", output, "--resume", "auto"])
    np.testing.assert_allclose(losses(output), losses(alone), rtol=1e-5)
