"""The one table between published tensor names and the parameters of this project.

Each rule names a stored tensor and the parts it consists of; the rows of the parts follow each
other in the stored tensor. Forwards it splits (loading), backwards it joins (exporting). Sources of
names and row order: the index files and state dictionaries of THUDM/chatglm2-6b. A new layout is
one more table, and a new kind of parameter one more `Part`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from convert.files.aliases import is_computed, resolve_aliases
from convert.files.tensor import StoredTensor
from convert.layouts.misfits import explain_misfits
from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError
from glm2_jax.schemes import COLUMN_AXES, EMBEDDINGS, Scheme

Shape = tuple[int, ...]

FLOATS = ("float16", "bfloat16", "float32", "float64")
SCALE = "_scale"  # appended to the name of a quantized tensor: the name of its scales
_LEAST_TENSORS = 20  # a configuration with fewer layers than this is always compared by name

_LAYER = "{layer}"
# Axis letters as in the model: D model, N query heads, K key/value heads, H head dim, F ffn,
# V vocabulary; "2" stands for gate and up.
_AXES = {
    "V": "vocab_size", "D": "hidden_size", "N": "num_heads", "K": "num_kv_heads", "H": "head_dim",
    "F": "ffn_hidden_size",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Part:
    """One of our parameters: its path in the tree, and the letters of its axes in one layer."""

    path: tuple[str, ...]
    axes: str

    def shape(self, config: GLMConfig) -> Shape:
        """Return its shape in one layer."""
        return tuple(2 if axis == "2" else getattr(config, _AXES[axis]) for axis in self.axes)

    def quantized(self, scheme: Scheme | None) -> bool:
        """Return whether it is one of the matrices that a scheme quantizes."""
        return scheme is not None and scheme.covers(self.path[-1])

    @property
    def in_layers(self) -> bool:
        """Whether every layer has one."""
        return self.path[0] == "layers"

    @property
    def column_axes(self) -> int:
        """How many of the last axes are columns."""
        return COLUMN_AXES.get(self.path[-1], 1)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A stored tensor, and our parameters whose rows it consists of.

    `{layer}` in the name stands for the number of the layer. `fused`: all rows are one axis and all
    columns another, as in the published files; our own files keep the axes of the part.
    """

    name: str
    parts: tuple[Part, ...]
    fused: bool = True

    def shape(self, config: GLMConfig) -> Shape:
        """Return the shape as stored."""
        shapes = [part.shape(config) for part in self.parts]
        if not self.fused:
            return shapes[0]
        if self.parts[0].path[-1] not in (*COLUMN_AXES, *EMBEDDINGS):  # norms and biases
            return (sum(map(math.prod, shapes)),)
        rows = -self.parts[0].column_axes
        return sum(math.prod(shape[:rows]) for shape in shapes), math.prod(shapes[0][rows:])

    @property
    def column_axes(self) -> int:
        """How many of its last axes are columns."""
        return 1 if self.fused else self.parts[0].column_axes

    def quantized(self, scheme: Scheme | None) -> bool:
        """Return whether folders of a scheme store it quantized."""
        return all(part.quantized(scheme) for part in self.parts)

    def layers(self, config: GLMConfig) -> Iterable[int | None]:
        """Return the layers that have such a tensor; None for one outside the layers."""
        return range(config.num_layers) if _LAYER in self.name else (None,)

    def full_name(self, layer: int | None) -> str:
        """Return the tensor's name in one layer."""
        return self.name.replace(_LAYER, str(layer))

    def ranges(self, config: GLMConfig) -> list[tuple[Part, int, int]]:
        """Return each part with its first and last (exclusive) element in the flat tensor."""
        result, start = [], 0
        for part in self.parts:
            stop = start + math.prod(part.shape(config))
            result.append((part, start, stop))
            start = stop
        return result


def _layer_part(name: str, axes: str) -> Part:
    return Part(("layers", name), axes)


EMBED, FINAL_NORM, HEAD = Part(("embed",), "VD"), Part(("final_norm",), "D"), Part(("head",), "VD")
ATTN_NORM, MLP_NORM = _layer_part("attn_norm", "D"), _layer_part("mlp_norm", "D")
Q, Q_BIAS = _layer_part("q", "NHD"), _layer_part("q_bias", "NH")
K, K_BIAS = _layer_part("k", "KHD"), _layer_part("k_bias", "KH")
V, V_BIAS = _layer_part("v", "KHD"), _layer_part("v_bias", "KH")
ATTN_OUT = _layer_part("o", "DNH")
GATE_UP, DOWN = _layer_part("gate_up", "2FD"), _layer_part("down", "DF")


def _rules(block: str, names: Mapping[str, tuple[Part, ...]]) -> tuple[Rule, ...]:
    """Return the rules of a layout; "*" in a name stands for `block`."""
    return tuple(Rule(name.replace("*", block), parts) for name, parts in names.items())


PUBLISHED = _rules(
    "transformer.encoder.layers.{layer}",
    {
        "transformer.embedding.word_embeddings.weight": (EMBED,),
        "*.input_layernorm.weight": (ATTN_NORM,),
        "*.self_attention.query_key_value.weight": (Q, K, V),
        "*.self_attention.query_key_value.bias": (Q_BIAS, K_BIAS, V_BIAS),
        "*.self_attention.dense.weight": (ATTN_OUT,),
        "*.post_attention_layernorm.weight": (MLP_NORM,),
        "*.mlp.dense_h_to_4h.weight": (GATE_UP,),
        "*.mlp.dense_4h_to_h.weight": (DOWN,),
        "transformer.encoder.final_layernorm.weight": (FINAL_NORM,),
        "transformer.output_layer.weight": (HEAD,),
    },
)
"""The tensors of the official folders."""

