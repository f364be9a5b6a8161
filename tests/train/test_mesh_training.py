"""Training over several devices and in several processes: the losses of one device, whatever was
saved where."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from glm2_jax.errors import UsageError
from tests.support import hurry
from tests.support.checkpoints import save, tiny_config
from tests.support.mesh_process import run
from tests.support.paths import ROOT
from tests.support.training_data import alpaca, write_rows
from train import lora
from train.run_folder.log import read_log

LIMIT = 240  # seconds; a fail-safe alone
FLAGS = [
    "--batch-size", "3", "--grad-accum", "2", "--rank", "2", "--lr", "1e-2", "--warmup", "0",
    "--log-every", "1", "--steps", "12", "--save-every", "2", "--keep", "9", "--val-split", "0.3",
    "--max-length", "64", "--neftune", "5", "--no-grad-checkpoint",
]  # fmt: skip
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def found():
    return run("tests.support.mesh_training")


def test_meshes_give_the_losses_of_one_device(found):
    """With dropout and noise, of rows that the mesh does not divide, also where it goes on with
    what was saved on another mesh."""
    assert {name: len(cases) for name, cases in found.items()} == {"lora": 4, "int8": 2, "full": 2}
    for one, *others in found.values():
        wanted = {"losses": one["losses"], "resumed": one["whole"]}
        for case in (one, *others):
            for name, steps in wanted.items():
                for (loss, norm), (wanted_loss, wanted_norm) in zip(case[name], steps, strict=True):
                    # Adam's first steps are signs of gradients, and some of those are roundings.
                    assert loss == pytest.approx(wanted_loss, rel=5e-5), case
                    assert norm == pytest.approx(wanted_norm, rel=1e-3), case
        assert others[-1]["validation"] == pytest.approx(one["validation"], rel=1e-4)
        assert one["whole"][-1][0] != pytest.approx(one["losses"][0][0], rel=1e-2)


def test_trained_arrays_and_moments_are_sharded_like_the_weights(found):
    for case in (case for cases in found.values() for case in cases):
        assert case["placed"], case
        assert case["adam"] == pytest.approx(case["trained"], rel=1e-2), case
    parts = {(x["name"], x["mesh"]): x["trained"] for cases in found.values() for x in cases}
    assert parts["lora", None] == parts["lora", "data=8"] == 1
    assert parts["lora", "tensor=8"] < parts["lora", "data=2,tensor=4"] < 0.6
    assert parts["full", "tensor=2,fsdp=2,data=2"] < 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, rows to learn, and the outcome of one device: (folder, flags of all runs)."""
    path = tmp_path_factory.mktemp("training")
    save(path / "model", config=tiny_config(num_layers=1))
    rows = [alpaca(f"{i} 号茶叫什么", f"它叫青山{i}号。") for i in range(7)]
    write_rows(path / "data.jsonl", rows)
    flags = ["--model", str(path / "model"), "--data", str(path / "data.jsonl"), *FLAGS]
    assert lora.main([*flags, "--output", str(path / "one")]) == 0
    return path, flags


@contextlib.contextmanager
def two(flags, output):
    """The command in two processes of four devices, with its checkpoints elsewhere."""
    command = [sys.executable, "-m", "infer.launch", "--num-processes", "2",
               "--devices-per-process", "4", "--", sys.executable, "-m", "train.lora",
               "--mesh", "data=4,tensor=2", *flags, "--output", str(output),
               "--checkpoints", f"{output}-kept"]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"XLA_FLAGS": hurry.FLAGS},
    ) as launcher:  # fmt: skip
        try:
            yield launcher
        finally:
            launcher.terminate()


def assert_same(one: Path, other: Path) -> None:
    """Of two runs the logs, evaluations included, and the adapters."""
    logs = [read_log(path / "log.jsonl") for path in (one, other)]
    for line, same in zip(*logs, strict=True):
        assert (line["step"], line["split"]) == (same["step"], same["split"])
        assert line["loss"] == pytest.approx(same["loss"], rel=1e-5)
    wanted, found = (load_file(path / WEIGHTS) for path in (one, other))
    assert wanted.keys() == found.keys()
    for name, array in wanted.items():
        assert np.linalg.norm(found[name] - array) < 1e-3 * np.linalg.norm(array), name


def children(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_run_of_two_processes_resumes(folder):
    """Killed between two steps, it is resumed by two processes, and by one."""
    path, flags = folder
    with two(flags, path / "two") as both:
        assert both.stderr is not None
        assert any(line.startswith("step 5/") for line in both.stderr)
        os.kill(children(both.pid)[1], signal.SIGKILL)
        _, err = both.communicate(timeout=LIMIT)
    assert both.returncode == 5 and "Traceback" not in err
    assert "process 1 of 2 was terminated by SIGKILL; the others are terminated" in err
    assert not (path / "two" / WEIGHTS).exists() and not (path / "two" / "state").exists()
    kept = path / "two-kept"
    taken = max(int(x.name) for x in (kept / "state").iterdir() if x.name.isdecimal())
    assert 2 <= taken < 12
    shutil.copytree(path / "two", path / "alone")
    shutil.copytree(kept, path / "alone", dirs_exist_ok=True)

    with two([*flags, "--resume", "auto"], path / "two") as both:
        out, err = both.communicate(timeout=LIMIT)
    assert (both.returncode, out) == (0, ""), err
    assert err.count(f"resuming after step {taken} of 12") == 1 and err.count("step 12/12") == 1
    assert_same(path / "one", path / "two")

    assert lora.main([*flags, "--output", str(path / "alone"), "--resume", "auto"]) == 0
    assert_same(path / "one", path / "alone")


def test_meshes_that_do_not_fit(folder, tmp_path):
    path, flags = folder
    flags = [*flags, "--output", str(tmp_path / "a")]
    with pytest.raises(UsageError, match="There is 1 device"):
        lora.main([*flags, "--mesh", "data=2,tensor=4"])
    with pytest.raises(UsageError, match="tensor=3 needs 3 devices"):
        lora.main([*flags, "--tp", "3"])
    with pytest.raises(SystemExit):
        lora.main([*flags, "--tp", "3", "--mesh", "data=1"])
    assert not (tmp_path / "a").exists()
