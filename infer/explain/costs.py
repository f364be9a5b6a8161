"""What keys and values take, and the least time that devices need. No jax."""

from __future__ import annotations

from glm2_jax.config import GLMConfig
from infer.explain.facts import Bound, Cache, Pass
from infer.memory.budget import find_budget
from infer.memory.cards import Card
from infer.memory.plan import Plan, cache_bytes
from infer.memory.precision import Precision

SCORED = ("attention.scores", "attention.values")  # stages that work on pairs of tokens


def cache_costs(config: GLMConfig, precision: Precision, batch: int, length: int) -> Cache:
    """Of prompts of `length` tokens, `batch` of them."""
    token = cache_bytes(config, precision.size, 1, 1)
    return Cache(
        per_token=token,
        with_full_heads=token * config.num_heads // config.num_kv_heads,
        now=token * length * batch,
        at_most=token * config.seq_length * batch,
    )


def bound(
    card: Card, config: GLMConfig, precision: Precision, batch: int, prefill: Pass, decode: Pass
) -> Bound:
    """The least time of both passes on a device: its bandwidth or its arithmetic takes as long."""
    head = prefill.stages[-1].flops  # of which answering takes one position of each row
    left_out = head - head // prefill.tokens + config.num_layers * _unseen(prefill)
    read, read_limit = _least(card, prefill, left_out)
    step, step_limit = _least(card, decode)
    plan = Plan(config, precision, decode.keys, batch, platform=card.platform)
    usable = find_budget(card.name).memory
    return Bound(
        device=card.name,
        memory=card.memory,
        bandwidth=card.bandwidth,
        flops=card.flops,
        fits=usable is not None and plan.total <= usable,
        ridge=None if card.flops is None else card.flops / card.bandwidth,
        prefill=read,
        prefill_limit=read_limit,
        decode=step,
        decode_limit=step_limit,
        tokens_per_s=batch / step,
    )


def _unseen(work: Pass) -> int:
    """A layer's operations for keys that come after the token that asks: a program may skip them.

    Of T tokens on S keys, T (T - 1) / 2 of the T S pairs are such.
    """
    flops = sum(stage.flops for stage in work.stages if stage.name in SCORED)
    return flops * (work.tokens - 1) // (2 * work.keys)


def _least(card: Card, work: Pass, left_out: int = 0) -> tuple[float, str]:
    moving = work.bytes / card.bandwidth
    if card.flops is None:
        return moving, "unknown"
    return max((moving, "bandwidth"), ((work.flops - left_out) / card.flops, "arithmetic"))
