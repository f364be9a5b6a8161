"""Looking at a model while it is trained: losses of sets that it does not learn, and answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from glm2_jax import GLMConfig
from train.data.batches import Batches
from train.data.dataset import Dataset
from train.data.split import Subset
from train.devices import Devices
from train.step import make_eval

VALIDATION, GUARD = "validation", "guard"


class Validation:
    """The losses of some sets.

    Args:
        config: the architecture.
        sets: name -> rows.
        batch_size: rows computed at once.
        devices: where to compute.
    """

    def __init__(
        self,
        config: GLMConfig,
        sets: Mapping[str, Dataset | Subset],
        batch_size: int,
        devices: Devices,
    ):
        self._loss, self._devices = make_eval(config), devices
        own = devices.rows(batch_size)
        self._sets = {
            name: Batches(rows, batch_size=batch_size, shuffle=False, rows=own)
            for name, rows in sets.items()
        }

    def __call__(self, params: Any, lora: Any) -> dict[str, dict[str, float]]:
        """Name of a set -> `loss`, nats per learned token, and `perplexity`."""
        return {name: self._figures(params, lora, rows) for name, rows in self._sets.items()}

    def _figures(self, params: Any, lora: Any, batches: Batches) -> dict[str, float]:
        sums = []
        for number in range(batches.steps_per_epoch(0)):
            batch, _ = batches.at(0, number)
            one = self._devices.batch(jax.tree.map(lambda x: x[0], batch))
            with self._devices.active():
                sums.append(self._loss(params, lora, one))
        totals = jax.device_get(sums)
        loss = math.fsum(float(s) for s, _ in totals) / sum(int(n) for _, n in totals)
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else loss * math.inf}


def answer(
    engine: Any, prompts: list[str], say: Callable[[str], None], max_new_tokens: int = 64
) -> None:
    """Answers questions greedily and says them with their answers."""
    found = engine.generate(prompts, do_sample=False, max_new_tokens=max_new_tokens)
    for prompt, completion in zip(prompts, found, strict=True):
        say(f"  {prompt} -> {' '.join(completion.text.split())}")
