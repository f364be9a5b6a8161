"""Training on meshes of eight devices, compared with one; for tests/train/test_mesh_training.py."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig, init_lora, lora_sharding, make_mesh, params_sharding, parse_mesh
from glm2_jax.schemes import SCHEMES
from tests.support.toy import quantized, toy_params
from train.data.batch import Batch
from train.devices import Devices
from train.optim import Numbers, make_schedule
from train.run_folder.checkpoints import Checkpoints
from train.step import make_eval, make_step

CONFIG = GLMConfig(2, 104, 64, 96, 8, 2, 16, 64)
A, B, T, STEPS, SAVED = 2, 3, 16, 4, 2  # three rows: no mesh of these divides them

# Name -> the scheme of the base, or "full"; and the meshes to compare with one device.
CASES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "lora": (None, ("tensor=8", "data=2,tensor=4", "data=8")),
    "int8": ("int8", ("data=2,fsdp=2,tensor=2",)),
    "full": ("full", ("tensor=2,fsdp=2,data=2",)),
}


def batch(number: int) -> Batch:
    """What a step learns from: rows of several sequences and padding after them."""
    random = np.random.default_rng(number)
    tokens = random.integers(3, CONFIG.vocab_size, (A, B, T)).astype(np.int32)
    segments = np.repeat([[1, 2, 0]], (6, 7, 3), axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(6), np.arange(7), np.zeros(3)]).astype(np.int32)
    segments, positions = (np.broadcast_to(x, (A, B, T)) for x in (segments[0], positions))
    return Batch(tokens, segments, positions, (positions > 0) & (segments > 0))


def adapter() -> Any:
    lora = init_lora(CONFIG, jax.random.key(3), rank=4, targets="attn+mlp", dropout=0.2)
    random = np.random.default_rng(4)
    return jax.tree.map(lambda x: np.asarray(random.normal(0, 0.1, x.shape), x.dtype), lora)


class Case:
    """One form of training on one device, or on a mesh."""

    def __init__(self, name: str, text: str | None):
        mesh = None if text is None else make_mesh(parse_mesh(text))
        self.devices = Devices(jax.devices()[0], mesh)
        self.full, scheme = name == "full", SCHEMES.get(CASES[name][0] or "")
        params, lora = toy_params(CONFIG), None if self.full else adapter()
        params = params if scheme is None else quantized(params, scheme)[0]
        places = None if mesh is None else params_sharding(CONFIG, mesh, scheme=scheme)
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
        step = make_step(CONFIG, remat=False, out_shardings=self.devices.shardings(*self.start))
        rows = self.devices.batch(batch(0))
        with self.devices.active():
            lowered = step.lower(self.base, *self.start, rows, self.key, 0, self.numbers)
            self.program = lowered.compile()

    def go(self, state: Any, steps: range) -> tuple[Any, list[list[float]]]:
        """(what is trained and the optimizer's state, loss and norm of the steps)."""
        found = []
        for number in steps:
            rows = self.devices.batch(batch(number))
            *state, metrics = self.program(self.base, *state, rows, self.key, number, self.numbers)
            found.append([float(metrics.loss), float(metrics.grad_norm)])
        return tuple(state), found

    def validation(self, trained: Any) -> float:
        rows = self.devices.batch(jax.tree.map(lambda x: x[0], batch(99)))
        params, lora = (trained, None) if self.full else (self.base, trained)
        with self.devices.active():
            total, count = make_eval(CONFIG)(params, lora, rows)
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


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps({name: look_at(name, Path(temporary)) for name in CASES}))
