"""The one table between published tensor names and the parameters of this project.

Each rule names a stored tensor and the parts it consists of; the rows of the parts follow each
other in the stored tensor. Forwards it splits (loading), backwards it joins (exporting). Sources of
names and row order: the index files and state dictionaries of THUDM/chatglm2-6b. A new layout is
one more table, and a new kind of parameter one more `Part`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from convert.files.aliases import is_computed, plain_name, resolve_aliases, same_numbers
from convert.files.tensor import StoredTensor
from convert.layouts.misfits import explain_misfits
from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError
from glm2_jax.parts import TABLE, Part, parts_of
from glm2_jax.schemes import COLUMN_AXES, EMBEDDINGS, Scheme

Shape = tuple[int, ...]

FLOATS = ("float16", "bfloat16", "float32", "float64")
SCALE = "_scale"  # appended to the name of a quantized tensor: the name of its scales
_LEAST_TENSORS = 20  # a configuration with fewer layers than this is always compared by name

_LAYER = "{layer}"
MATRICES = (*COLUMN_AXES, *EMBEDDINGS, "positions", "blocks")  # the others have one stored axis


@dataclasses.dataclass(frozen=True)
class Rule:
    """A stored tensor, and our parameters whose rows it consists of.

    `{layer}` in the name stands for the number of the layer. `fused`: all rows are one axis and all
    columns another, as in the published files; our own files keep the axes of the part. `by_head`:
    the rows of the parts alternate by head. `halves`: a head consists of so many sections of R
    dimensions, of which i and R / 2 + i are rotated together, not 2i and 2i + 1. `dtype`: it is
    stored in this type, whatever that of the others.
    """

    name: str
    parts: tuple[Part, ...]
    fused: bool = True
    by_head: bool = False
    halves: int = 0
    dtype: str | None = None

    def shape(self, config: GLMConfig) -> Shape:
        """Return the shape as stored."""
        shapes = [part.shape(config) for part in self.parts]
        if not self.fused:
            return shapes[0]
        if self.parts[0].name not in MATRICES:  # norms and biases
            return (sum(map(math.prod, shapes)),)
        rows = -column_axes(self.parts[0])
        return sum(math.prod(shape[:rows]) for shape in shapes), math.prod(shapes[0][rows:])

    def order(self, shapes: Sequence[Shape]) -> np.ndarray | None:
        """Return the stored row of each of our rows, int [rows], the parts one after the other;
        None where they are stored in that order. `shapes` are those of the parts, heads first."""
        if not (self.by_head or self.halves):
            return None
        parts, found, start = len(self.parts), [], 0
        for number, (part, (heads, size, *_)) in enumerate(zip(self.parts, shapes, strict=True)):
            if self.by_head:
                rows = np.arange(heads * parts * size).reshape(heads, parts, size)[:, number]
            else:
                rows = np.arange(start, start + heads * size).reshape(heads, size)
            if self.halves and part.name[0] in "qk":
                rows = rows[:, self.dimensions(size)]
            found.append(rows.reshape(-1))
            start += heads * size
        return np.concatenate(found)

    def dimensions(self, size: int) -> np.ndarray:
        """Return the stored dimension of each of ours in a head of that size, for q and k."""
        if not self.halves:
            return np.arange(size)
        sections = np.arange(size).reshape(self.halves, 2, -1)
        return sections.swapaxes(1, 2).reshape(-1)  # 0, R / 2, 1, R / 2 + 1, ...

    @property
    def column_axes(self) -> int:
        """How many of its last axes are columns."""
        return 1 if self.fused else column_axes(self.parts[0])

    def quantized(self, scheme: Scheme | None) -> bool:
        """Return whether folders of a scheme store it quantized."""
        return scheme is not None and all(scheme.covers(part.name) for part in self.parts)

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


def column_axes(part: Part) -> int:
    """Return how many of the last axes of a parameter are columns."""
    return COLUMN_AXES.get(part.name, 1)


def _rules(block: str, names: Mapping[str, str], **form: int) -> tuple[Rule, ...]:
    """Return the rules of a layout: stored name -> names of our parameters. "*" stands for `block`,
    and `form` is that of rules with several parts."""
    rules = []
    for name, parts in names.items():
        found = tuple(TABLE[part] for part in parts.split())
        rules.append(Rule(name.replace("*", block), found, **cast(Any, form if found[1:] else {})))
    return tuple(rules)


PUBLISHED = _rules(
    "transformer.encoder.layers.{layer}",
    {
        "transformer.embedding.word_embeddings.weight": "embed",
        "*.input_layernorm.weight": "attn_norm",
        "*.self_attention.query_key_value.weight": "q k v",
        "*.self_attention.query_key_value.bias": "q_bias k_bias v_bias",
        "*.self_attention.dense.weight": "o",
        "*.post_attention_layernorm.weight": "mlp_norm",
        "*.mlp.dense_h_to_4h.weight": "gate_up",
        "*.mlp.dense_4h_to_h.weight": "down",
        "transformer.encoder.final_layernorm.weight": "final_norm",
        "transformer.output_layer.weight": "head",
    },
)
"""The tensors of the official folders of ChatGLM2, ChatGLM3, CodeGeeX2 and GLM-4-9B."""

GLM = _rules(
    "model.layers.{layer}",
    {
        "model.embed_tokens.weight": "embed",
        "*.input_layernorm.weight": "attn_norm",
        "*.self_attn.q_proj.weight": "q",
        "*.self_attn.q_proj.bias": "q_bias",
        "*.self_attn.k_proj.weight": "k",
        "*.self_attn.k_proj.bias": "k_bias",
        "*.self_attn.v_proj.weight": "v",
        "*.self_attn.v_proj.bias": "v_bias",
        "*.self_attn.o_proj.weight": "o",
        "*.post_self_attn_layernorm.weight": "attn_post_norm",
        "*.post_attention_layernorm.weight": "mlp_norm",
        "*.mlp.gate_up_proj.weight": "gate_up",
        "*.mlp.down_proj.weight": "down",
        "*.post_mlp_layernorm.weight": "mlp_post_norm",
        "model.norm.weight": "final_norm",
        "lm_head.weight": "head",
    },
)
"""The tensors of HF-native folders: `GlmForCausalLM` and `Glm4ForCausalLM` of transformers. Their
rotary pairs are interleaved as the published ones are, so that no row changes its place."""

_FIRST = {
    "*.input_layernorm.weight": "attn_norm",
    "*.input_layernorm.bias": "attn_norm_bias",
    "*.attention.query_key_value.weight": "q k v",
    "*.attention.query_key_value.bias": "q_bias k_bias v_bias",
    "*.attention.dense.weight": "o",
    "*.attention.dense.bias": "o_bias",
    "*.post_attention_layernorm.weight": "mlp_norm",
    "*.post_attention_layernorm.bias": "mlp_norm_bias",
    "*.mlp.dense_h_to_4h.weight": "gate_up",
    "*.mlp.dense_h_to_4h.bias": "gate_up_bias",
    "*.mlp.dense_4h_to_h.weight": "down",
    "*.mlp.dense_4h_to_h.bias": "down_bias",
    "transformer.final_layernorm.weight": "final_norm",
    "transformer.final_layernorm.bias": "final_norm_bias",
}

CHATGLM = tuple(
    dataclasses.replace(rule, dtype="float32" if "layernorm" in rule.name else None)
    for rule in _rules(
        "transformer.layers.{layer}",
        {"transformer.word_embeddings.weight": "embed", **_FIRST, "lm_head.weight": "head"},
        by_head=True,
        halves=2,
    )
)
"""The tensors of the official folders of ChatGLM-6B, whose norms are float32 in float16 files."""

BLANK_FILLING = _rules(
    "transformer.layers.{layer}",
    {
        "word_embeddings.weight": "embed",
        "transformer.position_embeddings.weight": "positions",
        "transformer.block_position_embeddings.weight": "blocks",
        **_FIRST,
    },
)
"""The tensors of the folders of GLM base models."""

_BY_FAMILY = {"chatglm": CHATGLM, "glm": BLANK_FILLING, "glm4-0414": GLM}


def rules_of(config: GLMConfig, *, native: bool = False) -> tuple[Rule, ...]:
    """Return the tensors of a model's published folder; `native` = of transformers' class."""
    rules = GLM if native else _BY_FAMILY.get(config.family, PUBLISHED)
    having = set(parts_of(config))
    found = [rule for rule in rules if having.issuperset(rule.parts)]
    if config.block.rotary == "full":  # ChatGLM-6B without 2-D positions has one section
        found = [dataclasses.replace(rule, halves=min(rule.halves, 1)) for rule in found]
    return tuple(found)


def tied_head(
    config: GLMConfig, tensors: Mapping[str, StoredTensor]
) -> tuple[GLMConfig, Mapping[str, StoredTensor]]:
    """Return the configuration and the tensors of a family whose embedding is its head.

    Its files may hold the head a second time, which is then left out; or one that differs, as a
    training may leave it, which is then a parameter.
    """
    if not config.block.tied_head:
        return config, tensors
    embed, head = (
        {plain_name(name + end): name + end for end in ("", SCALE)}
        for name in ("word_embeddings.weight", "lm_head.weight")
    )
    stored = {plain_name(name): name for name in tensors}
    heads = [stored.get(name) for name in head]
    if heads[0] is None:
        return config, tensors
    for ours, other in zip(embed, heads, strict=True):
        if other is not None and (
            ours not in stored or not same_numbers(tensors[stored[ours]], tensors[other])
        ):
            return dataclasses.replace(config, tied_head=False), tensors
    return config, {name: tensor for name, tensor in tensors.items() if name not in heads}


def has_frequencies(config: GLMConfig) -> bool:
    """Return whether the published folder has the tensor `INV_FREQ`."""
    return config.family not in _BY_FAMILY


def frequency_names(config: GLMConfig) -> list[str]:
    """Return the buffers of rotary frequencies that the published folder has. Its class computes
    them, but calls a folder without them incomplete."""
    if has_frequencies(config):
        return [INV_FREQ]
    each = "transformer.layers.{}.attention.rotary_emb.inv_freq"
    rules = _BY_FAMILY[config.family]
    return [each.format(layer) for layer in range(config.num_layers)] if rules is CHATGLM else []


def tied_names(config: GLMConfig) -> tuple[str, str] | None:
    """Return the name of an embedding that is the head, too, and that under which the published
    folder holds it a second time, because its class does not tie them; None where it does not."""
    table = _BY_FAMILY.get(config.family, PUBLISHED)
    names = {rule.parts[0].name: rule.name for rule in table}
    twice = config.block.tied_head and "head" in names
    return (names["embed"], names["head"]) if twice else None


def own_name(path: tuple[str, ...], layer: int | str | None = _LAYER) -> str:
    """Return the name in our own folders: ("layers", "q"), 3 -> "layers.3.q"."""
    return ".".join((path[0], str(layer), *path[1:]) if path[0] == "layers" else path)


OWN: tuple[Rule, ...] = tuple(Rule(own_name(p.path), (p,), fused=False) for p in TABLE.values())
"""The tensors of our own folders, of any family."""


def own_rules(config: GLMConfig) -> tuple[Rule, ...]:
    """Return the tensors of a model's folder of our own."""
    having = set(parts_of(config))
    return tuple(rule for rule in OWN if having.issuperset(rule.parts))


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


