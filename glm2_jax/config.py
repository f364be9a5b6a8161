"""The architecture of a ChatGLM2-family model, read from the published `config.json` files."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from glm2_jax.choices import FAMILIES, ROPE_KINDS
from glm2_jax.errors import CheckpointError
from glm2_jax.family import (
    config_signs,
    decide_family,
    named_family,
    tokenizer_signs,
)

MAX_SIZE = 2**31 - 1  # positions and ids are int32

# Keys of config.json with the only value that this implementation computes, and the value that
# the published configuration class takes when the key is absent.
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

# Our field -> (the published key, the published class's default; None = there is no default).
_DIMENSIONS: dict[str, tuple[str, int | None]] = {
    "num_layers": ("num_layers", 28),
    "vocab_size": ("padded_vocab_size", 65024),
    "hidden_size": ("hidden_size", 4096),
    "ffn_hidden_size": ("ffn_hidden_size", 13696),
    "num_heads": ("num_attention_heads", 32),
    "num_kv_heads": ("multi_query_group_num", 1),
    "head_dim": ("kv_channels", 128),
    "seq_length": ("seq_length", 2048),
}


@dataclasses.dataclass(frozen=True)
class GLMConfig:
    """Sizes and options of one model; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        num_layers: L, transformer blocks.
        vocab_size: V, rows of the embedding and of the head, padding rows included.
        hidden_size: D.
        ffn_hidden_size: F.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; query head n reads key/value head n // (N / K).
        head_dim: H; the first H / 2 dimensions of a head are rotated.
        seq_length: positions the model knows; prompt + answer may not be longer.
        norm_eps: epsilon inside the reciprocal square root of RMSNorm.
        rope_ratio: the published `rope_ratio`; its meaning is `rope_kind`.
        rope_kind: "linear": positions are divided by `rope_ratio` (chatglm2-6b-32k);
            "base": the rotary base is multiplied by it (chatglm3-6b-32k and -128k).
        rope_base: the rotary base before `rope_ratio`.
        rope_table_dtype: "float32", or "reference" for the rounding that the published code has
            when it runs in half precision.
        logn_scaling: multiply queries by max(1, log(64 + p + 1) / log(2048)). Seen in one public
            copy of chatglm3-6b-128k only, unverified, therefore off.
        family: "chatglm2", "chatglm3" or "codegeex2".
        hidden_dropout: dropout after attention and MLP, in training.
        attention_dropout: dropout of attention probabilities, in training.
        eos_token_id: id that ends an answer.
        pad_token_id: id that fills rows.
    """

    num_layers: int
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    seq_length: int
    norm_eps: float = 1e-5
    rope_ratio: float = 1.0
    rope_kind: str = "base"
    rope_base: float = 10000.0
    rope_table_dtype: str = "float32"
    logn_scaling: bool = False
    family: str = "chatglm2"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    eos_token_id: int = 2
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        for field in _DIMENSIONS:
            value = getattr(self, field)
            if not _is_integer(value) or not 0 < value <= MAX_SIZE:
                wanted = f"a whole number from 1 to {MAX_SIZE}"
                raise _bad_value(_DIMENSIONS[field][0], value, wanted)
        if self.num_heads % self.num_kv_heads:
            raise _bad_value(
                "multi_query_group_num", self.num_kv_heads, f"a divisor of {self.num_heads} heads"
            )
        if self.head_dim % 4:
            raise _bad_value("kv_channels", self.head_dim, "a multiple of 4 (half is rotated)")
        for field, choices in {
            "family": FAMILIES,
            "rope_kind": ROPE_KINDS,
            "rope_table_dtype": ("float32", "reference"),
        }.items():
            if getattr(self, field) not in choices:
                raise _bad_value(field, getattr(self, field), " or ".join(choices))
        for field, key in {
            "norm_eps": "layernorm_epsilon",
            "rope_ratio": "rope_ratio",
            "rope_base": "rope_base",
        }.items():
            value = getattr(self, field)
            if not 1e-30 < value < 1e30:  # else it is 0 or infinity in float32
                raise _bad_value(key, value, "a number above 0 that float32 can hold")
        for key in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise _bad_value(key, getattr(self, key), "at least 0 and below 1")
        for key in ("eos_token_id", "pad_token_id"):
            if not 0 <= getattr(self, key) < self.vocab_size:
                raise _bad_value(key, getattr(self, key), f"an id below {self.vocab_size}")

    @property
    def num_params(self) -> int:
        """Number of parameters, embedding and head included (6,243,584,000 for the 6B models)."""
        qkv_rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        layer = (
            2 * self.hidden_size
            + qkv_rows * (self.hidden_size + 1)
            + self.num_heads * self.head_dim * self.hidden_size
            + 3 * self.ffn_hidden_size * self.hidden_size
        )
        return self.num_layers * layer + (2 * self.vocab_size + 1) * self.hidden_size

    @property
    def aligned_length(self) -> int:
        """Tokens up to which the chat model was aligned: ChatGLM2 without `rope_ratio` was
        trained on 32K and aligned on 8K only; the others are aligned up to `seq_length`."""
        if self.family == "chatglm2" and self.rope_ratio == 1.0:
            return min(8192, self.seq_length)
        return self.seq_length

    @property
    def default_template(self) -> str:
        """Prompt template of the family; CodeGeeX2 is a base model and takes the raw text."""
        return "raw" if self.family == "codegeex2" else self.family

    @classmethod
    def from_hf(
        cls,
        raw: Mapping[str, Any],
        *,
        tokenizer_config: Mapping[str, Any] | None = None,
        rope_kind: str | None = None,
        family: str | None = None,
    ) -> "GLMConfig":
        """Reads a published `config.json`.

        Args:
            raw: the parsed file. Beside the published keys it may hold our own `family`,
                `rope_kind`, `rope_table_dtype` and `logn_scaling`.
            tokenizer_config: the parsed `tokenizer_config.json`, asked for the family where the
                configuration does not tell it.
            rope_kind: overrides what the family says about `rope_ratio`.
            family: overrides what the files say about the family.

        Returns:
            The configuration. Unknown keys that do not change the mathematics are ignored.

        Raises:
            CheckpointError: another model, a key whose value this implementation does not
                compute, a value out of range, signs of different families, or a `rope_ratio`
                whose meaning cannot be told.
        """
        _refuse_other_models(raw)
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
            signs = [*config_signs(raw), *tokenizer_signs(tokenizer_config or {})]
            family = decide_family(signs, "config.json")
        ratio = _number(raw, "rope_ratio", 1.0)
        rope_kind = str(rope_kind or raw.get("rope_kind") or _tell_rope_kind(family, ratio))
        if family is None:
            scaled_base = ratio != 1.0 and rope_kind == "base"
            family = "chatglm3" if scaled_base else "chatglm2"
        return cls(
            **{field: _integer(raw, key, default) for field, (key, default) in _DIMENSIONS.items()},
            norm_eps=_number(raw, "layernorm_epsilon", 1e-5),
            rope_ratio=ratio,
            rope_kind=rope_kind,
            rope_table_dtype=raw.get("rope_table_dtype", "float32"),
            logn_scaling=_flag(raw, "logn_scaling"),
            family=family,
            hidden_dropout=_number(raw, "hidden_dropout", 0.0),
            attention_dropout=_number(raw, "attention_dropout", 0.0),
            eos_token_id=_first_id(raw, "eos_token_id", 2),
            pad_token_id=_first_id(raw, "pad_token_id", 0),
        )

    def to_hf(self) -> dict[str, Any]:
        """The configuration under the published key names, with our `family`, `rope_kind`,
        `rope_table_dtype` and `logn_scaling` beside them; `from_hf` gives the same object back."""
        return {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            **{key: getattr(self, field) for field, (key, _) in _DIMENSIONS.items()},
            **{key: wanted for key, (wanted, _) in _REQUIRED_VALUES.items()},
            "layernorm_epsilon": self.norm_eps,
            "rope_ratio": self.rope_ratio,
            "rope_kind": self.rope_kind,
            "rope_table_dtype": self.rope_table_dtype,
            "logn_scaling": self.logn_scaling,
            "family": self.family,
            "hidden_dropout": self.hidden_dropout,
            "attention_dropout": self.attention_dropout,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }


def shorten(value: Any) -> str:
    """A value of a file for a message: never more than a line of it."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _bad_value(key: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"config: {key} = {shorten(value)} is not possible.",
        f"It must be {wanted}.",
        "Correct it, or download config.json again.",
    )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(raw: Mapping[str, Any], key: str, default: int | None) -> int:
    value = raw.get(key, default)
    if not _is_integer(value):
        raise _bad_value(key, value, "a whole number")
    return value


