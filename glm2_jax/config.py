"""The architecture of a model of the GLM family, read from the published `config.json` files."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

from glm2_jax.block import BLOCKS, Block
from glm2_jax.choices import FAMILIES, ROPE_KINDS
from glm2_jax.errors import CheckpointError
from glm2_jax.family import config_signs, decide_family
from glm2_jax.forms import Forms
from glm2_jax.ideas import Idea
from glm2_jax.parts import parts_of
from glm2_jax.published import (
    FORMS,
    bad_value,
    form_of,
    is_integer,
    read_fields,
    read_rope,
    write_fields,
)

MAX_SIZE = 2**31 - 1  # positions and ids are int32

_SIZES = (
    *("num_layers", "vocab_size", "hidden_size", "ffn_hidden_size"),
    *("num_heads", "num_kv_heads", "head_dim", "seq_length"),
)
_IDS = ("sop_token_id", "mask_token_id", "smask_token_id", "gmask_token_id")

# The prompt template of a family, where it has another name. CodeGeeX2 is a base model and takes
# raw text.
_TEMPLATES = {"codegeex2": "raw", "glm4-0414": "glm4", "glm": "fill"}


@dataclasses.dataclass(frozen=True)
class GLMConfig:
    """The sizes and options of one model; hashable, to be a static argument of `jax.jit`."""

    num_layers: int  # L, transformer blocks
    vocab_size: int  # V, rows of the embedding and of the head, padding rows included
    hidden_size: int  # D
    ffn_hidden_size: int  # F
    num_heads: int  # N, query heads
    num_kv_heads: int  # K, key/value heads; query head n reads key/value head n // (N / K)
    head_dim: int  # H; the first H / 2 dimensions of a head are rotated
    seq_length: int  # longest context, prompt and answer together
    norm_eps: float = 1e-5  # inside the reciprocal square root of the norms
    rope_ratio: float = 1.0  # the published one; its meaning is `rope_kind`:
    # "linear" divides positions by it (chatglm2-6b-32k), "base" multiplies the rotary base by it
    # (chatglm3-6b-32k and -128k).
    rope_kind: str = "base"
    rope_base: float = 10000.0  # before `rope_ratio`
    # "reference" is the rounding of the published code when it runs in half precision.
    rope_table_dtype: str = "float32"
    # Multiply queries by max(1, log(64 + p + 1) / log(2048)); off, because it is in only one public
    # copy of chatglm3-6b-128k and unverified.
    logn_scaling: bool = False
    family: str = "chatglm2"  # one of `choices.FAMILIES`: the row of `block.BLOCKS`
    attention_bias: bool = True  # False: q, k and v have no biases (GLM-4-32B-0414)
    tied_head: bool | None = None  # None = as the family
    position_encoding_2d: bool = True  # False: one position, and a rotation of the complete head
    hidden_dropout: float = 0.0  # after attention and MLP, in training
    attention_dropout: float = 0.0  # of attention probabilities, in training
    eos_token_id: int = 2  # ends an answer
    pad_token_id: int = 0  # fills rows
    # Of families with a bidirectional context, else None.
    sop_token_id: int | None = None  # begins the part that is generated
    mask_token_id: int | None = None  # [MASK]
    smask_token_id: int | None = None  # [sMASK]
    gmask_token_id: int | None = None  # [gMASK]

    # Never generated: in glm-10b-chinese the row of [gMASK] is that of the end.
    banned_token_ids: tuple[int, ...] = ()
    forms: Forms = Forms()  # chosen by measuring on a device; not part of the model
    idea: Idea = Idea()  # being tried; not part of the model

    def __post_init__(self) -> None:
        heads, V, tables = self.num_heads, self.vocab_size, ("float32", "reference")
        integer, an_id = f"a whole number from 1 to {MAX_SIZE}", f"an id below {V}"
        rules: tuple[tuple[Iterable[str], Callable[[Any], bool], str], ...] = (
            (_SIZES, lambda x: is_integer(x) and 0 < x <= MAX_SIZE, integer),
            (["num_kv_heads"], lambda x: heads % x == 0, f"a divisor of {heads} heads"),
            (["head_dim"], lambda x: x % 4 == 0, "a multiple of 4 (half is rotated)"),
            (["family"], lambda x: x in FAMILIES, " or ".join(FAMILIES)),
            (["rope_kind"], lambda x: x in ROPE_KINDS, " or ".join(ROPE_KINDS)),
            (["rope_table_dtype"], lambda x: x in tables, " or ".join(tables)),
            # In float32 neither 0 nor infinity.
            (
                ["norm_eps", "rope_ratio", "rope_base"],
                lambda x: 1e-30 < x < 1e30,
                "a number above 0 that float32 can hold",
            ),
            (["hidden_dropout", "attention_dropout"], lambda x: 0 <= x < 1, "at least 0, below 1"),
            (["eos_token_id", "pad_token_id"], lambda x: 0 <= x < V, an_id),
            (_IDS, lambda x: x is None or (is_integer(x) and 0 <= x < V), an_id),
            (["banned_token_ids"], lambda x: all(0 <= i < V for i in x), f"ids below {V}"),
            (["tied_head"], lambda x: x is None or isinstance(x, bool), "true or false"),
        )
        for names, is_valid, wanted in rules:
            for name in names:
                if not is_valid(value := getattr(self, name)):
                    family = self.family if self.family in FAMILIES else "chatglm2"
                    key, _ = FORMS[family].fields.get(name, (name, None))
                    raise bad_value(key, value, wanted)

    @cached_property
    def block(self) -> Block:
        """How a layer computes: that of the family, with what this model has of its own."""
        block = BLOCKS[self.family]
        if not self.attention_bias:
            block = dataclasses.replace(block, biases="none")
        if self.tied_head is not None:
            block = dataclasses.replace(block, tied_head=self.tied_head)
        if not self.position_encoding_2d:
            block = dataclasses.replace(block, rotary="full")
        return block

    @property
    def num_params(self) -> int:
        """The number of parameters (6,243,584,000 for the ChatGLM2 and ChatGLM3 models)."""
        sizes = ((part.in_layers, math.prod(part.shape(self))) for part in parts_of(self))
        return sum(size * (self.num_layers if in_layers else 1) for in_layers, size in sizes)

    @property
    def mlp_inputs(self) -> int:
        """C, the matrices of the MLP that read the activations."""
        return self.block.mlp_inputs

    @property
    def num_positions(self) -> int:
        """P, the rows of each table of learned positions."""
        return self.seq_length + 1

    @property
    def aligned_length(self) -> int:
        """The longest context of the chat model: ChatGLM2, trained on 32K, was aligned on 8K."""
        short = self.family == "chatglm2" and self.rope_ratio == 1.0
        return min(8192, self.seq_length) if short else self.seq_length

    @property
    def context_limit(self) -> int:
        """The longest context that can be computed. ChatGLM-6B reads more than `seq_length`, the
        length of its training, beyond which its answers get worse."""
        return MAX_SIZE if self.block.open_ended else self.seq_length

    @property
    def rope_text(self) -> str:
        """How the model knows positions, for people: "plain" is the rotary base as published."""
        special = {
            "none": "none: learned positions",
            "both": "two positions, each in half of a head",
        }
        plain = "plain" if self.rope_ratio == 1 else f"{self.rope_kind}, ratio {self.rope_ratio:g}"
        return special.get(self.block.rotary, plain)

    @property
    def default_template(self) -> str:
        """The prompt template of the family, one of `choices.TEMPLATES`."""
        return _TEMPLATES.get(self.family, self.family)

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the model itself as plain JSON, for another process."""
        return {name: value for name, value in vars(self).items() if name in _FIELDS}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "GLMConfig":
        """Return the configuration of which `to_fields` are these, also after JSON."""
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**{**fields, **lists})

    @classmethod
    def from_hf(
        cls,
        raw: Mapping[str, Any],
        *,
        rope_kind: str | None = None,
        family: str | None = None,
    ) -> "GLMConfig":
        """Read a parsed `config.json`, with the published keys and our own.

        Unknown keys that do not change the mathematics are ignored. `rope_kind` and `family`
        override what the file says.

        Raises:
            CheckpointError: another model, a key whose value this implementation does not
                compute, a value out of range, signs of different families, or a `rope_ratio`
                whose meaning is unknown.
        """
        form = form_of(raw)
        family = family or raw.get("family")
        if family is None:
            family = decide_family(config_signs(raw), "config.json")
        if family in FAMILIES and family not in form.families:
            raise CheckpointError(
                f"config.json is that of {form.name}, not of a {family} model.",
                f"This kind of file belongs to the family {' or '.join(form.families)}.",
                "Use the config.json that was published with the weights, or name another family "
                "with --family.",
            )
        if family == "glm4":  # whose class has other ids
            raw = {"eos_token_id": 151329, "pad_token_id": 151329, **raw}
        values = read_fields(form, raw)
        ratio, meaning = read_rope(form, raw)
        rope_kind = str(rope_kind or meaning or _rope_kind(family, ratio))
        if family is None:
            family = "chatglm3" if ratio != 1.0 and rope_kind == "base" else "chatglm2"
        return cls(**values | {"rope_ratio": ratio, "rope_kind": rope_kind, "family": family})

    def to_hf(self) -> dict[str, Any]:
        """Return the configuration under the published keys of its family, for `from_hf`."""
        form = FORMS[self.family]
        own = {"family": self.family}
        if "rope_ratio" in form.fields:
            own["rope_kind"] = self.rope_kind
        return own | write_fields(form, vars(self))


