"""Grouped-query attention, in blocks of queries and keys where there are many scores, or in another
form where measuring has chosen one.

Query heads are viewed as K groups of G = N / K, so keys are never repeated. Scores, softmax and
sums are float32.

In products the axes of queries are in the order BKGTH, so that neither they nor their gradients
multiply two transposed matrices, which XLA:CPU of jax 0.10 refuses in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from glm2_jax import flash, forms
from glm2_jax.chunked import map_blocks
from glm2_jax.forms import Attention
from glm2_jax.limits import KEYS, SCORES
from glm2_jax.linear import einsum
from glm2_jax.mesh import active_mesh, pieces
from glm2_jax.quant import QTensor

_LOWEST = float(jnp.finfo(jnp.float32).min)  # finite: a query that sees nothing gives no NaN
_PARTS = 16  # of the keys, which are computed at the same time


@flax.struct.dataclass
class Visibility:
    """Says which keys a query sees: those of its segment up to its own place, and the prefix."""

    places: jax.Array  # int32 [B, T], index of each query's own key
    segments: jax.Array  # int32 [B, T], segment of each query
    key_segments: jax.Array  # int32 [B, S], segment of each key; 0 = no query sees it
    # Number of leading keys that the queries of all segments see.
    prefix: int = flax.struct.field(pytree_node=False, default=0)
    # Whether the keys are those of the queries and nothing else, the places 0, 1, 2, ....
    whole: bool = flax.struct.field(pytree_node=False, default=False)

    def mask(self, start: jax.Array | int, size: int) -> jax.Array:
        """Return bool [B, T, size] for the `size` keys from `start` on."""
        keys = jax.lax.dynamic_slice_in_dim(self.key_segments, start, size, axis=1)[:, None]
        numbers = start + jnp.arange(size, dtype=jnp.int32)
        causal = numbers <= self.places[..., None]
        own = keys == self.segments[..., None]
        if self.prefix:
            own |= numbers < self.prefix
        return causal & own & (keys > 0)


def attend(
    q: jax.Array,
    k: jax.Array | QTensor,
    v: jax.Array | QTensor,
    visible: Visibility,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Compute softmax(q k^T / sqrt(H)) v over the keys that each query sees: [B, T, N, H].

    q is [B, T, N, H]; k and v are [B, K, S, H] in its dtype or a wider one, or int8 with scales
    [B, K, S]. Unseen keys may hold anything, NaN included; all values are finite, see
    `finite_values`. The result has q's dtype; that of a query that sees nothing is finite and
    arbitrary. With `dropout`, which is applied to them, all probabilities are computed at once.
    """
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    form = forms.chosen().of_attention(Attention(T, S, visible.whole))
    floats = not isinstance(k, QTensor)  # the other forms know nothing else
    if form is not None and floats and dropout is None and not active_mesh():
        if B * T * S * _WRITES.get(form, N) <= SCORES:
            return ATTENTION[form](q, k, v, visible)
    q = q.reshape(B, T, K, N // K, H)
    local = B * N // (pieces("B", B) * pieces("N", N))  # rows times heads on one device
    # The scores of one query are few compared with the cache, whose blocks would be copied.
    if dropout is None and T > 1 and local * T * S > SCORES:
        keys = min(KEYS, S)
        queries = max(1, SCORES // (local * keys))

        def block(q: jax.Array, places: jax.Array, segments: jax.Array) -> jax.Array:
            part = Visibility(places, segments, visible.key_segments, visible.prefix)
            return _over_blocks(q, k, v, part, keys)

        # In training a block's scores are recomputed, not kept.
        block = jax.checkpoint(block)
        out = map_blocks(block, queries, q, visible.places, visible.segments)
    else:
        probs = jax.nn.softmax(scaled_scores(q, k, visible.mask(0, S)), axis=-1)
        probs = probs if dropout is None else dropout(probs)
        out = _weighted(probs, v, q.dtype)
        out = jnp.einsum("BKGTH->BTKGH", out)
    return out.reshape(B, T, N, H).astype(q.dtype)


def finite_values(k: jax.Array, v: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return keys and values [B, T, K, H] of which the values are finite.

    A probability of 0 does not silence a NaN, but a mask over scores does. So a value that is not
    finite becomes 0, and its key NaN: queries that see it get NaN as before, the others nothing.
    Keys of padding, where `real` (bool [B, T]) is False, stay as they are.
    """
    finite = jnp.isfinite(v).all(axis=-1, keepdims=True)
    return jnp.where(finite | ~real[..., None, None], k, jnp.nan), jnp.where(finite, v, 0)


def scaled_scores(q: jax.Array, k: jax.Array | QTensor, mask: jax.Array) -> jax.Array:
    """Return q k^T / sqrt(H), the lowest float32 where the mask [B, T, S] is False.

    The queries are [B, T, K, G, H], the keys [B, K, S, H], the scores float32 [B, K, G, T, S].
    A mask that differs between key/value heads is [B, K, T, S].
    """
    q = jnp.einsum("BTKGH->BKGTH", q)
    scores = _products(q, k) / jnp.sqrt(jnp.float32(q.shape[-1]))
    mask = mask[:, None, None] if mask.ndim == 3 else mask[:, :, None]
    return jnp.where(mask, scores, _LOWEST)


def attend_where(
    q: jax.Array,
    k: jax.Array | QTensor,
    v: jax.Array | QTensor,
    mask: jax.Array,
    bias: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Attend where a mask allows it, as `scaled_scores` takes it, with a bias added to the scores.

    Returns [B, T, N, H] in q's dtype, and the probabilities, float32 [B, K, G, T, S]. All scores
    are in memory at once.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    scores = scaled_scores(q.reshape(B, T, K, N // K, H), k, mask)
    probs = jax.nn.softmax(scores + bias, axis=-1)
    out = jnp.einsum("BKGTH->BTKGH", _weighted(probs, v, q.dtype))
    return out.reshape(B, T, N, H).astype(q.dtype), probs


def _products(q: jax.Array, k: jax.Array | QTensor) -> jax.Array:
    """Return q k^T of [B, K, G, T, H] and [B, K, S, H]: float32 [B, K, G, T, S]."""
    if isinstance(k, QTensor):  # the scores are scaled: no float keys are written to memory
        return _products(q, k.values.astype(q.dtype)) * k.scale[:, :, None, None]
    return einsum("BKGTH,BKSH->BKGTS", q, k)


def _weighted(probs: jax.Array, v: jax.Array | QTensor, dtype: Any) -> jax.Array:
    """Sum values [B, K, S, H] by float32 probabilities [B, K, G, T, S]: float32 [B, K, G, T, H].

    Integers are multiplied as `dtype`.
    """
    if isinstance(v, QTensor):  # the probabilities are scaled, see `_products`
        # By the scales alone they would be too small for float16.
        largest = 127 * v.scale[:, :, None, None]
        return _weighted(probs * largest, v.values.astype(dtype), dtype) / 127
    return einsum("BKGTS,BKSH->BKGTH", probs.astype(v.dtype), v)


def _over_blocks(
    q: jax.Array, k: jax.Array | QTensor, v: jax.Array | QTensor, visible: Visibility, size: int
) -> jax.Array:
    """Attend from [B, T, K, G, H] queries to blocks of `size` keys, by online softmax."""
    S = k.shape[2]
    last = jnp.max(visible.places)

    def add(carry, start):
        largest, total, out = carry
        first = jnp.minimum(start, S - size)  # the last block may overlap the one before it
        mask = visible.mask(first, size) & (first + jnp.arange(size) >= start)
        keys, values = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, axis=2), (k, v)
        )
        scores = scaled_scores(q, keys, mask)
        # The result does not depend on what is subtracted.
        new_largest = jnp.maximum(largest, jax.lax.stop_gradient(scores).max(axis=-1))
        weights = jnp.exp(scores - new_largest[..., None])
        shrink = jnp.exp(largest - new_largest)
        total = total * shrink + weights.sum(axis=-1)
        added = _weighted(weights, values, q.dtype)
        return new_largest, total, out * shrink[..., None] + added

    @jax.checkpoint
    def step(carry, start):
        # Blocks after the last query's place are not read.
        return jax.lax.cond(start <= last, add, lambda carry, start: carry, carry, start), None

    B, T, K, G, H = q.shape
    empty = jnp.zeros((B, K, G, T), jnp.float32)
    carry = (empty + _LOWEST, empty, jnp.zeros((B, K, G, T, H), jnp.float32))
    starts = jnp.arange(0, S, size, dtype=jnp.int32)
    (_, total, out), _ = jax.lax.scan(step, carry, starts)
    return jnp.einsum("BKGTH->BTKGH", out / total[..., None]).astype(q.dtype)


def _fused(
    implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility
) -> jax.Array:
    """Do as `attend` by a function of jax, "xla" or "cudnn", with a mask [B, 1, T, S]."""
    # Masks are added to scores there, which leaves a NaN what it is.
    stored = (visible.key_segments > 0)[:, None, :, None]
    k = jnp.where(stored, k, 0).swapaxes(1, 2).astype(q.dtype)
    v = v.swapaxes(1, 2).astype(q.dtype)
    mask = visible.mask(0, k.shape[1])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)  # type: ignore[arg-type]


def _in_parts(q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility) -> jax.Array:
    """Do as `attend` for parts of the keys apart, whose results are then weighted: two products of
    one query and all keys have too little to do for a GPU at once."""
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    P = math.gcd(S, _PARTS)
    q = jnp.einsum("BTKGH->BKGTH", q.reshape(B, T, K, N // K, H))
    k, v = (x.reshape(B, K, P, S // P, H) for x in (k, v))
    mask = visible.mask(0, S).reshape(B, 1, T, P, S // P).swapaxes(2, 3)[:, :, :, None]
    scores = einsum("BKGTH,BKPSH->BKPGTS", q, k) / jnp.sqrt(jnp.float32(H))
    scores = jnp.where(mask, scores, _LOWEST)
    largest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    share = jnp.exp(largest - largest.max(axis=2, keepdims=True))
    total = (weights.sum(axis=-1, keepdims=True) * share).sum(axis=2)
    out = einsum("BKPGTS,BKPSH->BKPGTH", weights.astype(v.dtype), v)
    out = (out * share).sum(axis=2) / total
    return jnp.einsum("BKGTH->BTKGH", out).reshape(B, T, N, H).astype(q.dtype)


# Besides the usual form. Each computes what `attend` does, from the same arguments; which is for
# which case: `candidates`.
ATTENTION: dict[str, Callable[..., jax.Array]] = {
    "xla": partial(_fused, "xla"),
    "cudnn": partial(_fused, "cudnn"),
    "parts": _in_parts,
    "triton": flash.triton,
    "splash": flash.splash,
}

# Of how many heads a form writes a score, or a mask, of each query and key; all, if not listed.
_WRITES = {"cudnn": 1, "triton": 0, "splash": 0}


def candidates(platform: str, dtype: jnp.dtype, seen: Attention) -> list[str]:
    """Return the forms worth measuring for queries of a dtype on a platform, "cpu", "gpu" or
    "tpu"."""
    half = dtype.itemsize == 2  # kernels multiply float32 in a narrower type
    suits = {
        "xla": True,
        "cudnn": half and platform == "gpu",
        "parts": seen.queries == 1,
        "triton": half and platform == "gpu" and seen.whole,
        "splash": half and platform == "tpu" and seen.whole,
    }
    return [name for name in ATTENTION if suits[name]]
