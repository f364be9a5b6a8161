"""Training over several devices and in several processes: the losses of one device, whatever was
saved where. As a program, this trains on meshes of eight devices."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from glm2_jax import GLMConfig, init_lora, lora_sharding, make_mesh, params_sharding, parse_mesh
from glm2_jax.choices import FAMILIES
from glm2_jax.schemes import SCHEMES
from tests.support.checkpoints import save, tiny_config
from tests.support.mesh_process import run
from tests.support.paths import ROOT
from tests.support.toy import quantized, toy_params
from tests.support.training_data import alpaca, write_rows
from train import lora
from train.data.batch import Batch
from train.devices import Devices
from train.optim import Numbers, make_schedule
from train.run_folder.checkpoints import Checkpoints
from train.run_folder.log import read_log
from train.step import make_eval, make_step

LIMIT = 240  # seconds; a fail-safe alone
FLAGS = [
    "--batch-size", "3", "--grad-accum", "2", "--rank", "2", "--lr", "1e-2", "--warmup", "0",
    "--log-every", "1", "--steps", "12", "--save-every", "2", "--keep", "9", "--val-split", "0.3",
    "--max-length", "64", "--neftune", "5", "--no-grad-checkpoint",
]  # fmt: skip
WEIGHTS = "adapter_model.safetensors"


CONFIG = GLMConfig(2, 104, 64, 96, 8, 2, 16, 64)
A, B, T, STEPS, SAVED = 2, 3, 16, 4, 2  # three rows: no mesh of these divides them

# Name -> the scheme of the base, or "full"; and the meshes to compare with one device. Families are
# trained by an adapter.
CASES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "lora": (None, ("tensor=8", "data=2,tensor=4", "data=8")),
    "int8": ("int8", ("data=2,fsdp=2,tensor=2",)),
    "full": ("full", ("tensor=2,fsdp=2,data=2",)),
    "chatglm": (None, ("data=2,fsdp=2,tensor=2",)),
}


def config_of(name: str) -> GLMConfig:
    """The model of a case."""
    config = dataclasses.replace(CONFIG, family=name if name in FAMILIES else CONFIG.family)
    if config.block.bidirectional:
        ids: Any = {"sop_token_id": 1, "mask_token_id": 2, "gmask_token_id": 2}
        config = dataclasses.replace(config, num_kv_heads=config.num_heads, **ids)
    return config


def batch(config: GLMConfig, number: int) -> Batch:
    """What a step learns from: rows of several sequences and padding after them."""
    random = np.random.default_rng(number)
    tokens = random.integers(3, config.vocab_size, (A, B, T)).astype(np.int32)
    segments = np.repeat([[1, 2, 0]], (6, 7, 3), axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(6), np.arange(7), np.zeros(3)]).astype(np.int32)
    segments, positions = (np.broadcast_to(x, (A, B, T)) for x in (segments[0], positions))
    learned = (positions > 0) & (segments > 0)
    if config.block.bidirectional:  # a mask and <sop> are in every sequence; learned is the rest
        tokens = np.select([positions == 2, positions == 3], [2, 1], tokens).astype(np.int32)
        learned = positions > 3
    return Batch(tokens, segments, positions, learned)


def adapter(config: GLMConfig) -> Any:
    lora = init_lora(config, jax.random.key(3), rank=4, targets="attn+mlp", dropout=0.2)
    random = np.random.default_rng(4)
    return jax.tree.map(lambda x: np.asarray(random.normal(0, 0.1, x.shape), x.dtype), lora)


class Case:
    """One form of training on one device, or on a mesh."""

    def __init__(self, name: str, text: str | None):
        config = self.config = config_of(name)
        mesh = None if text is None else make_mesh(parse_mesh(text))
        self.devices = Devices(jax.devices()[0], mesh)
        self.full, scheme = name == "full", SCHEMES.get(CASES[name][0] or "")
        params, lora = toy_params(config), None if self.full else adapter(config)
        params = params if scheme is None else quantized(params, scheme)[0]
        places = None if mesh is None else params_sharding(config, mesh, scheme=scheme)
        params = trained = self.devices.put(params, places)
        if lora is not None:
            trained = self.devices.put(lora, None if mesh is None else lora_sharding(lora, mesh))
        self.base = None if self.full else params
        # A copy, because steps use it up, and on a CPU it may be the host's own memory.
        trained = jax.tree.map(jnp.copy, trained)
        schedule = make_schedule("constant", lr=1e-2, steps=1)
        self.numbers = Numbers.of(schedule, lora, weight_decay=0.1, clip=1.0, noise=5.0)
        state = self.devices.state(self.numbers.optimizer(), trained, loss_scaling=False)
        self.start = trained, state
        self.key = self.devices.key(7)
        step = make_step(config, remat="none", out_shardings=self.devices.shardings(*self.start))
        rows = self.devices.batch(batch(config, 0))
        with self.devices.active():
            lowered = step.lower(self.base, *self.start, rows, self.key, 0, self.numbers)
            self.program = lowered.compile()

    def go(self, state: Any, steps: range) -> tuple[Any, list[list[float]]]:
        """(what is trained and the optimizer's state, loss and norm of the steps)."""
        found = []
        for number in steps:
            rows = self.devices.batch(batch(self.config, number))
            *state, metrics = self.program(self.base, *state, rows, self.key, number, self.numbers)
            found.append([float(metrics.loss), float(metrics.grad_norm)])
        return tuple(state), found

    def validation(self, trained: Any) -> float:
        rows = self.devices.batch(jax.tree.map(lambda x: x[0], batch(self.config, 99)))
        params, lora = (trained, None) if self.full else (self.base, trained)
        with self.devices.active():
            total, count = make_eval(self.config)(params, lora, rows)
        return float(total) / int(count)


def share(tree: Any) -> float:
    """Of all bytes of a tree, those that one device holds."""
    whole = sum(x.nbytes for x in jax.tree.leaves(tree))
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)) / whole


