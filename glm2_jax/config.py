"""The architecture of a ChatGLM2-family model, read from the published `config.json` files."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

from glm2_jax.block import BLOCKS, Block
from glm2_jax.choices import FAMILIES, ROPE_KINDS
from glm2_jax.errors import CheckpointError, shorten
from glm2_jax.family import config_signs, decide_family, named_family
from glm2_jax.parts import parts_of

MAX_SIZE = 2**31 - 1  # positions and ids are int32

# Keys of config.json with the only value that this implementation computes, and the value that
# the published configuration class takes if the key is absent.
_REQUIRED_VALUES: dict[str, tuple[Any, Any]] = {
    "rmsnorm": (True, True),
    "post_layer_norm": (True, True),
    "apply_residual_connection_post_layernorm": (False, False),
    "add_bias_linear": (False, False),
    "add_qkv_bias": (True, False),
    "multi_query_attention": (True, False),
    "original_rope": (True, True),
    "tie_word_embeddings": (False, False),
    "interleaved_qkv": (False, False),
    "rotary_percent": (0.5, 0.5),
    "fp32_residual_connection": (False, False),
}

# Our dimensions, with the value that the published class takes if the key is absent.
_DIMENSIONS = {
    "num_layers": 28,
    "vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "num_heads": 32,
    "num_kv_heads": 1,
    "head_dim": 128,
    "seq_length": 2048,
}

# Our other fields that a file sets.
_READ = (
    *("norm_eps", "rope_ratio", "hidden_dropout", "attention_dropout"),
    *("logn_scaling", "eos_token_id", "pad_token_id"),
)

# Our field -> the published key, where it has another name.
_KEYS = {
    "vocab_size": "padded_vocab_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "multi_query_group_num",
    "head_dim": "kv_channels",
    "norm_eps": "layernorm_epsilon",
}


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
    norm_eps: float = 1e-5  # inside the reciprocal square root of RMSNorm
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
    # Where a model differs from its family; None = as the family.
    attention_bias: bool | None = None  # False: q, k and v have no biases
    tied_head: bool | None = None
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

    def __post_init__(self) -> None:
        heads, V, tables = self.num_heads, self.vocab_size, ("float32", "reference")
        integer = f"a whole number from 1 to {MAX_SIZE}"
        rules: tuple[tuple[Iterable[str], Callable[[Any], bool], str], ...] = (
            (_DIMENSIONS, lambda x: _is_integer(x) and 0 < x <= MAX_SIZE, integer),
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
            (["eos_token_id", "pad_token_id"], lambda x: 0 <= x < V, f"an id below {V}"),
        )
        for names, is_valid, wanted in rules:
            for name in names:
                if not is_valid(value := getattr(self, name)):
                    raise _bad_value(name, value, wanted)

    @cached_property
    def block(self) -> Block:
        """How a layer computes: that of the family, with what this model has of its own."""
        block = BLOCKS[self.family]
        if self.attention_bias is False:
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
    def default_template(self) -> str:
        """The prompt template of the family; CodeGeeX2 is a base model and takes raw text."""
        return "raw" if self.family == "codegeex2" else self.family

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
        _refuse_other_models(raw)
        raw = dict(raw)
        for key, (wanted, default) in _REQUIRED_VALUES.items():
            if raw.get(key, default) != wanted:
                absent = "" if key in raw else " (the key is absent, which means that)"
                shown = shorten(raw.get(key, default))
                raise CheckpointError(
                    f"config.json: {key} = {shown} is not supported{absent}.",
                    f"It changes the mathematics; only {key} = {wanted!r} is implemented.",
                    "Use a published ChatGLM2 / ChatGLM3 / CodeGeeX2 configuration.",
                )
        family = family or raw.get("family")
        if family is None:
            family = decide_family(config_signs(raw), "config.json")
        for name in ("eos_token_id", "pad_token_id"):  # of a list the first; null = the default
            value = raw.get(name)
            value = value[0] if isinstance(value, list) and value else value
            raw[name] = getattr(cls, name) if value is None else value
        defaults = {name: getattr(cls, name) for name in _READ} | _DIMENSIONS
        values: dict[str, Any] = {name: _read(raw, name, defaults[name]) for name in defaults}
        ratio = values["rope_ratio"]
        rope_kind = str(rope_kind or raw.get("rope_kind") or _rope_kind(family, ratio))
        if family is None:
            family = "chatglm3" if ratio != 1.0 and rope_kind == "base" else "chatglm2"
        return cls(
            **values,
            rope_kind=rope_kind,
            rope_table_dtype=raw.get("rope_table_dtype", "float32"),
            family=family,
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the configuration under the published keys and our own, for `from_hf`."""
        fields = dataclasses.asdict(self)
        del fields["rope_base"]  # always the published one in a file
        return {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            **{_KEYS.get(name, name): value for name, value in fields.items()},
            **{key: wanted for key, (wanted, _) in _REQUIRED_VALUES.items()},
        }


