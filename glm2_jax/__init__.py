"""ChatGLM2, ChatGLM3 and CodeGeeX2 as pure functions in JAX / Flax.

Names are imported when they are first used, so that `--help` of a tool does not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm2_jax.cache import KVCache
    from glm2_jax.config import PRESETS, GLMConfig
    from glm2_jax.errors import CheckpointError, DeviceError, GLMError, InputError, UsageError
    from glm2_jax.lora import LoRA, init_lora
    from glm2_jax.mesh import make_mesh, parse_mesh
    from glm2_jax.model import (
        GLM,
        GLMBlock,
        forward,
        hidden,
        init_params,
        last_logits,
        logits_of,
        param_shapes,
    )
    from glm2_jax.runtime.xla import compiler_options
    from glm2_jax.sharding import (
        cache_sharding,
        check_mesh,
        lora_sharding,
        params_sharding,
        replicated,
        rows_sharding,
    )
    from glm2_jax.text.tokenizer import Tokenizer

__all__ = [
    "GLM",
    "PRESETS",
    "CheckpointError",
    "DeviceError",
    "GLMBlock",
    "GLMConfig",
    "GLMError",
    "InputError",
    "KVCache",
    "LoRA",
    "Tokenizer",
    "UsageError",
    "cache_sharding",
    "check_mesh",
    "compiler_options",
    "forward",
    "hidden",
    "init_lora",
    "init_params",
    "last_logits",
    "logits_of",
    "lora_sharding",
    "make_mesh",
    "param_shapes",
    "params_sharding",
    "parse_mesh",
    "replicated",
    "rows_sharding",
]

# Module -> the public names that it defines.
_MODULES = {
    "cache": "KVCache",
    "config": "PRESETS GLMConfig",
    "errors": "CheckpointError DeviceError GLMError InputError UsageError",
    "lora": "LoRA init_lora",
    "mesh": "make_mesh parse_mesh",
    "model": "GLM GLMBlock forward hidden init_params last_logits logits_of param_shapes",
    "runtime.xla": "compiler_options",
    "sharding": "cache_sharding check_mesh lora_sharding params_sharding replicated rows_sharding",
    "text.tokenizer": "Tokenizer",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"glm2_jax.{_HOME[name]}"), name)