_FIELDS = {field.name for field in dataclasses.fields(GLMConfig)} - {"forms", "idea"}


def _rope_kind(family: str | None, ratio: float) -> str:
    if family == "chatglm2":
        return "linear"
    if family is not None or ratio == 1.0:
        return "base"
    raise CheckpointError(
        f"config.json: the meaning of rope_ratio = {ratio:g} is unknown.",
        "ChatGLM2 divides positions by it, ChatGLM3 multiplies the rotary base; "
        "_name_or_path and tokenizer_config.json name neither.",
        "Add --family chatglm2 or --family chatglm3, or --rope-scaling linear (ChatGLM2) or "
        "--rope-scaling base (ChatGLM3).",
    )


def _preset(keys: Mapping[str, Any], family: str | None = None, **changes: Any) -> GLMConfig:
    """Return the configuration of a published file; only keys that its class lacks are given."""
    return GLMConfig.from_hf({**keys, **changes}, family=family)


_CHATGLM2 = {"add_qkv_bias": True, "multi_query_attention": True, "multi_query_group_num": 2}
_GLM4 = {
    **_CHATGLM2, "padded_vocab_size": 151552, "num_layers": 40, "layernorm_epsilon": 1.5625e-07,
    "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329,
}  # fmt: skip
_GLM4_0414 = {
    "model_type": "glm4", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
}  # fmt: skip
_CHATGLM = {
    "position_encoding_2d": True, "vocab_size": 130528, "bos_token_id": 130004,
    "eos_token_id": 130005, "mask_token_id": 130000, "gmask_token_id": 130001, "pad_token_id": 3,
}  # fmt: skip
_GLM = {"block_position_encoding": True, "vocab_size": 50048, "max_sequence_length": 1024}

