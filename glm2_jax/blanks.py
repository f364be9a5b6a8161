"""Where the blanks of a text are: contexts that look ahead, and two positions for every token.

GLM and ChatGLM-6B read a context whose tokens all see each other, then write what fills its masks.
What fills the k-th mask begins with the k-th <sop>. A token of the context has its place in the
context as position, and block position 0; a token that fills a mask has the position of that mask,
and block positions 1 (<sop>), 2, 3 and so on. Source: get_position_ids and get_masks of
modeling_chatglm.py (ChatGLM-6B), build_inputs_for_generation of tokenization_glm.py.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from glm2_jax.config import GLMConfig

_NONE = jnp.iinfo(jnp.int32).max


@flax.struct.dataclass
class Blanks:
    """What a row, or a token, needs to know of its text; int32 [B] or [B, T]."""

    context: jax.Array  # index of the first <sop>, before which all tokens see each other
    sop: jax.Array  # index of the <sop> that begins what is written
    mask: jax.Array  # position of the mask that is filled

    @classmethod
    def none(cls, batch: int) -> Blanks:
        """Return those of rows that hold nothing yet."""
        return cls(*(jnp.zeros(batch, jnp.int32) for _ in range(3)))

    def at(self, rows: jax.Array | None) -> Blanks:
        """Return those of these rows, int32 [R]; None = all, one past the end has zeros."""
        if rows is None:
            return self
        return jax.tree.map(lambda x: x.at[rows].get(mode="fill", fill_value=0), self)

    def with_rows(self, new: Blanks, rows: jax.Array | None) -> Blanks:
        """Return them with those of these rows replaced; one past the end is left out."""
        if rows is None:
            return new
        return jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), self, new)

    def positions(self, index: jax.Array, start: jax.Array) -> jax.Array:
        """Return positions and block positions, int32 [B, 2, T], of tokens at `index` [B, T]; the
        text begins at the index `start`."""
        written = index >= self.context
        position = jnp.where(written, self.mask, index - start)
        block = jnp.where(written, index - self.sop + 1, 0)
        return jnp.maximum(jnp.stack([position, block], axis=1), 0)


def find_blanks(
    config: GLMConfig, tokens: jax.Array, index: jax.Array, segments: jax.Array
) -> tuple[Blanks, jax.Array]:
    """Return the blanks of every token's segment, and the index of its first token, int32 [B, T].

    All arguments are int32 [B, T]: the tokens, their indices, which grow along a segment, and the
    segment of each. A segment without <sop> is a context only. Which masks count: [gMASK] if there
    is one, else [MASK], in ChatGLM-6B, which fills only the first; in GLM all kinds.
    """
    same = segments[:, :, None] == segments[:, None, :]  # [B, T, T]: a token, and others
    before = index[:, None, :] <= index[:, :, None]

    def first(found: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(same & found, index[:, None, :], _NONE), axis=-1)

    def count(found: jax.Array) -> jax.Array:
        return jnp.sum(same & found, axis=-1, dtype=jnp.int32)

    is_sop, is_mask = tokens == config.sop_token_id, tokens == config.gmask_token_id
    others = tokens == config.mask_token_id
    if config.block.rotary == "none":
        is_mask |= others | (tokens == config.smask_token_id)
        largest = count(is_mask[:, None, :])
    else:
        is_mask |= others & (count(is_mask[:, None, :]) == 0)
        largest = jnp.ones_like(index)
    start, context = first(jnp.ones_like(same)), first(is_sop[:, None, :])
    # Masks and <sop> are counted; a <sop> beyond the masks is an ordinary token.
    number = jnp.minimum(count(before & is_sop[:, None, :]), jnp.maximum(largest, 1))
    mask_number, sop_number = (count(before & x[:, None, :]) for x in (is_mask, is_sop))
    numbered = (is_sop[:, None, :]) & (sop_number[:, None, :] == number[:, :, None])
    sop = first(numbered)
    mask = first(is_mask[:, None, :] & (mask_number[:, None, :] == number[:, :, None]))
    mask = jnp.where(mask == _NONE, context, mask) - start
    return Blanks(context, sop, mask), start