def look_at(name: str, folder: Path) -> list[dict[str, Any]]:
    """The case on all its meshes: each starts by itself, and resumes from what another one saved,
    the first of them with what one device did, and one device with what the last of them did."""
    meshes = (None, *CASES[name][1])
    cases = [Case(name, text) for text in meshes]
    found, saved = [], []
    for number, case in enumerate(cases):
        state, losses = case.go(case.start, range(SAVED))
        with Checkpoints(folder / f"{name}{number}", keep=1) as checkpoints:
            checkpoints.save(SAVED, state, {"step": SAVED})
        last = number in (0, len(cases) - 1)  # one program more for each
        found.append({
            "mesh": meshes[number], "name": name, "losses": losses, "trained": share(state[0]),
            "adam": share(state[1].optimizer),
            "validation": case.validation(state[0]) if last else None,
        })  # fmt: skip
        saved.append(state)
    whole: list[list[float]] = []
    for number, case in enumerate(cases):
        with Checkpoints(folder / f"{name}{(number or len(cases)) - 1}", keep=1) as checkpoints:
            state, _ = checkpoints.restore(SAVED, saved[number])
        same = jax.tree.map(lambda x, y: x.sharding == y.sharding, state, saved[number])
        _, losses = case.go(state, range(SAVED, STEPS))
        found[number] |= {"resumed": losses, "placed": all(jax.tree.leaves(same))}
        if number == 0:
            _, whole = case.go(saved[0], range(SAVED, STEPS))
    return [one | {"whole": whole} for one in found]


@pytest.fixture(scope="module")
def found():
    return run("tests.train.test_mesh_training")


def test_meshes_give_the_losses_of_one_device(found):
    """With dropout and noise, of rows that the mesh does not divide, also where it goes on with
    what was saved on another mesh."""
    assert {name: len(cases) for name, cases in found.items()} == {
        "lora": 4, "int8": 2, "full": 2, "chatglm": 2,
    }  # fmt: skip
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
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
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


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps({name: look_at(name, Path(temporary)) for name in CASES}))
