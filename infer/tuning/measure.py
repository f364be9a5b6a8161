"""Measures the forms of a model's products, of its attention and of its layers on one device.

Weights are random, in the shapes of one layer and of the head: nothing is loaded.
M rows of activations, R rows and C columns of a weight, as in `glm2_jax.products`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from glm2_jax import GLMConfig, KVCache, compiler_options, last_logits
from glm2_jax import attention as attention_forms
from glm2_jax.attention import ATTENTION, Visibility, attend
from glm2_jax.forms import Attention, Forms, Product
from glm2_jax.limits import PREFILL_CHUNK
from glm2_jax.model import unstack_layers
from glm2_jax.products import PRODUCTS, candidates, describe, usual_form
from glm2_jax.quant import QTensor
from glm2_jax.runtime.xla import cache_dtype
from glm2_jax.schemes import COLUMN_AXES
from infer.memory.precision import Precision
from infer.memory.shares import abstract_params
from infer.tuning.choose import Choice, Clock, choose, wall_clock
from infer.tuning.random_params import random_params, random_weight

PROMPT = 64  # rows that stand for a prompt: from there on every form is bound by arithmetic
_BYTES = 2**26  # of copies of a weight that are multiplied in turn, so that no cache holds them
_COPIES = 8  # at most
TOLERANCE = {4: 1e-4, 2: 2e-2}  # share of the largest value, by the bytes of an activation
LAYERS = 2  # of the model whose steps are timed
STEP_GAIN = 0.97  # the head, one for all layers of a model, is most of such a step
_SLOTS = 512  # of its cache
# Tokens of a prompt that are read at once, the usual number first: more would need more memory than
# was planned.
_CHUNKS = (PREFILL_CHUNK, PREFILL_CHUNK // 2, PREFILL_CHUNK // 4)
USUAL = "usual"


class Measured(NamedTuple):
    """One line of the report."""

    what: str  # "1 x [6848, 1024] int8"
    choice: Choice

    def describe(self) -> str:
        """Return it in words."""
        choice = self.choice
        gain = f", {choice.gain:.2f} times as fast" if choice.name != choice.usual else ""
        wrong = "".join(f"; {name}: {why}" for name, why in choice.refused.items())
        return f"{self.what}: {choice.name}{gain}{wrong}"


class Trained(NamedTuple):
    """What was chosen for training rows of a length."""

    rows: int
    length: int
    attention: Measured
    remat: Measured  # the names of its forms are those of `choices.REMAT`

    @property
    def form(self) -> str | None:
        """The form of attention; None = the usual one."""
        name = self.attention.choice.name
        return None if name == USUAL else name

    @property
    def order(self) -> list[str]:
        """What the backward pass may recompute, the fastest first."""
        choice = self.remat.choice
        return sorted(choice.seconds, key=lambda name: (name != choice.name, choice.seconds[name]))


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was chosen for a model on a device.

    Attributes:
        rows: the numbers of rows of a step for which it was measured.
        layers: "stacked" or "list"; None = what is usual.
        seconds: of a step of one row of a model of few layers, to compare dtypes with.
        training: see `infer.tuning.training`.
    """

    forms: Forms = Forms()
    rows: tuple[int, ...] = ()
    layers: str | None = None
    seconds: float = 0.0
    measured: tuple[Measured, ...] = ()
    training: tuple[Trained, ...] = ()

    def trained(self, rows: int, length: int) -> Trained | None:
        """Return what was measured for the nearest shape of a batch, by the ratios of its sizes."""

        def distance(one: Trained) -> float:
            return abs(math.log(one.rows / rows)) + abs(math.log(one.length / length))

        return min(self.training, key=distance, default=None)

    @property
    def lines(self) -> tuple[Measured, ...]:
        """All that was measured."""
        return (*self.measured, *(line for one in self.training for line in one[2:]))


