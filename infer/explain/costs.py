"""What keys and values take, and the least time that devices need. No jax."""

from __future__ import annotations

from glm2_jax.config import GLMConfig
from infer.explain.facts import Bound, Cache, Pass
from infer.memory.devices import Card
from infer.memory.plan import Precision, cache_bytes


def cache_costs(config: GLMConfig, precision: Precision, batch: int, length: int) -> Cache:
    """Of prompts of `length` tokens, `batch` of them."""
    token = cache_bytes(config, precision.size, 1, 1)
    return Cache(
        per_token=token,
        with_full_heads=token * config.num_heads // config.num_kv_heads,
        now=token * length * batch,
        at_most=token * config.seq_length * batch,
    )


def bound(card: Card, batch: int, weights: int, prefill: Pass, decode: Pass, cache: Cache) -> Bound:
    """The least time of both passes on a device: either its memory or its products take as long.

    Args:
      weights: bytes of the whole model.
    """
    read, read_limit = _least(card, prefill)
    step, step_limit = _least(card, decode)
    return Bound(
        device=card.name,
        memory=card.memory,
        bandwidth=card.bandwidth,
        flops=card.flops,
        fits=weights + cache.now + batch * cache.per_token <= card.memory,
        ridge=None if card.flops is None else card.flops / card.bandwidth,
        prefill=read,
        prefill_limit=read_limit,
        decode=step,
        decode_limit=step_limit,
        tokens_per_s=batch / step,
    )


def _least(card: Card, work: Pass) -> tuple[float, str]:
    moving = work.bytes / card.bandwidth
    computing = 0.0 if card.flops is None else work.flops / card.flops
    return max((moving, "memory"), (computing, "products"))