def _first_id(raw: Mapping[str, Any], key: str, default: int) -> int:
    """An id; of a list the first one, null where the default holds."""
    value = raw.get(key)
    if isinstance(value, list) and value:
        value = value[0]
    return default if value is None else _integer({key: value}, key, None)


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise _bad_value(key, value, "true or false")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _bad_value(key, value, "a number")
    return float(min(max(value, -1e300), 1e300))  # far beyond what any key may hold


def _refuse_other_models(raw: Mapping[str, Any]) -> None:
    model_type = raw.get("model_type", "chatglm")
    # A path's last part: a folder above it may have any name. GLM-4 has a size or a letter behind.
    name = raw.get("_name_or_path")
    name = re.split(r"[/\\]", name.lower().rstrip("/\\"))[-1] if isinstance(name, str) else ""
    named = re.search(r"glm-?4[-v]", name) and named_family(name) is None
    if named or raw.get("padded_vocab_size") == 151552:
        raise CheckpointError(
            "GLM-4 is not supported.",
            "It has another tokenizer (a tiktoken file of 151,552 ids, no SentencePiece model).",
            "Use a ChatGLM2, ChatGLM3 or CodeGeeX2 checkpoint.",
        )
    if model_type != "chatglm":
        raise CheckpointError(
            f"config.json: model_type {shorten(model_type)} is not a ChatGLM model.",
            "Only model_type 'chatglm' (ChatGLM2, ChatGLM3, CodeGeeX2) is implemented.",
            "Use a ChatGLM2, ChatGLM3 or CodeGeeX2 checkpoint.",
        )
    if raw.get("position_encoding_2d") or "inner_hidden_size" in raw:
        raise CheckpointError(
            "The first-generation ChatGLM-6B is not supported.",
            "It is another architecture: 2-D positions, LayerNorm, a 130,528-id vocabulary.",
            "Use a ChatGLM2, ChatGLM3 or CodeGeeX2 checkpoint.",
        )


