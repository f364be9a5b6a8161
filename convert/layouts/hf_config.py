"""Converts the configuration of HF-native folders, `GlmConfig` of transformers, both ways."""

from collections.abc import Mapping
from typing import Any

from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError, UsageError, shorten

MODEL_TYPE = "glm"
_THETA = 10000.0  # the rotary base of every published model, before rope_ratio

# Key there -> published key, where the values are the same.
_SAME = {
    "vocab_size": "padded_vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "multi_query_group_num",
    "head_dim": "kv_channels",
    "max_position_embeddings": "seq_length",
    "rms_norm_eps": "layernorm_epsilon",
}

# What this implementation computes, and what the class of transformers takes for a missing key.
_REQUIRED_VALUES: dict[str, tuple[Any, Any]] = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (True, True),
    "tie_word_embeddings": (False, False),
    "quantization_config": (None, None),
}


def native_config(config: GLMConfig, dtype: str, stops: tuple[int, ...]) -> dict[str, Any]:
    """Return the `config.json` of an HF-native folder; `stops` are the ids that end an answer."""
    if config.logn_scaling:
        raise UsageError(
            "A model with logn_scaling cannot be written as --layout glm.",
            "GlmForCausalLM does not scale its queries, so its answers would differ.",
            "Use --layout chatglm.",
        )
    published = config.to_hf()
    theta, scaling = config.rope_base, {}
    if config.rope_kind == "base":
        theta *= config.rope_ratio
    elif config.rope_ratio != 1:
        scaling = {"rope_type": "linear", "factor": config.rope_ratio}
    rope = {"rope_theta": theta, "partial_rotary_factor": 0.5}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["GlmForCausalLM"],
        **{key: published[name] for key, name in _SAME.items()},
        **{key: wanted for key, (wanted, _) in _REQUIRED_VALUES.items() if wanted is not None},
        "attention_dropout": config.attention_dropout,
        "rope_parameters": {"rope_type": "default", **rope, **scaling},
        # The same for readers that are older than rope_parameters.
        **rope,
        **({"rope_scaling": scaling} if scaling else {}),
        "eos_token_id": _one_or_all(stops),
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
        "torch_dtype": dtype,
        # For reading it back: the architecture does not show which prompt the model knows.
        "family": config.family,
    }


def generation_config(config: GLMConfig, stops: tuple[int, ...]) -> dict[str, Any]:
    """Return the `generation_config.json`: how the published chat() samples."""
    return {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.8,
        "top_k": 50,
        "max_length": config.aligned_length,
        "eos_token_id": _one_or_all(stops),
        "pad_token_id": config.pad_token_id,
    }


def is_native(raw: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` is one of the HF-native layout."""
    return raw.get("model_type") == MODEL_TYPE


def published_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return an HF-native `config.json` under the published keys, for `GLMConfig.from_hf`.

    A missing key, or one that asks for what is not computed here, is a `CheckpointError`.
    """
    missing = [key for key in _SAME if raw.get(key) is None]
    if missing:
        raise CheckpointError(
            f"config.json of the HF-native layout lacks {', '.join(missing)}.",
            "Its model_type is 'glm'; without these keys the sizes of the model are not known.",
            "Save the model once more with save_pretrained, or use its official folder.",
        )
    for key, (wanted, default) in _REQUIRED_VALUES.items():
        if raw.get(key, default) != wanted:
            raise _unsupported(key, raw[key], repr(wanted))
    ids = {key: raw[key] for key in ("eos_token_id", "pad_token_id") if raw.get(key) is not None}
    for key, value in ids.items():  # the published files have one id; a list begins with it
        ids[key] = value[0] if isinstance(value, list) and value else value
    return {
        "model_type": "chatglm",
        **{name: raw[key] for key, name in _SAME.items()},
        "add_qkv_bias": True,
        "multi_query_attention": True,
        "attention_dropout": raw.get("attention_dropout", 0.0),
        **_published_rope(raw),
        **ids,
        **{key: raw[key] for key in ("family", "_name_or_path") if raw.get(key)},
    }


def _published_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_ratio and its meaning; newer files have rope_parameters, older ones the rest."""
    rope = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if key in raw}
    for key in ("rope_scaling", "rope_parameters"):
        found = raw.get(key) or {}
        if not isinstance(found, Mapping):
            raise _unsupported(key, found, "an object")
        rope |= found
    if rope.get("partial_rotary_factor", 0.5) != 0.5:
        raise _unsupported("partial_rotary_factor", rope["partial_rotary_factor"], "0.5")
    theta = rope.get("rope_theta", _THETA)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < 1e30:
        raise _unsupported("rope_theta", theta, "a number above 0 that float32 can hold")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":  # at the published base nothing is scaled, whatever the family would do
        return {"rope_ratio": theta / _THETA, "rope_kind": "base"} if theta != _THETA else {}
    if kind != "linear" or theta != _THETA:
        raise _unsupported("rope_parameters", dict(rope), f"linear with rope_theta {_THETA:g}")
    return {"rope_ratio": rope.get("factor"), "rope_kind": "linear"}


def _one_or_all(stops: tuple[int, ...]) -> int | list[int]:
    """Return the ids as files write them: a single one without a list."""
    return list(stops) if stops[1:] else stops[0]


def _unsupported(key: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"config.json of the HF-native layout: {key} = {shorten(value)} is not supported.",
        f"It changes what the model computes; only {wanted} is implemented.",
        "Use the folder of a ChatGLM2, ChatGLM3 or CodeGeeX2 model.",
    )
