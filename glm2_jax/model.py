"""The GLM family as a pure function: a scanned Linen block, and the functions around it.

Axis letters, in every einsum and shape comment of the package:
  B batch, T query length, S cache length, L layers, D model, N query heads, K key/value heads,
  G = N / K query heads per key/value head, H head dim, F ffn, V vocabulary, R adapter rank,
  C matrices of the MLP that read the activations (gate and up, or only up), P learned positions.

One block of ChatGLM2: a = norm(x); x = x + o(attention(q(a), k(a), v(a))); u = norm(x);
x = x + down(silu(gate(u)) * up(u)). What a family does otherwise is in `glm2_jax.block`, which
parameters it has in `glm2_jax.parts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from glm2_jax.cache import KVCache
from glm2_jax.cached import attend_cached
from glm2_jax.chunked import map_blocks
from glm2_jax.config import GLMConfig
from glm2_jax.context import TokenContext, token_context
from glm2_jax.forms import using
from glm2_jax.ideas import layers_of, run_blocks
from glm2_jax.limits import MLP_ELEMENTS
from glm2_jax.linear import biased, einsum, project, scaled
from glm2_jax.lora import LoRA, adapt, gains, layer_of
from glm2_jax.mesh import active_mesh, constrain, pieces
from glm2_jax.norms import ACTIVATIONS, norm
from glm2_jax.parts import Part, parts_of
from glm2_jax.prefix import Prefix
from glm2_jax.quant import QTensor, dequantize
from glm2_jax.remat import keep, saving
from glm2_jax.rope import apply_rope

Params = Mapping[str, Any]

_WEIGHT_INIT = nn.initializers.normal(0.02, jnp.float32)  # also under JAX_ENABLE_X64


def _parameter(module: nn.Module, part: Part, config: GLMConfig) -> Any:
    """Return a parameter; Linen, which compares shapes, does not see it if it is quantized."""
    stored = module.get_variable("params", part.name)
    if isinstance(stored, QTensor):
        return stored
    init = _WEIGHT_INIT
    if part.name.endswith("_bias"):
        init = nn.initializers.zeros
    elif part.name.endswith("norm"):
        init = nn.initializers.ones
    return module.param(part.name, init, part.shape(config))


class GLMBlock(nn.Module):
    """One transformer block; `run_layer` calls it for every layer."""

    config: GLMConfig
    deterministic: bool = True

    def setup(self) -> None:
        c = self.config
        parts = [part for part in parts_of(c) if part.in_layers]
        self.weights = {part.name: _parameter(self, part, c) for part in parts}
        self.attention_dropout = nn.Dropout(c.attention_dropout, deterministic=self.deterministic)
        self.hidden_dropout = nn.Dropout(c.hidden_dropout, deterministic=self.deterministic)

    def __call__(self, carry, layer: jax.Array, context: TokenContext, lora: LoRA | None = None):
        """Compute one layer: (the new carry, None), as a scan expects it.

        The carry is (x [B, T, D], cached keys and values [L, B, K, S, H] or None), `layer` the
        index of this layer, and `lora` this layer's part of an adapter.
        """
        x, k_cache, v_cache = carry
        with jax.named_scope("attention"):
            a = self._norm("attn_norm", x)
            out, k_cache, v_cache = self._attention(a, k_cache, v_cache, layer, context, lora)
            x = self.add(x, a, self._after("attn_post_norm", out))
        with jax.named_scope("mlp"):
            u = self._norm("mlp_norm", x)
            x = self.add(x, u, self._after("mlp_post_norm", self._mlp(u, lora)))
        return (x, k_cache, v_cache), None

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return norm(self.config, self.weights, name, x)

    def _after(self, name: str, out: jax.Array) -> jax.Array:
        return self._norm(name, out) if self.config.block.sandwich else out

    def add(self, x: jax.Array, normed: jax.Array, out: jax.Array) -> jax.Array:
        """Add what attention or MLP gave to the residual."""
        block = self.config.block
        kept = normed if block.normed_residual else x
        if block.residual_scale != 1:
            kept = (kept * block.residual_scale).astype(x.dtype)
        return constrain(kept + self.hidden_dropout(out), "B", None, None)

    def _dropout_key(self, adapter: LoRA | Prefix | None) -> jax.Array | None:
        """Make a key for the dropout of an adapter or a prefix, in training."""
        drops = adapter is not None and adapter.dropout > 0 and not self.deterministic
        return self.make_rng("dropout") if drops else None

    def _attention(self, x, k_cache, v_cache, layer, context: TokenContext, lora: LoRA | None):
        added = adapt(lora, "query_key_value", x, self._dropout_key(lora))
        w = self.weights
        gain = gains(lora, "query_key_value")
        q = project("BTD,NHD->BTNH", x, w["q"], w.get("q_bias"), added("q"), gain("q"))
        k = project("BTD,KHD->BTKH", x, w["k"], w.get("k_bias"), added("k"), gain("k"))
        v = project("BTD,KHD->BTKH", x, w["v"], w.get("v_bias"), added("v"), gain("v"))
        if context.cos is not None and context.sin is not None:
            q = apply_rope(q, context.cos, context.sin)
            k = apply_rope(k, context.cos, context.sin)
        if context.query_scale is not None:
            q = (q * context.query_scale).astype(x.dtype)
        drops = self.config.attention_dropout > 0 and not self.deterministic
        dropout = self.attention_dropout if drops else None
        caches, idea = (k_cache, v_cache), self.config.idea
        drop = dropout, self._dropout_key(context.prefix)
        q, k, v = keep(q, "q"), keep(k, "k"), keep(v, "v")
        x, k_cache, v_cache = attend_cached(idea, q, k, v, caches, layer, context, *drop)
        x = keep(x, "attention")
        self.sow("intermediates", "o", x)  # kept only where it is asked for
        added = adapt(lora, "dense", x, self._dropout_key(lora))
        gain = gains(lora, "dense")("b")
        out = project("BTNH,DNH->BTD", x, w["o"], w.get("o_bias"), added("b"), gain)
        return keep(out, "o"), k_cache, v_cache

    def _mlp(self, x: jax.Array, lora: LoRA | None) -> jax.Array:
        w, key = self.weights, self._dropout_key(lora)
        # The backward pass of training keeps its input alone, not what is computed on the way.
        activation = jax.checkpoint(ACTIVATIONS[self.config.block.mlp], prevent_cse=False)

        def mlp(x: jax.Array, *columns: jax.Array) -> jax.Array:
            # What a column drops does not depend on its block: blocks differ between meshes.
            drops = (key, *(number[0] for number in columns))
            added = adapt(lora, "dense_h_to_4h", x, *drops)
            both = einsum("BTD,CFD->BTCF", x, w["gate_up"], added("b"))
            both = scaled(both, gains(lora, "dense_h_to_4h")("b"))
            both = constrain(biased(both, w.get("gate_up_bias")), "B", None, None, "F")
            both = keep(both, "gate_up")
            hidden = activation(both).astype(x.dtype)
            added = adapt(lora, "dense_4h_to_h", hidden, *drops)
            out = einsum("BTF,DF->BTD", hidden, w["down"], added("b"))
            out = scaled(out, gains(lora, "dense_4h_to_h")("b"))
            return biased(out, w.get("down_bias")).astype(x.dtype)

        B, C, F = x.shape[0], self.config.mlp_inputs, self.config.ffn_hidden_size
        at_once = MLP_ELEMENTS // (C * B // pieces("B", B) * F // pieces("F", F))
        columns = () if key is None else (jnp.arange(x.shape[1], dtype=jnp.int32)[None],)
        return map_blocks(mlp, max(1, at_once), x, *columns)


def run_layer(
    block: GLMBlock, carry: Any, layer: Any, context: TokenContext, lora: LoRA | None
) -> tuple[Any, None]:
    """Run one layer: the body of the scan over stacked layers and of the loop over a list."""
    return block(carry, layer, context, lora)


class GLM(nn.Module):
    """Embedding, blocks, final norm and head; its `params` have the layout of `param_shapes`."""

    config: GLMConfig
    deterministic: bool = True
    remat: str = "none"

    def setup(self) -> None:
        c = self.config
        parts = [part for part in parts_of(c) if not part.in_layers]
        self.weights = {part.name: _parameter(self, part, c) for part in parts}
        self.layers = GLMBlock(c, self.deterministic)

    def __call__(
        self,
        tokens: jax.Array,
        context: TokenContext,
        cache: KVCache | None,
        lora: LoRA | None = None,
        noise: jax.Array | None = None,
    ):
        """Run the stacked layers on [B, T]: ([B, T, D] before the final norm, keys, values)."""
        scanned = nn.scan(
            saving(run_layer, self.remat, partial(nn.remat, prevent_cse=False)),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, (0, nn.broadcast, 0)),
            length=self.config.num_layers,
        )
        layers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        carry = self.carry(tokens, context, cache, noise)
        carry, _ = scanned(self.layers, carry, layers, context, lora)
        return carry

    def carry(
        self,
        tokens: jax.Array,
        context: TokenContext,
        cache: KVCache | None,
        noise: jax.Array | None = None,
    ):
        """Return the input of the first block: (embeddings [B, T, D], keys and values or None)."""
        stacked = (None, None) if cache is None else (cache.k, cache.v)
        x = self._embedded(tokens)
        if context.positions is not None:
            for axis, name in enumerate(("positions", "blocks")):
                table = constrain(self.weights[name], None, None)  # as of `_embedded`
                x = x + jnp.take(table, context.positions[:, axis], axis=0)
        x = x if noise is None else (x + noise).astype(x.dtype)
        return constrain(x, "B", None, None), *stacked

    def _embedded(self, tokens: jax.Array) -> jax.Array:
        if tokens.size == 1 and active_mesh():
            # XLA:GPU turns one token's row into a slice, and for that gathers the complete matrix.
            return self._embedded(jnp.pad(tokens, ((0, 0), (0, 1))))[:, :1]
        embed = self.weights["embed"]
        if isinstance(embed, QTensor):
            rows = jax.tree.map(lambda array: array[tokens], embed)
            return dequantize(rows, tokens.ndim).astype(self.weights["final_norm"].dtype)
        # Not cut along D: parts of rows would have to be exchanged for parts of the batch.
        return jnp.take(constrain(embed, "V", None), tokens, axis=0)

    def logits(self, x: jax.Array) -> jax.Array:
        """Apply final norm and head: [..., D] -> float32 [..., V]."""
        with jax.named_scope("head"):
            x = norm(self.config, self.weights, "final_norm", x)
            head = self.weights[self.config.block.head]
            logits = einsum("...D,VD->...V", x, head)
            return constrain(logits, *("B", None, None)[: logits.ndim - 1], "V")


def forward(
    config: GLMConfig,
    params: Params,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: KVCache | None = None,
    rows: jax.Array | None = None,
    view: int | None = None,
    lora: LoRA | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Return the next-token logits of every position. Pure; jit it with `config` static.

    Args:
        config: the architecture (static).
        params: the weights, as `param_shapes` lays them out; their dtype is the compute dtype.
        tokens: int32 [B, T].
        positions: int32 [B, T] rotary positions. Default: with a cache they continue each row,
            without one they are 0 .. T - 1. With a bidirectional context int32 [B, 2, T], positions
            and block positions; default: as `glm2_jax.blanks` finds them in the tokens.
        segment_ids: int32 [B, T], default all 1. 0 is padding: not seen, not written, not counted.
            Without a cache tokens attend causally inside their segment, for packed rows; with a
            cache every non-zero id means the one sequence of the row. A bidirectional context is
            to be read at once: its tokens see each other.
        cache: keys and values of earlier tokens; rows may differ in length. Donate it. None runs a
            plain causal forward. For params of `with_prefix` make it with `KVCache.new`: with a
            cache the prefix is read from there.
        rows: int32 [B], the rows of the cache that the tokens belong to, each at most once; those
            of a row past the end are padding. Other rows are neither read nor written. Default: the
            rows of the cache, in order.
        view: reads only this many slots of each row (static), which has to be no fewer than the
            longest of these rows will have. Default: all.
        lora: an adapter; gradients may be taken of it alone. Default: that of `with_lora`, if any.
        dropout_key: turns on the dropout of configuration and adapter, for training.

    Returns:
        (logits float32 [B, T, V], the new cache or None). Logits of padding are arbitrary.
    """
    where = positions, segment_ids, cache, rows, view
    x, cache = _hidden(config, params, tokens, where, lora, dropout_key)
    return constrain(logits_of(config, params, x), "B", None, None), cache


