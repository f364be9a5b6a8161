"""The optimizer: AdamW with a learning rate schedule, after clipping, with the defaults of PEFT.

All its numbers are arguments of a compiled step, not constants in it: see `Numbers`.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from glm2_jax import LoRA
from train.options import SCHEDULES


def warmup_steps(warmup: float, steps: int) -> int:
    """Return the number of warm-up steps: `warmup` itself, or below 1 this share of all steps."""
    # Rounded up, but never with the last step: a run of one step would learn nothing.
    return min(math.ceil(warmup * steps), steps - 1) if warmup < 1 else int(warmup)


@flax.struct.dataclass
class Schedule:
    """The learning rate of a step, made by `make_schedule`: a pytree of scalars."""

    kind: Any  # int32, index in `train.options.SCHEDULES`
    lr: Any  # float32, the highest rate
    rising: Any  # float32, warm-up steps
    falling: Any  # float32, steps after them, at least 1

    def __call__(self, count: jax.typing.ArrayLike) -> jax.Array:
        """Return the rate of a step, counted from 0."""
        rise = 1 - jnp.clip(count, 0, self.rising) / jnp.maximum(self.rising, 1)
        done = jnp.clip(count - self.rising, 0, self.falling)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * done / self.falling))
        linear = 1 - done / self.falling
        factor = jax.lax.select_n(self.kind, cosine, linear, jnp.ones_like(linear))
        return jnp.where(count < self.rising, -self.lr * rise + self.lr, self.lr * factor)


def make_schedule(name: str, *, lr: float, steps: int, warmup: float = 0.0) -> Schedule:
    """Make a schedule as transformers defines it.

    The rate rises from 0 (so the first step of a warm-up changes nothing) to `lr`, then stays there
    ("constant"), or falls to 0 linearly ("linear") or as half a cosine ("cosine").
    """
    rising = warmup_steps(warmup, steps)
    numbers = (lr, rising, max(1, steps - rising))
    return Schedule(np.int32(SCHEDULES.index(name)), *map(np.float32, numbers))


def make_optimizer(
    schedule: optax.ScalarOrSchedule,
    *,
    clip: Any = 1.0,
    weight_decay: Any = 0.0,
    ratio: Any = None,
) -> optax.GradientTransformation:
    """Make AdamW with decoupled weight decay of matrices (norms and biases have none), betas 0.9
    and 0.999, epsilon 1e-8; `clip` is the largest global norm of the gradient, 0 or None = off.

    `ratio` multiplies the learning rate of all of an adapter but A (LoRA+, arXiv 2402.12354).
    """
    mask = partial(jax.tree_util.tree_map_with_path, _decays)
    steps: list[Any] = [
        optax.adamw(schedule, 0.9, 0.999, 1e-8, weight_decay=weight_decay, mask=mask)
    ]
    # A tracer cannot be compared.
    if not (clip is None or (isinstance(clip, int | float) and clip == 0)):
        steps.insert(0, optax.clip_by_global_norm(clip))
    if ratio is not None:
        steps.append(optax.stateless(partial(_faster, ratio)))
    return optax.chain(*steps) if steps[1:] else steps[0]


def _decays(path: tuple[Any, ...], _: Any) -> bool:
    return not jax.tree_util.keystr(path[-1:]).strip("[]'.").endswith(("norm", "bias"))


def _faster(ratio: Any, updates: Any, _: Any) -> Any:
    """Multiply the updates of all arrays but "a" by the ratio."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key == "a" else ratio * x, updates
    )


@flax.struct.dataclass
class Numbers:
    """What a run may choose without compiling its step again: a pytree of scalars."""

    schedule: Schedule
    weight_decay: Any  # see `make_optimizer`
    clip: Any  # see `make_optimizer`; None (no scalar: another program) = no clipping
    ratio: Any  # see `make_optimizer`
    noise: Any  # strength of noise on the embeddings (NEFTune, arXiv 2310.05914); None = no noise
    scale: Any  # target -> scale of the adapter that is trained; None without an adapter
    kept: Any  # the share of its inputs that dropout keeps; None without dropout

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        lora: LoRA | None,
        *,
        weight_decay: float,
        clip: float,
        noise: float,
        ratio: float | None = None,
    ) -> Numbers:
        """Make the numbers of an adapter and of flags, where 0 turns `clip` and `noise` off."""
        dropout = 0 if lora is None else lora.dropout
        return cls(
            schedule,
            np.float32(weight_decay),
            np.float32(clip) if clip else None,
            None if ratio is None else np.float32(ratio),
            np.float32(noise) if noise else None,
            None if lora is None else {name: np.float32(x) for name, x in lora.scale.items()},
            np.float32(1 - dropout) if dropout else None,
        )

    def optimizer(self) -> optax.GradientTransformation:
        """Return the optimizer with these numbers."""
        options = {"clip": self.clip, "weight_decay": self.weight_decay, "ratio": self.ratio}
        return make_optimizer(self.schedule, **options)

    def put_into(self, lora: Any) -> Any:
        """Return an adapter with `scale` and `kept` among its arrays, one for each layer; what is
        not a LoRA stays as it is."""
        if not isinstance(lora, LoRA):
            return lora
        layers = {}
        for target, weights in lora.layers.items():
            numbers = {"scale": self.scale[target], "kept": self.kept}
            shape = weights["a"].shape[:1]
            layers[target] = weights | {
                key: jnp.broadcast_to(x, shape) for key, x in numbers.items() if x is not None
            }
        return dataclasses.replace(lora, layers=layers)
