"""Whether a merged model answers as the base and its adapter do: logits of fixed prompts.

Both are computed in the type of the merged weights, one model at a time. The bounds are what
rounding alone can do there; a wrong merge (another scale, a swapped half) changes logits as much
as the adapter itself does, which is told beside the difference.

Half precision: merged weights are rounded once more, each by up to u = 2^-8 (bfloat16) or 2^-11
(float16) of itself. Measured with 28 layers of random weights (hidden size 256 and 512), logits of
the standard deviation 1: 0.065 and 0.009, 17 u. Those of published models spread several times
wider and are many more, so the bounds are 256 u. In float32 only the order of sums differs: 5e-6
there, and 1e-3 is left for wider logits, thousands of columns and other devices. Published weights
were not measured. Where the adapter itself moves no logit beyond the bound, the comparison says
little, and `weak` tells so.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.adapters.adapter import Adapter
from convert.adapters.attach import attach
from convert.loading.checkpoint import Checkpoint, Progress, load_checkpoint
from convert.loading.folder import Folder
from glm2_jax import compiler_options, forward
from glm2_jax.cli.main import is_out_of_memory
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
    """Computes what base and adapter say, and compares a merged folder with it.

    Args:
        base: the folder that is merged into.
        adapter: the adapter.
        dtype: name of the type of the merged weights.
        device: as `glm2_jax.runtime.devices.find_device` takes it.
        progress: called with the bytes loaded and to load.

    Attributes:
        effect: how far the adapter moves a logit at most.

    Raises:
        DeviceError: the model does not fit the memory.
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
        prompts = [build_prompt(base.tokenizer, base.template, text) for text in PROMPTS]
        length = max(map(len, prompts))
        self.tokens = np.array([ids + [0] * (length - len(ids)) for ids in prompts], np.int32)
        self.segments = (np.arange(length) < [[len(ids)] for ids in prompts]).astype(np.int32)
        with self._memory():
            plain = self._load(base.path, progress, rope_kind=base.config.rope_kind)
            self.expected = self._logits(attach(plain, adapter))
            self.effect = float(np.abs(self.expected - self._logits(plain)).max())

    def weak(self, bound: float) -> bool:
        """Whether leaving the adapter out would pass, too."""
        return self.effect <= bound

    def require(
        self, merged: Path, bound: float, progress: Progress = lambda done, total: None
    ) -> float:
        """The largest difference of a logit between a merged folder and base and adapter.

        Raises:
            CheckpointError: it is above `bound`, or no number.
            DeviceError: the model does not fit the memory.
        """
        with self._memory():
            logits = self._logits(self._load(merged, progress))
        found = float(np.abs(logits - self.expected).max())
        if not found <= bound:
            raise CheckpointError(
                f"The merged model differs from base and adapter by {found:.3g} in a logit.",
                f"The bound for {self.dtype} is {bound:.3g}; the adapter itself changes logits by "
                f"up to {self.effect:.3g}. Nothing was left behind.",
                "Use --dtype float32, or --bound if so large a difference is acceptable.",
            )
        return found

    def _load(
        self, folder: Path, progress: Progress, *, rope_kind: str | None = None
    ) -> Checkpoint:
        return load_checkpoint(
            folder,
            dtype=self.dtype,
            quantize="none",
            rope_kind=rope_kind,
            template=self.base.template,
            family=self.base.config.family,
            device=self.device,
            progress=progress,
        )

    def _logits(self, checkpoint: Checkpoint) -> np.ndarray:
        """float32 [tokens of all prompts, V]."""
        (device,) = checkpoint.params["embed"].devices()
        logits, _ = _program(device.platform)(
            checkpoint.config,
            checkpoint.params,
            jnp.asarray(self.tokens),
            segment_ids=jnp.asarray(self.segments),
        )
        return np.asarray(logits)[self.segments == 1]

    @contextlib.contextmanager
    def _memory(self) -> Iterator[None]:
        needed = self.base.config.num_params * (4 if self.dtype == "float32" else 2)
        platform = find_device(self.device).platform
        if platform == "cpu" and needed > available_memory():
            raise _too_large(f"{needed} bytes are needed and {available_memory()} can be used.")
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                raise _too_large(
                    (str(error).splitlines() or ["The allocation failed."])[0]
                ) from error
            raise


@functools.cache
def _program(platform: str) -> Any:
    return jax.jit(forward, static_argnums=0, compiler_options=compiler_options(platform))


def _too_large(why: str) -> DeviceError:
    return DeviceError(
        "There is not enough memory to compute logits with this model.",
        why,
        "Use --device cpu, a smaller --dtype, or --skip-check to merge without comparing.",
    )