def last_logits(
    config: GLMConfig,
    params: Params,
    tokens: jax.Array,
    index: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: KVCache | None = None,
    rows: jax.Array | None = None,
    view: int | None = None,
    lora: LoRA | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Return (float32 [B, V], the new cache or None): the logits of one position of each row.

    Only that one, at the columns `index` int32 [B], goes through the head. The other arguments are
    those of `forward`.
    """
    where = positions, segment_ids, cache, rows, view
    x, cache = _hidden(config, params, tokens, where, lora)
    x = jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
    return constrain(logits_of(config, params, x), "B", None), cache


def hidden(
    config: GLMConfig,
    params: Params,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    lora: LoRA | None = None,
    dropout_key: jax.Array | None = None,
    noise: jax.Array | None = None,
    remat: str = "none",
) -> jax.Array:
    """Return the hidden states [B, T, D], whose `logits_of` are those of `forward`.

    For a loss that computes its logits a few positions at a time.

    Args:
        noise: [B, T, D], added to the embeddings. The others: as in `forward`.
        remat: what the backward pass recomputes of each block, one of `choices.REMAT`.
    """
    where = positions, segment_ids, None, None, None
    return _hidden(config, params, tokens, where, lora, dropout_key, noise, remat)[0]


def logits_of(config: GLMConfig, params: Params, x: jax.Array) -> jax.Array:
    """Apply final norm and head: hidden states [..., D] -> logits, float32 [..., V].

    On a mesh they are cut along V as the head is; those of `forward` are not.
    """
    with using(config.forms):
        return cast(jax.Array, GLM(config).apply({"params": params}, x, method=GLM.logits))


def init_params(config: GLMConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Make random weights: normal(0.02) matrices, zero biases, norms of one."""

    def init() -> Params:
        tokens = jnp.zeros((1, 1), jnp.int32)
        context, _ = token_context(config, tokens, None, None, None, jnp.float32)
        variables = GLM(config).init(key, tokens, context, None)
        return jax.tree.map(lambda x: x.astype(dtype), variables["params"])

    return jax.jit(init)()


def unstack_layers(params: Params) -> Params:
    """Return the params with a list of layers in place of stacked ones.

    Every function here takes both forms. The list is faster if slicing a layer out of a stacked
    array copies it; the stacked form compiles faster.
    """
    leading = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(leading)]
    return {**params, "layers": layers}