def tune(
    config: GLMConfig,
    precision: Precision,
    rows: Sequence[int],
    device: Any,
    *,
    layers: str,
    clock: Clock = wall_clock,
    note: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Measure everything for steps of so many rows, each one; `layers` is the usual layout."""
    found: list[Measured] = []
    products: list[tuple[Product, str | None]] = []
    with jax.default_device(device):
        for weight in _matrices(config, precision):
            for count in sorted({*rows, PROMPT}):
                product, choice = _product(weight, count, precision, device, clock)
                found.append(Measured(_label(product), choice))
                note(found[-1].describe())
                products.append((product, None if choice.name == choice.usual else choice.name))
        attention = []
        for seen in (Attention(512, 1024), Attention(1, 1024), Attention(512, 512, whole=True)):
            choice = measure_attention(config, precision, seen, 1, device, clock)
            found.append(Measured(seen.describe(), choice))
            note(found[-1].describe())
            if choice.name != USUAL:
                attention.append((seen, choice.name))
            elif seen.whole and attention:  # what is best for others does not count
                attention.append((seen, None))
        forms = Forms(tuple(products), tuple(attention))
        best_layers, seconds = None, 0.0
        for count in sorted(rows, reverse=True):
            step = _step(config, precision, count, forms, layers, device, clock)
            found.append(Measured(f"a step of {count}, {LAYERS} layers", step))
            note(found[-1].describe())
            seconds = step.seconds.get(step.name, 0.0)
            best_layers = best_layers or step.name.split()[-1]
            if step.name.startswith(USUAL):  # what is faster alone was not faster together
                forms = _without(forms, count)
        note(f"layers: {best_layers}, as for steps of {max(rows)}")
        if device.platform != "cpu" and config.seq_length >= _CHUNKS[0]:  # there it takes minutes
            choice = _chunk(config, precision, forms, best_layers or layers, device, clock)
            found.append(Measured(f"a prompt of {_CHUNKS[0]}, tokens at once", choice))
            note(found[-1].describe())
            chunk = None if choice.name == choice.usual else int(choice.name)
            forms = dataclasses.replace(forms, chunk=chunk)
    return Tuned(forms, tuple(sorted(rows)), best_layers, seconds, tuple(found))


def _label(product: Product) -> str:
    R, C = product.shape
    return f"{product.rows} x [{R}, {C}] {product.weight}"


def _without(forms: Forms, rows: int) -> Forms:
    products = ((p, None if p.rows == rows else name) for p, name in forms.products)
    return dataclasses.replace(forms, products=tuple(products))


def _matrices(config: GLMConfig, precision: Precision) -> list[Any]:
    """Return the shapes of all weights that are multiplied, as matrices [R, C], each once."""
    params = abstract_params(config, precision, stacked=False)
    named = {**params["layers"][0], "head": params[config.block.head]}
    found = {}
    for name, axes in (COLUMN_AXES | {"head": 1}).items():
        weight = jax.tree.map(lambda x: x, named[name])
        if isinstance(weight, QTensor):
            rows = math.prod(weight.values.shape[: weight.values.ndim - axes])
            groups = weight.scale.shape[weight.values.ndim - axes :]
            values: Any = _like(weight.values, (rows, weight.values.size // rows))
            scale: Any = _like(weight.scale, (rows, *groups))
            matrix: Any = QTensor(values, scale, weight.bits)
        else:
            rows = math.prod(weight.shape[: weight.ndim - axes])
            matrix = _like(weight, (rows, weight.size // rows))
        found[str(matrix)] = matrix
    return list(found.values())


def _like(x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x.dtype)


def _product(
    weight: Any, rows: int, precision: Precision, device: Any, clock: Clock
) -> tuple[Product, Choice]:
    """Measure the forms of [M, C] times a weight."""
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(weight))
    copies = min(max(-(-_BYTES // size), 2), _COPIES)
    place = jax.tree.map(lambda x: SingleDeviceSharding(device), weight)
    weights = [random_weight(weight, seed, place) for seed in range(copies)]
    columns = (
        weight.size // weight.scale.shape[0] if isinstance(weight, QTensor) else (weight.shape[1])
    )
    keys = jax.random.split(jax.random.key(0), copies)
    dtype = jnp.dtype(precision.dtype)
    xs = [jax.random.normal(key, (rows, columns), jnp.float32).astype(dtype) for key in keys]
    platform = device.platform
    # Calling a program costs nothing on a CPU, and compiling a form costs more there.
    group = 1 if platform == "cpu" else copies

    def build(name: str) -> Callable[[], Any]:
        compute = PRODUCTS[name].compute

        def products(xs: Any, weights: Any) -> Any:
            return [compute(x, w, None) for x, w in zip(xs, weights, strict=True)]

        program = compiled(products, device, xs[:group], weights[:group])
        parts = [slice(at, at + group) for at in range(0, copies, group)]
        return lambda: [program(xs[part], weights[part]) for part in parts]

    usual = usual_form(platform, xs[0], weights[0])
    names = dict.fromkeys((usual, *candidates(platform, xs[0], weights[0])))
    exact = jax.jit(lambda x, w: PRODUCTS["dot"].compute(x.astype(jnp.float32), w, None))
    choice = choose(
        {name: partial(build, name) for name in names},
        usual,
        np.asarray(exact(xs[0], weights[0])),
        TOLERANCE[dtype.itemsize],
        clock,
    )
    return describe(xs[0], weights[0]), choice


def measure_attention(
    config: GLMConfig, precision: Precision, seen: Attention, rows: int, device: Any, clock: Clock
) -> Choice:
    """Measure the forms of attention; of a complete text with its gradients, as in training."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    dtype = jnp.dtype(precision.dtype)
    T, S = seen.queries, seen.keys
    stored = dtype if seen.whole else cache_dtype(device.platform, dtype)
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (rows, T, N, H), jnp.float32).astype(dtype)
    k, v = (jax.random.normal(key, (rows, K, S, H), jnp.float32).astype(stored) for key in keys[1:])
    places = jnp.arange(S - T, S, dtype=jnp.int32)[None].repeat(rows, axis=0)
    queries, stored_keys = jnp.ones((rows, T), jnp.int32), jnp.ones((rows, S), jnp.int32)
    visible = Visibility(places, queries, stored_keys, whole=seen.whole)
    names = attention_forms.candidates(device.platform, dtype, seen)
    forms = {USUAL: attend} | {name: ATTENTION[name] for name in names}
    if seen.whole:
        forms = {name: partial(_with_gradients, form) for name, form in forms.items()}

    def build(form: Callable, args: Any = (q, k, v, visible)) -> Callable[[], Any]:
        program = compiled(form, device, *args)
        return lambda: program(*args)

    exact = np.asarray(jax.jit(forms[USUAL])(q, k, v, visible), np.float32)
    builds = {name: partial(build, form) for name, form in forms.items()}
    return choose(builds, USUAL, exact, TOLERANCE[dtype.itemsize], clock)


