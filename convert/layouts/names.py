"""The one table between published tensor names and the parameters of this project.

Each rule names a published tensor, its shape, and the parts it consists of; the rows of the parts
follow each other in the published tensor. Read forwards it splits (loading), backwards it joins
(exporting). Sources of names and row order: the index files and state dictionaries of
THUDM/chatglm2-6b. Axis letters as in the model: D model, N query heads, K key/value heads, H head
dim, F ffn, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from convert.files.aliases import is_computed, resolve_aliases
from convert.files.tensor import StoredTensor
from convert.layouts.misfits import Misfits, explain_misfits
from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError
from glm2_jax.schemes import COLUMN_AXES, Scheme

Shape = tuple[int, ...]

FLOATS = ("float16", "bfloat16", "float32", "float64")
SCALE = "_scale"  # behind the name of a quantized tensor: the name of its scales
_SOME = 20  # layers that are looked for in any case

_LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class Part:
    """One of our parameters: its path in the tree, and its shape in one layer."""

    path: tuple[str, ...]
    shape: Callable[[GLMConfig], Shape]

    def quantized(self, scheme: Scheme | None) -> bool:
        """Whether it is one of the matrices that a scheme makes smaller."""
        return scheme is not None and scheme.covers(self.path[-1])

    @property
    def column_axes(self) -> int:
        """How many of the last axes are columns."""
        return COLUMN_AXES.get(self.path[-1], 1)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A stored tensor, and our parameters whose rows it consists of.

    Attributes:
        name: `{layer}` stands for the number of the layer.
        shape: as published.
        parts: in the order of their rows.
        column_axes: how many of its last axes are columns.
    """

    name: str
    shape: Callable[[GLMConfig], Shape]
    parts: tuple[Part, ...]
    column_axes: int = 1

    def quantized(self, scheme: Scheme | None) -> bool:
        """Whether folders of a scheme store it quantized."""
        return all(part.quantized(scheme) for part in self.parts)

    def columns(self, config: GLMConfig) -> int:
        """Elements of a row, that is of what a product sums over."""
        return math.prod(self.shape(config)[-self.column_axes :])

    def layers(self, config: GLMConfig) -> Iterable[int | None]:
        """The layers that have such a tensor; None for one outside the layers."""
        return range(config.num_layers) if _LAYER in self.name else (None,)

    def full_name(self, layer: int | None) -> str:
        """The tensor's name in one layer."""
        return self.name.replace(_LAYER, str(layer))

    def ranges(self, config: GLMConfig) -> list[tuple[Part, int, int]]:
        """Each part with its first and last (exclusive) element in the flattened tensor."""
        result, start = [], 0
        for part in self.parts:
            stop = start + math.prod(part.shape(config))
            result.append((part, start, stop))
            start = stop
        return result

    def split(self, config: GLMConfig, array: np.ndarray) -> dict[tuple[str, ...], np.ndarray]:
        """Published tensor [rows, ...] -> our parameters of one layer, as views."""
        flat = array.reshape(-1)
        return {
            part.path: flat[start:stop].reshape(part.shape(config))
            for part, start, stop in self.ranges(config)
        }

    def join(self, config: GLMConfig, parts: Mapping[tuple[str, ...], np.ndarray]) -> np.ndarray:
        """Our parameters of one layer -> published tensor; the inverse of `split`."""
        flat = [np.asarray(parts[part.path]).reshape(-1) for part in self.parts]
        return (flat[0] if len(flat) == 1 else np.concatenate(flat)).reshape(self.shape(config))


EMBED = Part(("embed",), lambda c: (c.vocab_size, c.hidden_size))
FINAL_NORM = Part(("final_norm",), lambda c: (c.hidden_size,))
HEAD = Part(("head",), lambda c: (c.vocab_size, c.hidden_size))
ATTN_NORM = Part(("layers", "attn_norm"), lambda c: (c.hidden_size,))
Q = Part(("layers", "q"), lambda c: (c.num_heads, c.head_dim, c.hidden_size))
K = Part(("layers", "k"), lambda c: (c.num_kv_heads, c.head_dim, c.hidden_size))
V = Part(("layers", "v"), lambda c: (c.num_kv_heads, c.head_dim, c.hidden_size))
Q_BIAS = Part(("layers", "q_bias"), lambda c: (c.num_heads, c.head_dim))
K_BIAS = Part(("layers", "k_bias"), lambda c: (c.num_kv_heads, c.head_dim))
V_BIAS = Part(("layers", "v_bias"), lambda c: (c.num_kv_heads, c.head_dim))
O = Part(("layers", "o"), lambda c: (c.hidden_size, c.num_heads, c.head_dim))  # noqa: E741
MLP_NORM = Part(("layers", "mlp_norm"), lambda c: (c.hidden_size,))
GATE_UP = Part(("layers", "gate_up"), lambda c: (2, c.ffn_hidden_size, c.hidden_size))
DOWN = Part(("layers", "down"), lambda c: (c.hidden_size, c.ffn_hidden_size))


