"""Checks that a merged model answers as base and adapter do: logits of fixed prompts.

Both are computed in the type of the merged weights, one model at a time. The bounds are what
rounding alone can do; a wrong merge (another scale, a swapped half) changes logits as much as the
adapter itself does, which is printed next to the difference.

Merged weights are rounded once more, each by up to u = 2^-8 (bfloat16) or 2^-11 (float16) of
itself. Measured with 28 layers of random weights (hidden size 256 and 512) and logits of the
standard deviation 1: 17 u. The logits of published models, which were not measured, spread several
times wider and are many more, so the bounds are 256 u. In float32 only the order of sums differs:
5e-6 was measured, and the bound of 1e-3 allows for wider logits, longer sums and other devices.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.adapters.adapter import Adapter, attach
from convert.loading.checkpoint import Checkpoint, Progress, load_checkpoint
from convert.loading.folder import Folder
from convert.writing.floats import float_dtype
from glm2_jax import compiler_options, forward
from glm2_jax.errors import CheckpointError, DeviceError
from glm2_jax.runtime.devices import find_device
from glm2_jax.runtime.dtypes import available_memory
from glm2_jax.text.prompt import build_prompt

BOUNDS = {"float32": 1e-3, "float16": 256 * 2.0**-11, "bfloat16": 256 * 2.0**-8}
PROMPTS = (
    "你好",
    "Write one sentence about the sea.",
    "用一句话说明 17 + 25 = 42 为什么成立。",
)


class MergeCheck:
    """The logits of base and adapter, with which a merged folder is compared.

    They are computed in `dtype`, that of the merged weights. `effect` is the largest change of a
    logit by the adapter. A DeviceError says that the model does not fit the memory.
    """

    def __init__(
        self,
        base: Folder,
        adapter: Adapter,
        dtype: str,
        *,
        device: str = "auto",
        progress: Progress = lambda done, total: None,
    ):
        self.base, self.dtype, self.device = base, dtype, device
        needed, available = base.config.num_params * float_dtype(dtype).itemsize, available_memory()
        if find_device(device).platform == "cpu" and needed > available:
            raise DeviceError(
                "There is not enough memory to compute logits with this model.",
                f"{needed} bytes are needed and {available} are available.",
                "Use a smaller --dtype, or --skip-check to merge without comparing.",
            )
        prompts = [build_prompt(base.tokenizer, base.template, text) for text in PROMPTS]
        length = max(map(len, prompts))
        self.tokens = np.array([ids + [0] * (length - len(ids)) for ids in prompts], np.int32)
        self.segments = (np.arange(length) < [[len(ids)] for ids in prompts]).astype(np.int32)
        plain = self._load(base.path, progress, base.config.rope_kind)
        self.expected = self._logits(attach(plain, adapter))
        self.effect = float(np.abs(self.expected - self._logits(plain)).max())

    def require(
        self, merged: Path, bound: float, progress: Progress = lambda done, total: None
    ) -> float:
        """Return the largest difference of a logit between a merged folder and base and adapter; a
        CheckpointError says that it is above `bound`, or not a number."""
        logits = self._logits(self._load(merged, progress))
        found = float(np.abs(logits - self.expected).max())
        if not found <= bound:
            raise CheckpointError(
                f"The merged model differs from base and adapter by {found:.3g} in a logit.",
                f"The bound for {self.dtype} is {bound:.3g}; the adapter itself changes logits by "
                f"up to {self.effect:.3g}. No output was written.",
                "Use --dtype float32, or --bound if such a difference is acceptable.",
            )
        return found

    def _load(self, folder: Path, progress: Progress, rope_kind: str | None = None) -> Checkpoint:
        form = {"template": self.base.template, "family": self.base.config.family}
        where = {"dtype": self.dtype, "device": self.device, "progress": progress}
        return load_checkpoint(folder, quantize="none", rope_kind=rope_kind, **form, **where)

    def _logits(self, checkpoint: Checkpoint) -> np.ndarray:
        """Return float32 [tokens of all prompts, V]."""
        (device,) = checkpoint.params["embed"].devices()
        logits, _ = _program(device.platform)(
            checkpoint.config,
            checkpoint.params,
            jnp.asarray(self.tokens),
            segment_ids=jnp.asarray(self.segments),
        )
        return np.asarray(logits)[self.segments == 1]


@functools.cache
def _program(platform: str) -> Any:
    return jax.jit(forward, static_argnums=0, compiler_options=compiler_options(platform))
