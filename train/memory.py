"""How much memory a training run takes on a device, from its configuration alone.

Parameters, gradients and optimizer state are counted exactly, and so are the activations that the
forward pass keeps for the backward pass: jax differentiates the step from shapes, and nothing is
computed. What a layer or the loss needs while it is computed is a formula, which tests compare with
compiled programs. Sizes are bytes, with a mesh those of each device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from convert.adapters.prefix import encode, init_encoder
from glm2_jax import GLMConfig, LoRA, dora, init_lora
from glm2_jax.limits import MLP_ELEMENTS, SCORES
from glm2_jax.lora import TARGETS
from glm2_jax.parts import TABLE, tables_of
from glm2_jax.prefix import Prefix
from glm2_jax.runtime.buckets import padded_batch
from infer.memory import shares
from infer.memory.plan import RUNTIME, weight_bytes
from infer.memory.precision import Precision
from infer.memory.residuals import residual_bytes
from infer.memory.shares import Sizes, abstract_params, total_bytes
from train.data.batch import Batch
from train.options import NEW_ADAPTER, PrefixOptions
from train.recipe import Recipe
from train.step import LOGITS, combine, loss_sum

_FLOAT32 = 4


@dataclass(frozen=True)
class NewAdapter:
    """What an adapter's size depends on."""

    rank: int
    target: str
    dropout: float
    dora: bool = False

    def __str__(self) -> str:
        return f"an adapter of rank {self.rank} on {self.target}{' with DoRA' * self.dora}"

    def init(self, config: GLMConfig, key: jax.Array) -> Any:
        """Return the trained arrays."""
        options: dict[str, Any] = {"targets": self.target, "dropout": self.dropout}
        lora = init_lora(config, key, rank=self.rank, **options)
        return dora.with_magnitudes(lora, _rows(lora)) if self.dora else lora

    def effective(self, config: GLMConfig, trained: Any) -> LoRA | Prefix:
        """Return what the trained arrays stand for, as far as their sizes go."""
        return dora.with_gains(trained, _rows(trained)) if self.dora else trained


@dataclass(frozen=True)
class NewPrefix:
    """What a prefix's size depends on; else as above."""

    length: int
    projection: bool
    dropout: float

    def __str__(self) -> str:
        return f"a prefix of {self.length} tokens{' with a projection' * self.projection}"

    def init(self, config: GLMConfig, key: jax.Array) -> Any:
        return init_encoder(config, key, self.length, projection=self.projection)

    def effective(self, config: GLMConfig, trained: Any) -> LoRA | Prefix:
        return encode(config, trained, dropout=self.dropout)


def _rows(lora: LoRA) -> dora.Rows:
    """Return arrays of the shapes of `dora.norms`."""
    return {
        target: {part: weights[part][..., 0] for part in TARGETS[target].up}
        for target, weights in lora.layers.items()
    }


Added = NewAdapter | NewPrefix
KINDS: dict[str, type[Added]] = {kind.__name__: kind for kind in (NewAdapter, NewPrefix)}


def adapter_of(recipe: Recipe) -> Added | None:
    """Return what is trained on the frozen base of a recipe, a new adapter where it starts from
    another."""
    options = recipe.adapter
    if options is None:
        return None
    if isinstance(options, PrefixOptions):
        return NewPrefix(options.pre_seq_len, options.prefix_projection, options.dropout)
    rank, target = options.rank or NEW_ADAPTER["rank"], options.target or NEW_ADAPTER["target"]
    return NewAdapter(rank, target, options.dropout, bool(options.dora))


