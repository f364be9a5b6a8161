"""Attention by fused kernels that come with jax: neither pass writes a score to memory.

They are for complete texts alone (`Visibility.whole`), packed and padded ones included: their
causal mask counts queries and keys from 0. So they cannot express queries whose keys are in a
cache, of which the first place is known only when the program runs; a prefix, which all segments
see; or a bidirectional context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from glm2_jax.attention import Visibility

_BLOCK = 128  # queries and keys at once; texts are padded to a multiple


def triton(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility, interpret: bool = False
) -> jax.Array:
    """Do as `glm2_jax.attention.attend` by jax's Pallas kernel for NVIDIA GPUs.

    It knows no groups of heads, so keys and values are repeated for each query head.
    """
    from jax.experimental.pallas.ops.gpu.attention import mha

    B, T, N, H = q.shape
    q, k, v, segments = _padded(q, k, v, visible)
    k, v = (jnp.repeat(x.swapaxes(1, 2), N // x.shape[1], axis=2) for x in (k, v))
    out: Any = mha(q, k, v, segments, sm_scale=H**-0.5, causal=True, interpret=interpret)
    return out[:, :T]


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility, interpret: bool = False
) -> jax.Array:
    """Do as `glm2_jax.attention.attend` by jax's Splash attention for TPUs."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        CausalMask,
        SegmentIds,
        make_splash_mqa_single_device,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import MultiHeadMask

    B, T, N, H = q.shape
    q, k, v, segments = _padded(q, k, v, visible)
    K, S = k.shape[1:3]
    q = (q * H**-0.5).astype(q.dtype).reshape(B, S, K, N // K, H)
    mask = MultiHeadMask([CausalMask((S, S))] * (N // K))
    kernel = make_splash_mqa_single_device(mask, interpret=interpret)
    heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out = jax.vmap(heads)(jnp.einsum("BSKGH->BKGSH", q), k, v, SegmentIds(segments, segments))
    return jnp.einsum("BKGSH->BSKGH", out).reshape(B, S, N, H)[:, :T]


def _padded(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return queries, keys, values and segments of full blocks, all in the queries' dtype.

    Padding sees padding here, so the keys of that, which may hold anything, become 0.
    """
    segments = visible.segments
    k = jnp.where((segments > 0)[:, None, :, None], k, 0)
    more = -q.shape[1] % _BLOCK
    q = jnp.pad(q, [(0, 0), (0, more), (0, 0), (0, 0)])
    k, v = (jnp.pad(x.astype(q.dtype), [(0, 0), (0, 0), (0, more), (0, 0)]) for x in (k, v))
    return q, k, v, jnp.pad(segments, [(0, 0), (0, more)])