def _with_gradients(
    form: Callable, q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility
) -> jax.Array:
    """Return the result of a form of attention and its gradients by q, k and v, all flat."""
    out, gradients = jax.vjp(lambda *arrays: form(*arrays, visible), q, k, v)
    return jnp.concatenate([x.ravel() for x in (out, *gradients(out))])


def compiled(function: Callable, device: Any, *args: Any, **named: Any) -> Callable:
    """Return the program for these arguments, compiled as those of an engine are."""
    options: Any = compiler_options(device.platform)
    return jax.jit(function).lower(*args, **named).compile(compiler_options=options)


def _step(
    config: GLMConfig,
    precision: Precision,
    rows: int,
    forms: Forms,
    layers: str,
    device: Any,
    clock: Clock,
) -> Choice:
    """Measure steps of a model of few layers: in usual forms, in the chosen ones, and these with
    the other layout of the layers."""
    few = dataclasses.replace(config, num_layers=LAYERS, forms=Forms())
    other = {"list": "stacked", "stacked": "list"}[layers]
    kinds = {f"{USUAL}, {layers}": (few, layers)}
    if forms.describe():
        kinds[f"chosen, {layers}"] = (dataclasses.replace(few, forms=forms), layers)
    kinds[f"chosen, {other}"] = (dataclasses.replace(few, forms=forms), other)
    dtype = jnp.dtype(precision.dtype)
    tokens = jnp.arange(rows, dtype=jnp.int32)[:, None] % config.vocab_size
    stored = cache_dtype(device.platform, dtype)
    cache = KVCache.new(few, rows, min(_SLOTS, config.seq_length), stored, None)

    stacked = random_params(few, dtype, scheme=precision.scheme, device=device)

    def build(config: GLMConfig, layout: str) -> Callable[[], Any]:
        params = unstack_layers(stacked) if layout == "list" else stacked
        args = params, tokens, jnp.zeros(rows, jnp.int32)
        program = compiled(partial(last_logits, config), device, *args, cache=cache)
        return lambda: program(*args, cache=cache)

    builds = {name: partial(build, *kind) for name, kind in kinds.items()}
    usual = next(iter(builds))
    exact = np.asarray(builds[usual]()()[0])
    return choose(builds, usual, exact, 3 * TOLERANCE[dtype.itemsize], clock, STEP_GAIN)


def _chunk(
    config: GLMConfig, precision: Precision, forms: Forms, layers: str, device: Any, clock: Clock
) -> Choice:
    """Measure reading a prompt in parts of so many tokens, by a model of few layers."""
    few = dataclasses.replace(config, num_layers=LAYERS, forms=forms)
    dtype, length = jnp.dtype(precision.dtype), _CHUNKS[0]
    tokens = jnp.arange(length, dtype=jnp.int32)[None] % config.vocab_size
    empty = KVCache.new(few, 1, length, cache_dtype(device.platform, dtype), None)
    params = random_params(
        few, dtype, scheme=precision.scheme, as_list=layers == "list", device=device
    )

    def build(width: int) -> Callable[[], Any]:
        parts = [tokens[:, start : start + width] for start in range(0, length, width)]
        last = jnp.full(1, width - 1, jnp.int32)
        read = compiled(partial(last_logits, few), device, params, parts[0], last, cache=empty)

        def run() -> Any:
            cache, logits = empty, None
            for part in parts:
                logits, cache = read(params, part, last, cache=cache)
            return logits

        return run

    builds = {str(width): partial(build, width) for width in _CHUNKS}
    usual = str(length)
    exact = np.asarray(builds[usual]()())
    return choose(builds, usual, exact, 3 * TOLERANCE[dtype.itemsize], clock)
