"""Evaluation during training: losses of sets that are not trained on, and sample answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from glm2_jax.cli.messages import note
from glm2_jax.lora import with_lora
from infer.engine.engine import Engine
from train.data.batches import Batches
from train.data.dataset import Dataset
from train.devices import Devices
from train.methods import Method
from train.programs import Programs, with_scale
from train.step import make_eval

VALIDATION, GUARD = "validation", "guard"
Figures = dict[str, dict[str, float]]


def make_evaluation(
    method: Method,
    sets: Mapping[str, Dataset],
    prompts: Sequence[str],
    batch_size: int,
    devices: Devices,
    programs: Programs | None = None,
    **objective: Any,
) -> Callable[[tuple[Any, Any]], Figures] | None:
    """Return a function of (what is trained, its `State`), or None if there is nothing to evaluate.

    It prints greedy answers to the prompts, and returns for each name of `sets` the `loss`, nats
    per learned token, and the `perplexity`; with an `objective` its loss alone.
    """
    if not sets and not prompts:
        return None
    config, rows = method.checkpoint.config, devices.rows(batch_size)
    programs = Programs() if programs is None else programs
    loss_of = programs.shared(
        ("loss", config, *objective.values()), lambda: make_eval(config, **objective)
    )
    batches = {
        name: Batches(dataset, batch_size=batch_size, shuffle=False, rows=rows)
        for name, dataset in sets.items()
    }
    engine = Engine(method.checkpoint) if prompts else None

    def figures(params: Any, lora: Any, of_set: Batches) -> dict[str, float]:
        sums = []
        for number in range(of_set.steps_per_epoch(0)):
            one = devices.batch(jax.tree.map(lambda x: x[0], of_set.at(0, number).batch))
            with devices.active():
                sums.append(loss_of(params, lora, one))
        totals = jax.device_get(sums)
        loss = math.fsum(float(s) for s, _ in totals) / sum(int(n) for _, n in totals)
        if objective:
            return {"loss": loss}
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else loss * math.inf}

    def evaluate(state: tuple[Any, Any]) -> Figures:
        params, lora = method.model(state[0])
        lora = with_scale(lora)
        if engine is not None:
            whole = params if lora is None else with_lora(params, lora)
            engine.checkpoint = dataclasses.replace(method.checkpoint, params=whole)
            found = engine.generate(prompts, do_sample=False, max_new_tokens=64)
            for prompt, completion in zip(prompts, found, strict=True):
                note(f"  {prompt} -> {' '.join(completion.text.split())}")
        return {name: figures(params, lora, of_set) for name, of_set in batches.items()}

    return evaluate
