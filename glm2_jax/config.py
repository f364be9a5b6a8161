"""The architecture of a ChatGLM2-family model, read from the published `config.json` files."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from glm2_jax.choices import FAMILIES, ROPE_KINDS
from glm2_jax.errors import CheckpointError, shorten
from glm2_jax.family import config_signs, decide_family, named_family, tokenizer_signs

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

_NUMBERS = ("norm_eps", "rope_ratio", "hidden_dropout", "attention_dropout")

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
    """The sizes and options of one model; hashable, to be a static argument of `jax.jit`.

    Attributes:
        num_layers: L, transformer blocks.
        vocab_size: V, rows of the embedding and of the head, padding rows included.
        hidden_size: D.
        ffn_hidden_size: F.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; query head n reads key/value head n // (N / K).
        head_dim: H; the first H / 2 dimensions of a head are rotated.
        seq_length: longest context, prompt and answer together.
        norm_eps: epsilon inside the reciprocal square root of RMSNorm.
        rope_ratio: the published `rope_ratio`; its meaning is `rope_kind`.
        rope_kind: "linear": positions are divided by `rope_ratio` (chatglm2-6b-32k);
            "base": the rotary base is multiplied by it (chatglm3-6b-32k and -128k).
        rope_base: the rotary base before `rope_ratio`.
        rope_table_dtype: "float32", or "reference" for the rounding of the published code when it
            runs in half precision.
        logn_scaling: multiply queries by max(1, log(64 + p + 1) / log(2048)); off, because it is in
            only one public copy of chatglm3-6b-128k and unverified.
        family: "chatglm2", "chatglm3" or "codegeex2".
        hidden_dropout: dropout after attention and MLP, in training.
        attention_dropout: dropout of attention probabilities, in training.
        eos_token_id: the id that ends an answer.
        pad_token_id: the id that fills rows.
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
        integer = f"a whole number from 1 to {MAX_SIZE}"
        for name in _DIMENSIONS:
            value = getattr(self, name)
            self._check(name, _is_integer(value) and 0 < value <= MAX_SIZE, integer)
        heads, kv_heads = self.num_heads, self.num_kv_heads
        self._check("num_kv_heads", heads % kv_heads == 0, f"a divisor of {heads} heads")
        self._check("head_dim", self.head_dim % 4 == 0, "a multiple of 4 (half is rotated)")
        for name, choices in {
            "family": FAMILIES,
            "rope_kind": ROPE_KINDS,
            "rope_table_dtype": ("float32", "reference"),
        }.items():
            self._check(name, getattr(self, name) in choices, " or ".join(choices))
        for name in ("norm_eps", "rope_ratio", "rope_base"):  # in float32 neither 0 nor infinity
            inside = 1e-30 < getattr(self, name) < 1e30
            self._check(name, inside, "a number above 0 that float32 can hold")
        for name in ("hidden_dropout", "attention_dropout"):
            self._check(name, 0.0 <= getattr(self, name) < 1.0, "at least 0 and below 1")
        for name in ("eos_token_id", "pad_token_id"):
            inside = 0 <= getattr(self, name) < self.vocab_size
            self._check(name, inside, f"an id below {self.vocab_size}")

    def _check(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise _bad_value(_KEYS.get(name, name), getattr(self, name), wanted)

    @property
    def num_params(self) -> int:
        """The number of parameters (6,243,584,000 for the 6B models)."""
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
        """The longest context that the chat model was aligned on.

        ChatGLM2 without `rope_ratio` was trained on 32K, but aligned on 8K.
        """
        if self.family == "chatglm2" and self.rope_ratio == 1.0:
            return min(8192, self.seq_length)
        return self.seq_length

    @property
    def default_template(self) -> str:
        """The prompt template of the family; CodeGeeX2 is a base model and takes raw text."""
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
        """Read a published `config.json`.

        Args:
            raw: the parsed file. Besides the published keys it may hold our own `family`,
                `rope_kind`, `rope_table_dtype` and `logn_scaling`.
            tokenizer_config: the parsed `tokenizer_config.json`, which may show the family if the
                configuration does not.
            rope_kind: overrides the meaning that `rope_ratio` has in the family.
            family: overrides the family that the files show.

        Returns:
            The configuration. Unknown keys that do not change the mathematics are ignored.

        Raises:
            CheckpointError: another model, a key whose value this implementation does not
                compute, a value out of range, signs of different families, or a `rope_ratio`
                whose meaning is unknown.
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
        values: dict[str, Any] = {
            **{name: _integer(raw, name, default) for name, default in _DIMENSIONS.items()},
            **{name: _number(raw, name, getattr(cls, name)) for name in _NUMBERS},
        }
        ratio = values["rope_ratio"]
        rope_kind = str(rope_kind or raw.get("rope_kind") or _rope_kind(family, ratio))
        if family is None:
            family = "chatglm3" if ratio != 1.0 and rope_kind == "base" else "chatglm2"
        return cls(
            **values,
            rope_kind=rope_kind,
            rope_table_dtype=raw.get("rope_table_dtype", "float32"),
            logn_scaling=_flag(raw, "logn_scaling"),
            family=family,
            eos_token_id=_first_id(raw, "eos_token_id", 2),
            pad_token_id=_first_id(raw, "pad_token_id", 0),
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


def _bad_value(key: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"config: {key} = {shorten(value)} is not valid.",
        f"It must be {wanted}.",
        "Correct it, or download config.json again.",
    )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    key = _KEYS.get(name, name)
    value = raw.get(key, default)
    if not _is_integer(value):
        raise _bad_value(key, value, "a whole number")
    return value


def _first_id(raw: Mapping[str, Any], key: str, default: int) -> int:
    """Return an id, the first one of a list; null means the default."""
    value = raw.get(key)
    if isinstance(value, list) and value:
        value = value[0]
    return default if value is None else _integer({key: value}, key)


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise _bad_value(key, value, "true or false")
    return value


def _number(raw: Mapping[str, Any], name: str, default: float) -> float:
    key = _KEYS.get(name, name)
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _bad_value(key, value, "a number")
    return float(min(max(value, -1e300), 1e300))  # far beyond what any key may hold


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


def _preset(family: str, seq_length: int, rope_ratio: float = 1.0) -> GLMConfig:
    sizes: dict[str, Any] = {**_DIMENSIONS, "num_kv_heads": 2, "seq_length": seq_length}
    return GLMConfig(
        **sizes,
        rope_ratio=rope_ratio,
        rope_kind=_rope_kind(family, rope_ratio),
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