GLM = _rules(
    "model.layers.{layer}",
    {
        "model.embed_tokens.weight": (EMBED,),
        "*.input_layernorm.weight": (ATTN_NORM,),
        "*.self_attn.q_proj.weight": (Q,),
        "*.self_attn.q_proj.bias": (Q_BIAS,),
        "*.self_attn.k_proj.weight": (K,),
        "*.self_attn.k_proj.bias": (K_BIAS,),
        "*.self_attn.v_proj.weight": (V,),
        "*.self_attn.v_proj.bias": (V_BIAS,),
        "*.self_attn.o_proj.weight": (ATTN_OUT,),
        "*.post_attention_layernorm.weight": (MLP_NORM,),
        "*.mlp.gate_up_proj.weight": (GATE_UP,),
        "*.mlp.down_proj.weight": (DOWN,),
        "model.norm.weight": (FINAL_NORM,),
        "lm_head.weight": (HEAD,),
    },
)
"""The tensors of HF-native folders: `GlmForCausalLM` of transformers. Its rotary pairs are
interleaved as the published ones are, so that no row changes its place."""

PARTS: tuple[Part, ...] = tuple(part for rule in PUBLISHED for part in rule.parts)
"""Every parameter of this project, each once."""


def own_name(path: tuple[str, ...], layer: int | str | None = _LAYER) -> str:
    """Return the name in our own folders: ("layers", "q"), 3 -> "layers.3.q"."""
    return ".".join((path[0], str(layer), *path[1:]) if path[0] == "layers" else path)


OWN: tuple[Rule, ...] = tuple(Rule(own_name(part.path), (part,), fused=False) for part in PARTS)
"""The tensors of our own folders."""

# Computed from the configuration; the reference ignores it, too, and so are other names of it.
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"


class Match(NamedTuple):
    """A stored tensor and its rule; `scale` for the quantized ones, [rows] or [rows, groups]."""

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
    """Match every stored tensor with its rule, exactly once, in the order of `tensors`.

    `tensors` may have other names (see `convert.files.aliases`); `scheme` is how the folder's
    matrices are quantized. Tensors that are missing, unexpected, or of a wrong shape or dtype are
    one `CheckpointError` that begins with the cause where it is known.
    """
    left = {name: tensor for name, tensor in tensors.items() if not is_computed(name)}
    if left and all("prefix_encoder." in name for name in left):
        raise CheckpointError(
            "These weights are a P-Tuning v2 prefix, not a model.",
            f"They hold only {', '.join(sorted(left))[:300]}.",
            "Give the model that it was trained on, and this folder as --prefix.",
        )
    if config.num_layers > max(len(left), _LEAST_TENSORS):  # num_layers may be any number
        raise CheckpointError(
            f"The tensors do not fit the configuration: num_layers is {config.num_layers}.",
            f"The weight files hold {len(left)} tensors, and a layer has several.",
            "Check that config.json belongs to these weights.",
        )
    wanted = {
        rule.full_name(layer): (rule, layer) for rule in rules for layer in rule.layers(config)
    }
    if rules is not OWN:  # the manifest's checksums cover the names of our own format
        left = resolve_aliases(left, [name + end for name in wanted for end in ("", SCALE)])
    order = list(left)
    matches, missing, wrong = {}, [], []
    for name, (rule, layer) in wanted.items():
        scale = None
        tensor, quantized = left.pop(name, None), rule.quantized(scheme)
        if tensor is not None and quantized:
            scale = left.pop(name + SCALE, None)
        if tensor is None or (quantized and scale is None):
            missing.append(name if tensor is None else name + SCALE)
            continue
        matches[name] = Match(rule, layer, tensor, scale)
        wrong += _wrong(config, matches[name], scheme)
    if missing or wrong or left:
        raise explain_misfits(missing, wrong, list(left), tensors, rules is GLM)
    return [matches[name] for name in order if name in matches]


def _wrong(config: GLMConfig, match: Match, scheme: Scheme | None) -> list[str]:
    """Return what is wrong with the shapes and dtypes of a match."""
    shape, problems = match.rule.shape(config), []
    expected = [(match.name, match.tensor, shape, FLOATS)]
    if match.scale is not None and scheme is not None:
        shapes = scheme.shapes(shape, match.rule.column_axes)
        expected = [
            (match.name, match.tensor, shapes[0], ("int8",)),
            (match.name + SCALE, match.scale, shapes[1], FLOATS),
        ]
        if shape[-1] * scheme.bits % 8:
            problems.append(f"wrong shape: {match.name} has rows that {scheme.name} cannot pack")
    for name, tensor, wanted, types in expected:
        if tensor.shape != wanted:
            problems.append(f"wrong shape: {name} is {tensor.shape} instead of {wanted}")
        if tensor.dtype.name not in types:
            problems.append(f"wrong type: {name} is {tensor.dtype.name}, not {' or '.join(types)}")
    return problems