def refuse_prefix(names: Iterable[str]) -> None:
    """Raise a CheckpointError where all stored tensors are those of a P-Tuning v2 prefix."""
    left = sorted(name for name in names if not is_computed(name))
    if left and all("prefix_encoder." in name for name in left):
        raise CheckpointError(
            "These weights are a P-Tuning v2 prefix, not a model.",
            f"They hold only {', '.join(left)[:300]}.",
            "Give the model that it was trained on, and this folder as --prefix: "
            "python -m infer.chat --model BASE --prefix FOLDER.",
        )


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
    refuse_prefix(tensors)
    left = {name: tensor for name, tensor in tensors.items() if not is_computed(name)}
    if config.num_layers > max(len(left), _LEAST_TENSORS):  # num_layers may be any number
        raise CheckpointError(
            f"The tensors do not fit the configuration: num_layers is {config.num_layers}.",
            f"The weight files hold {len(left)} tensors, and a layer has several.",
            "Check that config.json belongs to these weights.",
        )
    wanted = {
        rule.full_name(layer): (rule, layer) for rule in rules for layer in rule.layers(config)
    }
    if all(
        rule.fused for rule in rules
    ):  # the manifest's checksums cover the names of our own format
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
        native = any(rule.name.startswith("model.") for rule in rules)
        raise explain_misfits(missing, wrong, list(left), tensors, native)
    return [matches[name] for name in order if name in matches]


def _wrong(config: GLMConfig, match: Match, scheme: Scheme | None) -> list[str]:
    """Return what is wrong with the shapes and dtypes of a match."""
    shape, problems = match.rule.shape(config), []
    expected = [(match.name, match.tensor, shape, FLOATS)]
    if match.scale is not None and scheme is not None:
        scheme = scheme.of(match.rule.parts[0].name)
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