def _qkv_rows(c: GLMConfig) -> int:
    return (c.num_heads + 2 * c.num_kv_heads) * c.head_dim


_BLOCK = "transformer.encoder.layers.{layer}."

PUBLISHED: tuple[Rule, ...] = (
    Rule("transformer.embedding.word_embeddings.weight", EMBED.shape, (EMBED,)),
    Rule(_BLOCK + "input_layernorm.weight", ATTN_NORM.shape, (ATTN_NORM,)),
    Rule(
        _BLOCK + "self_attention.query_key_value.weight",
        lambda c: (_qkv_rows(c), c.hidden_size),
        (Q, K, V),
    ),
    Rule(
        _BLOCK + "self_attention.query_key_value.bias",
        lambda c: (_qkv_rows(c),),
        (Q_BIAS, K_BIAS, V_BIAS),
    ),
    Rule(
        _BLOCK + "self_attention.dense.weight",
        lambda c: (c.hidden_size, c.num_heads * c.head_dim),
        (O,),
    ),
    Rule(_BLOCK + "post_attention_layernorm.weight", MLP_NORM.shape, (MLP_NORM,)),
    Rule(
        _BLOCK + "mlp.dense_h_to_4h.weight",
        lambda c: (2 * c.ffn_hidden_size, c.hidden_size),
        (GATE_UP,),
    ),
    Rule(_BLOCK + "mlp.dense_4h_to_h.weight", DOWN.shape, (DOWN,)),
    Rule("transformer.encoder.final_layernorm.weight", FINAL_NORM.shape, (FINAL_NORM,)),
    Rule("transformer.output_layer.weight", HEAD.shape, (HEAD,)),
)
"""The tensors of the official folders."""

PARTS: tuple[Part, ...] = tuple(part for rule in PUBLISHED for part in rule.parts)
"""Every parameter of this project, each once."""


def own_name(path: tuple[str, ...], layer: int | str | None = _LAYER) -> str:
    """("layers", "q"), 3 -> "layers.3.q": one tensor a layer, so that shards stay small."""
    return ".".join((path[0], str(layer), *path[1:]) if path[0] == "layers" else path)


OWN: tuple[Rule, ...] = tuple(Rule(own_name(p.path), p.shape, (p,), p.column_axes) for p in PARTS)
"""The tensors of our own folders."""

_GLM_BLOCK = "model.layers.{layer}."


def _projection(name: str, weight: Part, bias: Part) -> tuple[Rule, Rule]:
    """A product that gives heads; its rows are stored without the axis of those."""
    stem = f"{_GLM_BLOCK}self_attn.{name}_proj."
    return (
        Rule(
            stem + "weight",
            lambda c: (math.prod(weight.shape(c)[:-1]), c.hidden_size),
            (weight,),
        ),
        Rule(stem + "bias", lambda c: (math.prod(bias.shape(c)),), (bias,)),
    )


GLM: tuple[Rule, ...] = (
    Rule("model.embed_tokens.weight", EMBED.shape, (EMBED,)),
    Rule(_GLM_BLOCK + "input_layernorm.weight", ATTN_NORM.shape, (ATTN_NORM,)),
    *_projection("q", Q, Q_BIAS),
    *_projection("k", K, K_BIAS),
    *_projection("v", V, V_BIAS),
    Rule(
        _GLM_BLOCK + "self_attn.o_proj.weight",
        lambda c: (c.hidden_size, c.num_heads * c.head_dim),
        (O,),
    ),
    Rule(_GLM_BLOCK + "post_attention_layernorm.weight", MLP_NORM.shape, (MLP_NORM,)),
    Rule(
        _GLM_BLOCK + "mlp.gate_up_proj.weight",
        lambda c: (2 * c.ffn_hidden_size, c.hidden_size),
        (GATE_UP,),
    ),
    Rule(_GLM_BLOCK + "mlp.down_proj.weight", DOWN.shape, (DOWN,)),
    Rule("model.norm.weight", FINAL_NORM.shape, (FINAL_NORM,)),
    Rule("lm_head.weight", HEAD.shape, (HEAD,)),
)
"""The tensors of HF-native folders: `GlmForCausalLM` of transformers. Its rotary pairs are
interleaved as the published ones are, so that no row changes its place."""

