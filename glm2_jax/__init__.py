"""ChatGLM2, ChatGLM3 and CodeGeeX2 as pure functions in JAX / Flax."""

from glm2_jax.cache import KVCache
from glm2_jax.config import PRESETS, GLMConfig
from glm2_jax.errors import CheckpointError, DeviceError, GLMError, InputError, UsageError
from glm2_jax.model import GLM, GLMBlock, forward, init_params, last_logits, param_shapes
from glm2_jax.tokenizer import Tokenizer
from glm2_jax.xla import compiler_options

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
    "Tokenizer",
    "UsageError",
    "compiler_options",
    "forward",
    "init_params",
    "last_logits",
    "param_shapes",
]
