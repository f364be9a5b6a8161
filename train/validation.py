"""Evaluation during training: losses of sets that are not trained on, and sample answers."""

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


def make_validation(
    config: GLMConfig, sets: Mapping[str, Dataset | Subset], batch_size: int, devices: Devices
) -> Callable[[Any, Any], dict[str, dict[str, float]]]:
    """Return a function of (params, adapter or None) that computes the losses of some sets.

    It returns for each name of `sets` the `loss`, nats per learned token, and the `perplexity`.
    """
    loss_of, rows = make_eval(config), devices.rows(batch_size)
    batches = {
        name: Batches(dataset, batch_size=batch_size, shuffle=False, rows=rows)
        for name, dataset in sets.items()
    }

    def figures(params: Any, lora: Any, of_set: Batches) -> dict[str, float]:
        sums = []
        for number in range(of_set.steps_per_epoch(0)):
            one = devices.batch(jax.tree.map(lambda x: x[0], of_set.at(0, number).batch))
            with devices.active():
                sums.append(loss_of(params, lora, one))
        totals = jax.device_get(sums)
        loss = math.fsum(float(s) for s, _ in totals) / sum(int(n) for _, n in totals)
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else loss * math.inf}

    return lambda params, lora: {name: figures(params, lora, x) for name, x in batches.items()}


def print_answers(engine: Any, prompts: list[str], show: Callable[[str], None]) -> None:
    """Answer prompts greedily and show them with their answers."""
    found = engine.generate(prompts, do_sample=False, max_new_tokens=64)
    for prompt, completion in zip(prompts, found, strict=True):
        show(f"  {prompt} -> {' '.join(completion.text.split())}")