# Computed from the configuration; the reference ignores it, too, and so are other names of it.
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"


class Match(NamedTuple):
    """A stored tensor and the rule it fulfils; `scale` for the quantized ones, [rows]."""

    rule: Rule
    layer: int | None
    tensor: StoredTensor
    scale: StoredTensor | None = None

    @property
    def name(self) -> str:
        """The stored tensor's name."""
        return self.rule.full_name(self.layer)


def match_tensors(
    config: GLMConfig,
    tensors: Mapping[str, StoredTensor],
    rules: tuple[Rule, ...],
    scheme: Scheme | None = None,
) -> list[Match]:
    """Matches every stored tensor with its rule, exactly once.

    Args:
        config: gives the shapes and the number of layers.
        tensors: what the folder holds, also under other names (see `convert.files.aliases`).
        rules: `PUBLISHED`, `GLM` or `OWN`.
        scheme: how the folder's matrices are quantized.

    Returns:
        The matches, in the order of `tensors`.

    Raises:
        CheckpointError: what is missing, unexpected, or of a wrong shape or type, in one message
            that begins with its cause where that is known; or two names of a tensor that differ.
    """
    left = {name: tensor for name, tensor in tensors.items() if not is_computed(name)}
    if left and all("prefix_encoder." in name for name in left):
        raise CheckpointError(
            "These weights are a P-Tuning v2 prefix, not a model.",
            f"All they hold is {', '.join(sorted(left))[:300]}.",
            "Give the model that it was trained on, and this folder as --prefix.",
        )
    if config.num_layers > max(len(left), _SOME):  # any number of names would be looked for
        raise CheckpointError(
            f"The tensors do not fit the configuration: num_layers is {config.num_layers}.",
            f"The weight files hold {len(left)} tensors, and a layer has several.",
            "Check that config.json belongs to these weights.",
        )
    wanted = [(rule, layer) for rule in rules for layer in rule.layers(config)]
    if rules is not OWN:  # whose names the manifest's sums cover
        names = [rule.full_name(layer) for rule, layer in wanted]
        left = resolve_aliases(left, [name + end for name in names for end in ("", SCALE)])
    stored, matches, misfits = list(left), dict[str, Match](), Misfits()
    for rule, layer in wanted:
        name, scale = rule.full_name(layer), None
        tensor = left.pop(name, None)
        if tensor is not None and rule.quantized(scheme):
            scale = left.pop(name + SCALE, None)
        if tensor is None or (rule.quantized(scheme) and scale is None):
            misfits.missing.append(name if tensor is None else name + SCALE)
            continue
        matches[name] = Match(rule, layer, tensor, scale)
        misfits.wrong += _shape_problems(config, matches[name], scheme)
    misfits.unexpected += left
    if misfits.count:
        raise explain_misfits(misfits, tensors, config.num_layers, scheme, rules is GLM)
    return [matches[name] for name in stored if name in matches]


def _shape_problems(config: GLMConfig, match: Match, scheme: Scheme | None) -> list[str]:
    shape, types = match.rule.shape(config), FLOATS
    tensor, scale = match.tensor, match.scale
    expected, expected_scale, problems = shape, (), []
    if scale is not None and scheme is not None:
        types = ("int8",)
        expected, expected_scale = scheme.shapes(shape, match.rule.column_axes)
        if shape[-1] * scheme.bits % 8:
            problems.append(f"wrong shape: {match.name} has rows that {scheme.name} cannot pack")
    if tensor.shape != expected:
        problems.append(f"wrong shape: {match.name} is {tensor.shape} instead of {expected}")
    if tensor.dtype.name not in types:
        problems.append(
            f"wrong type: {match.name} is {tensor.dtype.name}, not {' or '.join(types)}"
        )
    if scale is not None and scale.shape != expected_scale:
        problems.append(
            f"wrong shape: {match.name}_scale is {scale.shape} instead of {expected_scale}"
        )
    if scale is not None and scale.dtype.name not in FLOATS:
        problems.append(f"wrong type: {match.name}_scale is {scale.dtype.name}, not a float")
    return problems