def _tell_rope_kind(family: str | None, ratio: float) -> str:
    if family == "chatglm2":
        return "linear"
    if family is not None or ratio == 1.0:
        return "base"
    raise CheckpointError(
        f"config.json: the meaning of rope_ratio = {ratio:g} cannot be told.",
        "ChatGLM2 divides positions by it, ChatGLM3 multiplies the rotary base; "
        "_name_or_path and tokenizer_config.json name neither.",
        "Say which with --family chatglm2 or --family chatglm3, or with --rope-scaling linear "
        "(ChatGLM2) or --rope-scaling base (ChatGLM3).",
    )


def _preset(family: str, seq_length: int, rope_ratio: float = 1.0) -> GLMConfig:
    return GLMConfig(
        num_layers=28,
        vocab_size=65024,
        hidden_size=4096,
        ffn_hidden_size=13696,
        num_heads=32,
        num_kv_heads=2,
        head_dim=128,
        seq_length=seq_length,
        rope_ratio=rope_ratio,
        rope_kind=_tell_rope_kind(family, rope_ratio),
        family=family,
    )


PRESETS: Mapping[str, GLMConfig] = {
    "chatglm2-6b": _preset("chatglm2", 32768),
    "chatglm2-6b-32k": _preset("chatglm2", 32768, rope_ratio=16.0),
    "chatglm2-6b-int4": _preset("chatglm2", 32768),
    "chatglm3-6b": _preset("chatglm3", 8192),
    "chatglm3-6b-32k": _preset("chatglm3", 32768, rope_ratio=50.0),
    "chatglm3-6b-128k": _preset("chatglm3", 131072, rope_ratio=500.0),
    "codegeex2-6b": _preset("codegeex2", 8192),
}
"""The published 6B checkpoints by name. Source: each repository's config.json."""