PRESETS: Mapping[str, GLMConfig] = {
    "chatglm2-6b": _preset(_CHATGLM2, "chatglm2", seq_length=32768),
    "chatglm2-6b-32k": _preset(_CHATGLM2, "chatglm2", seq_length=32768, rope_ratio=16),
    "chatglm2-6b-int4": _preset(_CHATGLM2, "chatglm2", seq_length=32768),
    "chatglm3-6b": _preset(_CHATGLM2, "chatglm3", seq_length=8192),
    "chatglm3-6b-32k": _preset(_CHATGLM2, "chatglm3", seq_length=32768, rope_ratio=50),
    "chatglm3-6b-128k": _preset(_CHATGLM2, "chatglm3", seq_length=131072, rope_ratio=500),
    "codegeex2-6b": _preset(_CHATGLM2, "codegeex2", seq_length=8192),
    "glm-4-9b": _preset(_GLM4, seq_length=8192),
    "glm-4-9b-chat": _preset(_GLM4, seq_length=131072, rope_ratio=500),
    "glm-4-9b-chat-1m": _preset(
        _GLM4, seq_length=1048576, rope_ratio=10000, multi_query_group_num=4
    ),
    "glm-4-9b-0414": _preset(_GLM4_0414),
    "glm-4-32b-0414": _preset(
        _GLM4_0414, num_hidden_layers=61, hidden_size=6144, num_attention_heads=48,
        intermediate_size=23040, attention_bias=False,
    ),
    "chatglm-6b": _preset(_CHATGLM),
    "chatglm-6b-int4": _preset(_CHATGLM),
    "chatglm-6b-int8": _preset(_CHATGLM),
    "glm-large-chinese": _preset(_GLM),
    "glm-10b-chinese": _preset(
        _GLM, num_layers=48, hidden_size=4096, num_attention_heads=64, bad_words_id=[50009]
    ),
}  # fmt: skip
"""The published checkpoints by name. Source: each repository's config.json.

Not checked against a published file: rope_ratio of glm-4-9b and glm-4-9b-chat-1m, the 4 key/value
heads of the latter, and the sizes of the two 0414 models.
"""
