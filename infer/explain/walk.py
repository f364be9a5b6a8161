"""The model from its configuration alone: shapes, parameters, operations and bytes of each stage.

Shapes and operations are those of the real functions, traced with abstract arrays: no weights, no
compiling. Axis letters as in `glm2_jax.model`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from glm2_jax import GLMConfig, KVCache, param_shapes
from glm2_jax.context import token_context
from glm2_jax.model import Params
from glm2_jax.schemes import COLUMN_AXES
from infer.explain import stages
from infer.explain.costs import bound, cache_costs
from infer.explain.facts import Pass, Stage, Walk
from infer.explain.words import WORDS, reference_shape
from infer.memory.cards import Card
from infer.memory.plan import weight_bytes
from infer.memory.precision import Precision


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
) -> Walk:
    """The walk for prompts of one length.

    Args:
        precision: what bytes are counted in.
        length: ids of each prompt. length_from, prompt, model: as in `Walk`.
        batch: prompts together.
        cards: devices to tell the least time of.
    """
    shapes = param_shapes(config)
    prefill = _pass("prefill", config, shapes, precision, batch, length, length)
    decode = _pass("decode", config, shapes, precision, batch, 1, length + 1)
    return Walk(
        model=model,
        family=config.family,
        sizes=_sizes(config, batch),
        prompt=prompt,
        length=length,
        length_from=length_from,
        context=config.seq_length,
        weights_in=precision.name,
        params=config.num_params,
        weight_bytes=weight_bytes(config, precision),
        prefill=prefill,
        decode=decode,
        cache=cache_costs(config, precision, batch, length),
        bounds=tuple(bound(card, config, precision, batch, prefill, decode) for card in cards),
    )


def _sizes(config: GLMConfig, batch: int) -> dict[str, int]:
    return {
        "B": batch,
        "L": config.num_layers,
        "D": config.hidden_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "G": config.num_heads // config.num_kv_heads,
        "H": config.head_dim,
        "F": config.ffn_hidden_size,
        "V": config.vocab_size,
    }


def _pass(
    name: str,
    config: GLMConfig,
    shapes: Params,
    precision: Precision,
    batch: int,
    tokens: int,
    keys: int,
) -> Pass:
    sizes = _sizes(config, batch) | {"T": tokens, "S": keys, "C": 2}
    found: list[Stage] = []

    def take(name: str, function: Callable[..., Any], *arrays: Any) -> Any:
        traced, result = jax.make_jaxpr(function, return_shape=True)(*arrays)
        found.append(_stage(name, jax.tree.leaves(result)[0].shape, products(traced.jaxpr)))
        return result

    def _stage(name: str, shape: tuple[int, ...], flops: int) -> Stage:
        words = WORDS[name]
        filled = sizes | {
            "F2": 2 * sizes["F"],
            "P": sizes["H"] // 2,
            "QKV": (sizes["N"] + 2 * sizes["K"]) * sizes["H"],
        }
        weights = {key: _shape_of(shapes, key) for key in words.weights}
        return Stage(
            name=name,
            part=words.part,
            title_en=words.title_en,
            title_zh=words.title_zh,
            note_en=words.note_en.format_map(filled),
            note_zh=words.note_zh.format_map(filled),
            axes=words.axes,
            shape=shape,
            reference=reference_shape(words.reference, sizes),
            params=sum(map(math.prod, weights.values())),
            flops=flops,
            bytes=_bytes(name, weights, precision, sizes),
        )

    _trace(config, shapes, batch, tokens, keys, take)
    layers = {stage.name: config.num_layers if stage.in_layer else 1 for stage in found}
    flops = sum(layers[stage.name] * stage.flops for stage in found)
    moved = sum(layers[stage.name] * stage.bytes for stage in found)
    params = sum(layers[stage.name] * stage.params for stage in found)
    return Pass(name, tokens, keys, tuple(found), params, flops, moved, flops / moved)


def _trace(
    config: GLMConfig, shapes: Params, batch: int, tokens: int, keys: int, take: stages.Take
) -> None:
    """Walks through the model with abstract float32 arrays, through one layer for all."""

    def array(shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(tuple(shape), dtype)

    params = {name: array(shapes[name]) for name in ("embed", "final_norm", "head")}
    weights = {name: array(shape[1:]) for name, shape in shapes["layers"].items()}
    ids = array((batch, tokens), jnp.int32)

    def context(ids: Any) -> tuple[Any, Any]:
        cache = KVCache.zeros(config, batch, keys, jnp.float32)
        found, _ = token_context(config, ids, None, None, cache, jnp.float32)
        return found, (cache.k[:1], cache.v[:1])

    found, cache = jax.eval_shape(context, ids)
    x = take("embed", lambda params, ids: stages.embed(config, params, ids), params, ids)
    x = stages.walk_layer(config, weights, x, found, cache, take)
    stages.walk_head(config, params, x, take)


def _shape_of(shapes: Params, key: str) -> tuple[int, ...]:
    """Of one layer's weight, or of one beside the layers."""
    return shapes[key] if key in shapes else shapes["layers"][key][1:]


def _bytes(
    name: str, weights: dict[str, tuple[int, ...]], precision: Precision, sizes: dict[str, int]
) -> int:
    """Weights that are read, and keys and values that are written or read."""
    if name == "embed":  # a row for each token
        return sizes["B"] * sizes["T"] * _weight_bytes(name, (1, sizes["D"]), precision)
    if name == "attention.cache":  # the new ones are written, those before them are read
        return 2 * sizes["B"] * sizes["S"] * sizes["K"] * sizes["H"] * precision.size
    return sum(_weight_bytes(key, shape, precision) for key, shape in weights.items())


def _weight_bytes(key: str, shape: tuple[int, ...], precision: Precision) -> int:
    if precision.scheme is None or not precision.scheme.covers(key):
        return math.prod(shape) * precision.size
    values, scales = precision.scheme.shapes(shape, COLUMN_AXES.get(key, 1))
    return math.prod(values) + 4 * math.prod(scales)


def products(jaxpr: Jaxpr) -> int:
    """Operations of the matrix products in a traced function, 2 for each product and sum.

    Of the forms that a product has for different platforms, the one that is written as such counts.
    """
    return sum(_operations(equation) for equation in jaxpr.eqns)


def _operations(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (columns, _), _ = parameters["dimension_numbers"]
        summed = math.prod(equation.invars[0].aval.shape[axis] for axis in columns)
        return 2 * summed * math.prod(equation.outvars[0].aval.shape)
    inner = [products(part) for value in parameters.values() for part in _inside(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (parameters["length"] if name == "scan" else 1)


def _inside(value: Any) -> list[Jaxpr]:
    """The functions among an equation's parameters."""
    if isinstance(value, list | tuple):
        return [part for each in value for part in _inside(each)]
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    return [value] if isinstance(value, Jaxpr) else []
