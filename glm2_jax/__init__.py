"""The GLM family as pure functions in JAX / Flax.

Names are imported when they are first used, so that `--help` of a tool does not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # "as": a public name of this package
    from glm2_jax.cache import KVCache as KVCache
    from glm2_jax.config import PRESETS as PRESETS
    from glm2_jax.config import GLMConfig as GLMConfig
    from glm2_jax.errors import CheckpointError as CheckpointError
    from glm2_jax.errors import DeviceError as DeviceError
    from glm2_jax.errors import GLMError as GLMError
    from glm2_jax.errors import InputError as InputError
    from glm2_jax.errors import UsageError as UsageError
    from glm2_jax.lora import LoRA as LoRA
    from glm2_jax.lora import init_lora as init_lora
    from glm2_jax.mesh import make_mesh as make_mesh
    from glm2_jax.mesh import parse_mesh as parse_mesh
    from glm2_jax.model import GLM as GLM
    from glm2_jax.model import GLMBlock as GLMBlock
    from glm2_jax.model import forward as forward
    from glm2_jax.model import hidden as hidden
    from glm2_jax.model import init_params as init_params
    from glm2_jax.model import last_logits as last_logits
    from glm2_jax.model import logits_of as logits_of
    from glm2_jax.model import param_shapes as param_shapes
    from glm2_jax.runtime.xla import compiler_options as compiler_options
    from glm2_jax.sharding import cache_sharding as cache_sharding
    from glm2_jax.sharding import check_mesh as check_mesh
    from glm2_jax.sharding import lora_sharding as lora_sharding
    from glm2_jax.sharding import params_sharding as params_sharding
    from glm2_jax.sharding import replicated as replicated
    from glm2_jax.sharding import rows_sharding as rows_sharding
    from glm2_jax.text.tokenizer import Tokenizer as Tokenizer

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

__all__ = [name for names in _MODULES.values() for name in names.split()]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"glm2_jax.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