def _bad_value(name: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"config: {_KEYS.get(name, name)} = {shorten(value)} is not valid.",
        f"It must be {wanted}.",
        "Correct it, or download config.json again.",
    )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read(raw: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of one of our fields, which must have the type of its default."""
    value = raw.get(_KEYS.get(name, name), default)
    if isinstance(default, bool):
        ok, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        ok, wanted = _is_integer(value), "a whole number"
    else:
        ok, wanted = _is_integer(value) or isinstance(value, float), "a number"
        if ok:
            value = float(min(max(value, -1e300), 1e300))  # far beyond what any key may hold
    if not ok:
        raise _bad_value(name, value, wanted)
    return value


def _refuse_other_models(raw: Mapping[str, Any]) -> None:
    model_type = raw.get("model_type", "chatglm")
    # Only a path's last part: a folder above it may have any name.
    name = raw.get("_name_or_path")
    name = re.split(r"[/\\]", name.lower().rstrip("/\\"))[-1] if isinstance(name, str) else ""
    named = re.search(r"glm-?4[-v]", name) and named_family(name) is None
    if named or raw.get("padded_vocab_size") == 151552:
        what = "GLM-4 is not supported."
        why = "It has another tokenizer (a tiktoken file of 151,552 ids, no SentencePiece model)."
    elif model_type != "chatglm":
        what = f"config.json: model_type {shorten(model_type)} is not supported."
        why = "Only model_type 'chatglm' (ChatGLM2, ChatGLM3, CodeGeeX2) is implemented."
    elif raw.get("position_encoding_2d") or "inner_hidden_size" in raw:
        what = "The first-generation ChatGLM-6B is not supported."
        why = "It is another architecture: 2-D positions, LayerNorm, a 130,528-id vocabulary."
    else:
        return
    raise CheckpointError(what, why, "Use a ChatGLM2, ChatGLM3 or CodeGeeX2 checkpoint.")


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


def _preset(family: str, seq_length: int, ratio: float = 1.0) -> GLMConfig:
    sizes: dict[str, Any] = {**_DIMENSIONS, "num_kv_heads": 2, "seq_length": seq_length}
    kind = _rope_kind(family, ratio)
    return GLMConfig(**sizes, rope_ratio=ratio, rope_kind=kind, family=family)


PRESETS: Mapping[str, GLMConfig] = {
    "chatglm2-6b": _preset("chatglm2", 32768),
    "chatglm2-6b-32k": _preset("chatglm2", 32768, 16.0),
    "chatglm2-6b-int4": _preset("chatglm2", 32768),
    "chatglm3-6b": _preset("chatglm3", 8192),
    "chatglm3-6b-32k": _preset("chatglm3", 32768, 50.0),
    "chatglm3-6b-128k": _preset("chatglm3", 131072, 500.0),
    "codegeex2-6b": _preset("codegeex2", 8192),
}
"""The published 6B checkpoints by name. Source: each repository's config.json."""
