"""The model from its configuration alone: shapes, parameters, operations and bytes of each stage.

Shapes and operations are those of the real functions, traced with abstract arrays: no weights, no
compiling. Axis letters as in `glm2_jax.model`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from glm2_jax import GLMConfig, KVCache
from glm2_jax.context import token_context
from glm2_jax.parts import parts_of
from infer.explain import stages
from infer.explain.facts import Bound, Cache, Pass, Stage, Token, Walk
from infer.explain.words import words_of
from infer.memory.budget import find_budget
from infer.memory.cards import Card
from infer.memory.plan import Plan, array_bytes, cache_bytes, weight_bytes
from infer.memory.precision import Precision

PAIRS = ("attention.scores", "attention.values")  # stages that work on pairs of tokens


def make_walk(
    config: GLMConfig,
    precision: Precision,
    length: int,
    *,
    model: str,
    batch: int = 1,
    prompt: str | None = None,
    length_from: str = "asked",
    cards: Sequence[Card] = (),
    tokens: Sequence[Token] = (),
) -> Walk:
    """Return the walk for `batch` prompts of `length` ids, with bytes counted in a precision, and
    the minimum time on each of the cards; the others as in `Walk`."""
    c = config
    sizes = {
        "B": batch, "L": c.num_layers, "D": c.hidden_size, "N": c.num_heads, "K": c.num_kv_heads,
        "G": c.num_heads // c.num_kv_heads, "H": c.head_dim, "F": c.ffn_hidden_size,
        "V": c.vocab_size, "C": c.mlp_inputs,
    }  # fmt: skip
    prefill = _pass("prefill", config, precision, sizes | {"T": length, "S": length})
    decode = _pass("decode", config, precision, sizes | {"T": 1, "S": length + 1})
    token = cache_bytes(config, precision.size, 1, 1)
    return Walk(
        model=model,
        family=config.family,
        sizes=sizes,
        prompt=prompt,
        length=length,
        length_from=length_from,
        context=config.seq_length,
        looks_ahead=config.block.bidirectional,
        normed_residual=config.block.normed_residual,
        weights_in=precision.name,
        params=config.num_params,
        weight_bytes=weight_bytes(config, precision),
        prefill=prefill,
        decode=decode,
        cache=Cache(
            per_token=token,
            with_full_heads=token * sizes["G"],
            now=token * length * batch,
            at_most=token * config.seq_length * batch,
        ),
        bounds=tuple(_bound(card, config, precision, batch, prefill, decode) for card in cards),
        tokens=tuple(tokens),
    )


def _bound(
    card: Card, config: GLMConfig, precision: Precision, batch: int, prefill: Pass, decode: Pass
) -> Bound:
    """Return the minimum time of both passes: the longer of moving bytes and of arithmetic."""
    # Of T tokens on S keys, T (T - 1) / 2 of the T S pairs are masked; a program may skip them.
    # Answering computes the head at one position of each row.
    T, S = prefill.tokens, prefill.keys
    pairs = sum(stage.flops for stage in prefill.stages if stage.name in PAIRS)
    masked = 0 if config.block.bidirectional else pairs * (T - 1) // (2 * S)
    head = prefill.stages[-1].flops
    skipped = config.num_layers * masked + head - head // T

    def least(work: Pass, skipped: int = 0) -> tuple[float, str]:
        moving = work.bytes / card.bandwidth
        if card.flops is None:
            return moving, "unknown"
        return max((moving, "bandwidth"), ((work.flops - skipped) / card.flops, "arithmetic"))

    plan = Plan(config, precision, decode.keys, batch, card.platform)
    fits = bool(find_budget(card.name).fits(plan))
    ridge = None if card.flops is None else card.flops / card.bandwidth
    card_facts = card.name, card.memory, card.bandwidth, card.flops, fits, ridge
    step, limit = least(decode)
    return Bound(*card_facts, *least(prefill, skipped), step, limit, batch / step)


def _pass(name: str, config: GLMConfig, precision: Precision, sizes: dict[str, int]) -> Pass:
    shapes = {part.name: part.shape(config) for part in parts_of(config)}
    all_words = words_of(config)
    F, H, N, K = (sizes[axis] for axis in "FHNK")
    in_words = sizes | {"F2": 2 * F, "P": H // 2, "QKV": (N + 2 * K) * H}
    found: list[Stage] = []
    counted: set[str] = set()  # parameters, each once: a tied head is the embedding

    def take(name: str, function: Callable[..., Any], *arrays: Any) -> Any:
        traced, result = jax.make_jaxpr(function, return_shape=True)(*arrays)
        words = all_words[name]
        weights = {key: shapes[key] for key in words.weights if key in shapes}
        new = [math.prod(shape) for key, shape in weights.items() if key not in counted]
        counted.update(weights)
        axes = words.reference.split()
        stage = Stage(
            name=name,
            part=words.part,
            title_en=words.title_en,
            title_zh=words.title_zh,
            note_en=words.note_en.format_map(in_words),
            note_zh=words.note_zh.format_map(in_words),
            axes=words.axes,
            shape=jax.tree.leaves(result)[0].shape,
            reference=tuple(math.prod(map(sizes.__getitem__, joined)) for joined in axes),
            params=sum(new),
            flops=products(traced.jaxpr),
            bytes=_bytes(name, weights, precision, sizes),
        )
        found.append(stage)
        return result

    _trace(config, sizes, take)
    params, flops, moved = (
        sum((config.num_layers if stage.in_layer else 1) * getattr(stage, of) for stage in found)
        for of in ("params", "flops", "bytes")
    )
    costs = params, flops, moved, flops / moved
    return Pass(name, sizes["T"], sizes["S"], tuple(found), *costs)


def _trace(config: GLMConfig, sizes: dict[str, int], take: stages.Take) -> None:
    """Walk through the model with abstract float32 arrays, through one layer for all."""

    def array(shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(tuple(shape), dtype)

    parts = parts_of(config)
    params = {part.name: array(part.shape(config)) for part in parts if not part.in_layers}
    weights = {part.name: array(part.shape(config)) for part in parts if part.in_layers}
    ids = array((sizes["B"], sizes["T"]), jnp.int32)

    def context(ids: Any) -> tuple[Any, Any]:
        cache: Any = KVCache.zeros(config, sizes["B"], sizes["S"], jnp.float32)
        found, _ = token_context(config, ids, None, None, cache, jnp.float32)
        return found, (cache.k[:1], cache.v[:1])

    found, cache = jax.eval_shape(context, ids)
    x = take("embed", partial(stages.embed, config), params, ids, found)
    x = stages.walk_layer(config, weights, x, found, cache, take)
    stages.walk_head(config, params, x, take)


def _bytes(
    name: str, weights: dict[str, tuple[int, ...]], precision: Precision, sizes: dict[str, int]
) -> int:
    """Return the bytes of weights that are read, and of keys and values written or read."""
    if name == "embed":  # a row of each table for each token
        row = sum(array_bytes(precision, key, (1, sizes["D"])) for key in weights)
        return sizes["B"] * sizes["T"] * row
    if name == "attention.cache":  # the new ones are written, those before them are read
        return 2 * sizes["B"] * sizes["S"] * sizes["K"] * sizes["H"] * precision.size
    return sum(array_bytes(precision, key, shape) for key, shape in weights.items())


def products(jaxpr: Jaxpr) -> int:
    """Return the operations of the matrix products in a traced function, 2 per multiply-add.

    Of the forms that a product has for different platforms, the one that is a dot counts.
    """
    total = 0
    equation: Any  # whose types jax does not say
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (columns, _), _ = parameters["dimension_numbers"]
            left, out = (x[0].aval.shape for x in (equation.invars, equation.outvars))
            total += 2 * math.prod(left[axis] for axis in columns) * math.prod(out)
            continue
        parts = jax.tree.leaves(list(parameters.values()), is_leaf=_is_function)
        inner = [products(getattr(part, "jaxpr", part)) for part in parts if _is_function(part)]
        repeated = parameters["length"] if name == "scan" else 1
        total += max(inner) if name == "cond" else sum(inner) * repeated
    return total


def _is_function(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)
