"""The device's side of the engine: runs programs on the arrays that it is handed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import numpy as np

from glm2_jax import GLMConfig, KVCache
from glm2_jax.mesh import mesh_of
from glm2_jax.prefix import prefix_length
from glm2_jax.runtime.buckets import grown
from glm2_jax.runtime.xla import cache_dtype
from infer.engine import steps
from infer.engine.parts import Part
from infer.engine.placement import Places
from infer.engine.programs import Made, Programs

Stepped = tuple[steps.State, steps.Output]


class Executor:
    """Runs the programs of one model; it keeps nothing of a call, so threads may share it.

    Args:
        programs: compiled programs to share; None = new ones.
        more: of new `Programs`.

    Attributes:
        config: the architecture.
        params: the weights; others of the same shapes and dtypes may replace them.
        device: where they are; on a mesh one of its devices, which stands for all.
        places: where arrays are placed.
        cache_dtype: dtype of the cached keys and values.
        programs: the compiled programs.
    """

    def __init__(
        self, config: GLMConfig, params: Any, programs: Programs | None = None, **more: Any
    ):
        self.config, self.params = config, params
        self.places = Places(mesh_of(params))
        devices = jax.tree.leaves(params)[0].sharding.addressable_devices
        self.device = min(devices, key=lambda device: device.id)
        self.cache_dtype = cache_dtype(self.device.platform, params["final_norm"].dtype)
        self.programs = programs or Programs(self.device.platform, places=self.places, **more)
        self._call: Callable = self.programs.call
        self._traces = False

    def counting(self, made: Made) -> Executor:
        """Return an executor of the same model that counts in `made` what it has to compile."""
        one = copy.copy(self)
        one._call = partial(self.programs.call, made=made)
        return one

    def compile_ahead(self, key: Hashable, begin: Callable[[Executor], Any], made: Made) -> None:
        """Compile the programs that `begin` runs, ahead of all work.

        Args:
            key: names everything that these programs depend on.
            begin: is handed an executor that runs nothing and returns shapes.
        """

        def trace(call: Callable) -> None:
            one = copy.copy(self)
            one._call, one._traces = call, True
            begin(one)

        self.programs.ahead(key, trace, made)

    def new_cache(self, batch: int, size: int) -> KVCache:
        """Return a cache of `batch` rows with `size` slots for tokens, after the prefix, if any."""
        make = partial(KVCache.new, self.config, batch, size, self.cache_dtype)
        prefix = self.params.get("prefix")
        # In a program, or there would be two caches for a moment, or a full one on each device.
        if prefix is not None or self.places.mesh is not None:
            return self._call("begin", (batch, size), make, prefix)
        if self._traces:
            return jax.eval_shape(make, None)
        with jax.default_device(self.device):
            return make(None)

    def room(self, cache: KVCache) -> int:
        """Return the slots of a row for tokens: all but those of the prefix."""
        return cache.size - prefix_length(self.params)

    def grow(self, cache: KVCache, needed: int, largest: int) -> KVCache:
        """Return the cache, with more slots if it has fewer than `needed` for tokens."""
        room = self.room(cache)
        if needed <= room:
            return cache
        size = cache.size - room + grown(room, needed, largest)
        key = (cache.length.size, cache.size, size)
        return self._call("grow", key, partial(steps.grow, size), cache)

    def prefill(self, part: Part, size: int, controls: steps.Controls) -> Stepped:
        """Read prompts into a new cache of `size` slots and draw the first tokens."""
        return self._call(
            "prefill",
            (*part.tokens.shape, size),
            partial(steps.prefill, self.config, size, dtype=self.cache_dtype),
            self.params,
            part.tokens,
            part.lengths,
            controls,
        )

    def read(self, part: Part, cache: KVCache) -> KVCache:
        """Read a part of the prompts that is not their last; the cache is used up."""
        return self._call(
            "read",
            (*part.tokens.shape, cache.size),
            partial(steps.read, self.config),
            self.params,
            *part,
            cache,
            donate=4,
        )

    def extend(
        self, part: Part, seen: np.ndarray, controls: steps.Controls, cache: KVCache
    ) -> Stepped:
        """Read the last part of the prompts and draw the first tokens; the cache is used up."""
        return self._call(
            "extend",
            (*part.tokens.shape, cache.size),
            partial(steps.extend, self.config),
            self.params,
            *part,
            seen,
            controls,
            cache,
            donate=6,
        )

    def decode(
        self,
        controls: steps.Controls,
        keep: np.ndarray,
        state: steps.State,
        *,
        count: int | None = None,
        drafts: np.ndarray | None = None,
    ) -> Stepped:
        """Take one step, or `count` of them on the device; the state is used up.

        Args:
            keep: bool [B]; false releases a row.
            state: its cache has room for what is drawn.
            drafts: int32 [B, N], tokens that may come, which the step then verifies.
        """
        name, function, more = "decode", partial(steps.decode, self.config), []
        if count is not None:
            name, function = "decode_many", partial(steps.decode_many, self.config, count)
        if drafts is not None:
            name, function, more = "verify", partial(steps.verify, self.config), [drafts]
        assert state.cache is not None
        key = (keep.size, state.cache.size, *(array.shape[1] for array in more))
        return self._call(name, key, function, self.params, controls, keep, state, *more, donate=3)
