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
from glm2_jax.errors import CheckpointError

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

    CheckpointError: the configuration lacks the ids.
    """
    _check_ids(config)
    order = jnp.argsort(segments, axis=1, stable=True)  # one segment after another
    tokens, index, segments = (_take(x, order) for x in (tokens, index, segments))
    runs = _Runs.of(segments)
    is_sop, is_mask = _is(tokens, config.sop_token_id), _is(tokens, config.gmask_token_id)
    others = _is(tokens, config.mask_token_id)
    if config.block.rotary == "none":
        is_mask |= others | _is(tokens, config.smask_token_id)
        largest = runs.total(is_mask)
    else:
        is_mask |= others & (runs.total(is_mask) == 0)
        largest = jnp.ones_like(index)
    start, context = _take(index, runs.begin), runs.find(is_sop, jnp.ones_like(index), index)
    # Masks and <sop> are counted; a <sop> beyond the masks is an ordinary token.
    number = jnp.minimum(runs.count(is_sop), jnp.maximum(largest, 1))
    sop, mask = (runs.find(found, number, index) for found in (is_sop, is_mask))
    mask = jnp.where(mask == _NONE, context, mask) - start
    back = jnp.argsort(order, axis=1)
    return Blanks(*(_take(x, back) for x in (context, sop, mask))), _take(start, back)


@flax.struct.dataclass
class _Runs:
    """Runs of equal values in rows: the columns of each token's first and last, int32 [B, T]."""

    begin: jax.Array
    end: jax.Array

    @classmethod
    def of(cls, values: jax.Array) -> _Runs:
        """Return the runs of int32 [B, T]."""
        T = values.shape[1]
        columns = jnp.arange(T, dtype=jnp.int32)
        edge, new = jnp.ones_like(values[:, :1], bool), values[:, 1:] != values[:, :-1]
        first, last = jnp.hstack([edge, new]), jnp.hstack([new, edge])
        return cls(
            jax.lax.cummax(jnp.where(first, columns, 0), axis=1),
            jax.lax.cummin(jnp.where(last, columns, T - 1), axis=1, reverse=True),
        )

    def before(self, found: jax.Array) -> jax.Array:
        """Return how many of bool [B, T] are before each token's run."""
        return _take(jnp.cumsum(found, axis=1, dtype=jnp.int32) - found, self.begin)

    def count(self, found: jax.Array) -> jax.Array:
        """Return how many its run has up to each token, and with it."""
        return jnp.cumsum(found, axis=1, dtype=jnp.int32) - self.before(found)

    def total(self, found: jax.Array) -> jax.Array:
        """Return how many each token's run has."""
        return _take(self.count(found), self.end)

    def find(self, found: jax.Array, number: jax.Array, index: jax.Array) -> jax.Array:
        """Return the index of the one with this number, from 1, in each token's run; or `_NONE`."""
        places = jnp.argsort(~found, axis=1, stable=True)  # those found, from left to right
        nth = jnp.maximum(self.before(found) + number - 1, 0)
        known = (number > 0) & (number <= self.total(found))
        return jnp.where(known, _take(index, _take(places, jnp.where(known, nth, 0))), _NONE)


def _take(values: jax.Array, columns: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, columns, axis=1)


def _is(tokens: jax.Array, token_id: int | None) -> jax.Array:
    """Return where a token is, bool [B, T]; None is the id of no token."""
    return jnp.zeros_like(tokens, bool) if token_id is None else tokens == token_id


def _check_ids(config: GLMConfig) -> None:
    if config.sop_token_id is None or {config.gmask_token_id, config.mask_token_id} == {None}:
        raise CheckpointError(
            f"The configuration of this {config.family} model lacks special ids.",
            f"sop_token_id is {config.sop_token_id}, gmask_token_id {config.gmask_token_id}, "
            f"mask_token_id {config.mask_token_id}.",
            "Give sop_token_id and at least one of the masks.",
        )
