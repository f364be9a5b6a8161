"""The configuration of HF-native folders: of the classes of `transformers` that compute a model."""

from collections.abc import Mapping
from typing import Any

from glm2_jax.config import GLMConfig
from glm2_jax.errors import UsageError
from glm2_jax.published import NATIVE, form_of, write_fields


def check_native(config: GLMConfig) -> None:
    """Refuse a model that the classes of transformers do not compute: UsageError."""
    if config.family not in NATIVE:
        raise UsageError(
            f"A {config.family} model cannot be written as --layout glm.",
            "GlmForCausalLM computes another network: without LayerNorm, without biases of every "
            "product, and with a causal context.",
            "Use --layout chatglm.",
        )
    if config.logn_scaling:
        raise UsageError(
            "A model with logn_scaling cannot be written as --layout glm.",
            "GlmForCausalLM does not scale its queries, so its answers would differ.",
            "Use --layout chatglm.",
        )


def native_config(config: GLMConfig, dtype: str, stops: tuple[int, ...]) -> dict[str, Any]:
    """Return the `config.json` of an HF-native folder; `stops` are the ids that end an answer.

    UsageError as of `check_native`.
    """
    check_native(config)
    return {
        **write_fields(NATIVE[config.family], vars(config)),
        "eos_token_id": _one_or_all(stops),
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
    return form_of(raw).native


def _one_or_all(stops: tuple[int, ...]) -> int | list[int]:
    """Return the ids as files write them: a single one without a list."""
    return list(stops) if stops[1:] else stops[0]
