"""The optimiser: AdamW under a schedule, after clipping, with what PEFT's users are used to."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps of warm-up: `warmup` itself, or below 1 that part of all steps, rounded up, but never
    the last one: a run of one step would learn nothing."""
    return min(math.ceil(warmup * steps), steps - 1) if warmup < 1 else int(warmup)


def make_schedule(name: str, *, lr: float, steps: int, warmup: float = 0.0) -> optax.Schedule:
    """The learning rate of a step, counted from 0, as transformers' schedulers define it.

    It rises from 0 (so the first step of a warm-up changes nothing) to `lr`, then stays there
    ("constant"), or falls to 0 in a straight line ("linear") or as half a cosine ("cosine").

    Args:
        name: one of `train.options.SCHEDULES`.
        lr: the highest rate.
        steps: of the whole run.
        warmup: see `warmup_steps`.
    """
    rising = warmup_steps(warmup, steps)
    falling = max(1, steps - rising)
    after = {
        "cosine": optax.cosine_decay_schedule(lr, falling),
        "linear": optax.linear_schedule(lr, 0.0, falling),
        "constant": optax.constant_schedule(lr),
    }[name]
    if rising == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, lr, rising), after], [rising])


def make_optimizer(
    schedule: optax.ScalarOrSchedule, *, clip: float = 1.0, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay; betas 0.9 and 0.999, epsilon 1e-8.

    Args:
        schedule: the learning rate; of steps that were applied.
        clip: the largest global norm of the gradient; 0 = not clipped.
        weight_decay: of matrices; norms and biases have none.
    """
    adamw = optax.adamw(schedule, 0.9, 0.999, 1e-8, weight_decay=weight_decay, mask=_decays)
    return optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw


def _decays(params: Any) -> Any:
    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return not jax.tree_util.keystr(path[-1:]).strip("[]'.").endswith(("norm", "bias"))

    return jax.tree_util.tree_map_with_path(decays, params)