@dataclass(frozen=True)
class TrainingPlan:
    """What is to be trained how, and the bytes that it takes on the device, or on each one of a
    mesh."""

    config: GLMConfig
    precision: Precision  # of the frozen base, or in which all parameters are computed
    batch: int  # rows of a micro-batch, on all devices together
    length: int  # tokens of each
    remat: str  # what the backward pass recomputes of each block, one of `choices.REMAT`
    adapter: Added | None  # None = all parameters are trained, stored in float32
    accumulate: int = 8  # micro-batches per step
    platform: str = "gpu"  # or "cpu", "tpu"
    mesh: Sizes | None = None  # None = one device

    @cached_property
    def weights(self) -> int:
        """The frozen base."""
        return 0 if self.adapter is None else self._stored(self.precision)

    @cached_property
    def state(self) -> int:
        """Trained parameters and the two moments of Adam, all in float32."""
        return 3 * _FLOAT32 * self._trained

    @cached_property
    def gradients(self) -> int:
        """Gradients, their sums over micro-batches, and the parameters as they are computed."""
        summed = _FLOAT32 * self._trained if self.accumulate > 1 else 0
        if self.adapter is not None:
            return summed + _FLOAT32 * self._trained
        # The gradient of a table comes last, and its rows are converted as they are read.
        tables = sum(math.prod(TABLE[name].shape(self._part)) for name in tables_of(self.config))
        size = self.precision.size
        return summed + (self._trained - tables) * (size if size == _FLOAT32 else 2 * size)

    @cached_property
    def kept(self) -> int:
        """What the forward pass keeps for the backward pass."""
        return kept_bytes(self._part, self.precision.dtype, self.adapter, *self._shape, self.remat)

    @cached_property
    def working(self) -> int:
        """What a layer or the loss needs while it is computed."""
        recomputes = self.remat != "none"
        layer = layer_bytes(self._part, self.precision, self.platform, *self._shape, recomputes)
        if recomputes:  # all that a layer keeps otherwise
            form = replace(self._part, num_layers=1), self.precision.dtype, self.adapter
            layer += kept_bytes(*form, *self._shape, "none")
        needed = max(layer, loss_bytes(self.config, self.platform, *self._shape))
        on_cpu = self.platform == "cpu" and self.adapter is not None
        if on_cpu and not recomputes:  # a list of layers, which keeps their scores, too
            rows, length = self._shape
            scores = _FLOAT32 * min(rows * self._part.num_heads * length**2, SCORES)
            needed += self.config.num_layers * scores
        if self.mesh is not None and dict(self.mesh)["fsdp"] > 1:  # one layer is there complete
            params = shares.computed_params(self.config, self.precision, self.mesh)
            needed += shares.total_bytes(params["layers"]) // self.config.num_layers
        return needed

    @property
    def runtime(self) -> int:
        """What jax itself takes."""
        return RUNTIME[self.platform]

    @property
    def activations(self) -> int:
        return self.kept + self.working

    @property
    def total(self) -> int:
        return self.weights + self.state + self.gradients + self.activations + self.runtime

    @property
    def _part(self) -> GLMConfig:
        return self.config if self.mesh is None else shares.share_of(self.config, self.mesh)

    @property
    def _shape(self) -> tuple[int, int]:
        """Rows and tokens of each on one device."""
        pieces = 1 if self.mesh is None else shares.row_pieces(self.mesh)
        return padded_batch(self.batch, pieces) // pieces, self.length

    @cached_property
    def _trained(self) -> int:
        """Trained numbers; those of an adapter are counted complete, they are few."""
        if self.adapter is not None:
            return _adapter_size(self.config, self.adapter)
        return self._stored(Precision("float32")) // _FLOAT32

    def _stored(self, precision: Precision) -> int:
        if self.mesh is None:
            return weight_bytes(self.config, precision)
        return shares.total_bytes(shares.device_params(self.config, precision, self.mesh))


@lru_cache
def _adapter_size(config: GLMConfig, adapter: Added) -> int:
    return sum(x.size for x in jax.tree.leaves(abstract_adapter(config, adapter)))


def abstract_adapter(config: GLMConfig, adapter: Added) -> Any:
    """Return the trained arrays of an adapter or a prefix as shapes."""
    return jax.eval_shape(partial(adapter.init, config), jax.random.key(0))


@lru_cache
def kept_bytes(
    config: GLMConfig, dtype: str, adapter: Added | None, rows: int, length: int, remat: str
) -> int:
    """Return the bytes of what the forward pass of a micro-batch keeps for its backward pass,
    besides the parameters."""
    params = abstract_params(config, Precision(dtype))
    added = None if adapter is None else abstract_adapter(config, adapter)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = Batch(tokens, tokens, tokens, jax.ShapeDtypeStruct((rows, length), jnp.bool_))
    drops = max(config.attention_dropout, config.hidden_dropout, adapter.dropout if adapter else 0)

    def forward(params: Any, added: Any, batch: Batch, key: jax.Array) -> Any:
        def loss(trained: Any) -> jax.Array:
            given = trained, None
            if adapter is not None:
                given = combine(params, adapter.effective(config, trained))
            key_or_none = key if drops > 0 else None
            return loss_sum(config, *given, batch, dropout_key=key_or_none, remat=remat)[0]

        return jax.vjp(loss, params if added is None else added)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    found = residual_bytes(forward, params, added, batch, key)
    if adapter is None:  # the loss has taken the gradient of what follows the layers already
        tables = ("layers", *tables_of(config))
        found -= total_bytes([x for name, x in params.items() if name not in tables])
    return found


def layer_bytes(
    config: GLMConfig, precision: Precision, platform: str, rows: int, length: int, recomputes: bool
) -> int:
    """Return what the backward pass of a layer needs besides what is kept."""
    C, F, N, size = config.mlp_inputs, config.ffn_hidden_size, config.num_heads, precision.size
    at_once = min(rows * length * C * F, MLP_ELEMENTS)
    needed = at_once * size  # the gradient of the products that go into the activation
    if platform != "cpu" or precision.scheme is not None:  # a copy of the weight
        needed += C * F * config.hidden_size * size
    if recomputes:
        return needed
    scores = min(rows * N * length**2, SCORES)
    return needed + at_once * _FLOAT32 + scores * (_FLOAT32 + size)


def loss_bytes(config: GLMConfig, platform: str, rows: int, length: int) -> int:
    """Return what the loss needs: some positions' logits and their gradients, and except on a CPU
    their exponentials."""
    arrays = 2 if platform == "cpu" else 3
    return arrays * _FLOAT32 * min(rows * length * config.vocab_size, LOGITS)