def param_shapes(config: GLMConfig) -> Params:
    """Return the params tree with shape tuples as leaves."""
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: x.shape, abstract)


def _hidden(config, params, tokens, where, *more) -> tuple[jax.Array, KVCache | None]:
    with using(config.forms):
        return _run(config, params, tokens, where, *more)


def _run(config, params, tokens, where, lora, key=None, noise=None, remat="none"):
    positions, segment_ids, cache, rows, view = where
    lora = params.get("lora") if lora is None else lora
    known = params["final_norm"].dtype, params.get("prefix"), rows, view
    context, cache = token_context(config, tokens, positions, segment_ids, cache, *known)
    deterministic = key is None
    model, variables = GLM(config, deterministic, remat), {"params": params}
    layers = layers_of(config.idea, params)
    if isinstance(layers, Mapping):
        rngs = None if deterministic else {"dropout": key}
        carry = model.apply(variables, tokens, context, cache, lora, noise, rngs=rngs)
    else:
        carry = model.apply(variables, tokens, context, cache, noise, method=GLM.carry)
        step = nn.apply(run_layer, GLMBlock(config, deterministic))
        step = saving(step, remat)
        if cache is not None and isinstance(tokens, Tracer):
            step = jax.jit(step, inline=True)  # layers of the same shapes are traced once

        def run(carry: Any, layer: int) -> Any:
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, layer)}
            args = carry, layer, context, layer_of(lora, layer)
            return step({"params": layers[layer]}, *args, rngs=rngs)[0]

        head = partial(logits_of, config, params)
        carry = run_blocks(config.idea, run, cast(Any, carry), len(layers), head)
    x, k, v = cast(Any, carry)
    return x, None if cache is None else dataclasses.replace(cache, k=k, v=v).pinned()
