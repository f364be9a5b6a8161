"""The device's side of the engine: which program runs for which job, and on what."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import numpy as np

from glm2_jax import GLMConfig, KVCache
from glm2_jax.mesh import mesh_of
from glm2_jax.prefix import prefix_length
from glm2_jax.runtime.buckets import grown
from glm2_jax.runtime.xla import cache_dtype
from infer.engine import steps
from infer.engine.call import Job
from infer.engine.placement import Places
from infer.engine.programs import OnEvent, Programs
from infer.engine.steps import verify


class Executor:
    """Runs the programs of one model.

    Attributes:
      config: the architecture.
      params: the weights; others of the same shapes and types may take their place.
      device: where they are; on a mesh one of its devices, which stands for all.
      places: where arrays lie.
      cache_dtype: type of the keys and values that are kept.
      programs: the compiled programs.
    """

    def __init__(self, config: GLMConfig, params: Any, on_event: OnEvent | None = None):
        self.config, self.params = config, params
        self.places = Places(mesh_of(params))
        devices = jax.tree.leaves(params)[0].sharding.addressable_devices
        self.device = min(devices, key=lambda device: device.id)
        self.cache_dtype = cache_dtype(self.device.platform, params["final_norm"].dtype)
        self.programs = Programs(self.device.platform, on_event, self.places)

    def compile_ahead(
        self,
        job: Job,
        first: Callable[[], tuple[steps.State, steps.Output]],
        *,
        drafted: int,
        count: int | None = None,
        kept: int = 0,
    ) -> None:
        """Compiles, ahead of all work, the programs that a job begins with.

        Args:
          first: reads the prompts and draws the first tokens.
          drafted: tokens that a step verifies where there are drafts, 0 = never.
          count: as in `step`.
          kept: slots of the cache that `first` begins with; 0 = it is a part of the first program.
        """

        def begin() -> None:
            state, _ = first()
            if job.steps_wanted > 1:
                self.step(job, state, 1, count)
                if drafted:
                    drafts = np.zeros((job.batch, drafted), np.int32)
                    self.step(job, state, 1, drafts=drafts)

        widths = tuple(part.tokens.shape for part in job.parts)
        key = (widths, kept, job.cache_size, job.largest_cache, job.steps_wanted > 1, count)
        self.programs.ahead((*key, drafted), begin)

    def prefill(self, job: Job) -> tuple[steps.State, steps.Output]:
        """Reads the prompts into a new cache and draws the first tokens."""
        if len(job.parts) > 1:
            return self.read(job, self.empty_cache(job))
        (part,) = job.parts
        return self._call(
            job,
            "prefill",
            (*part.tokens.shape, job.cache_size),
            partial(steps.prefill, self.config, job.cache_size, dtype=self.cache_dtype),
            self.params,
            part.tokens,
            part.lengths,
            self._controls(job),
        )

    def empty_cache(self, job: Job) -> KVCache:
        """The cache that a job begins with."""
        return self.new_cache(job.batch, job.cache_size)

    def new_cache(self, batch: int, size: int) -> KVCache:
        """A cache of `batch` rows with `size` slots for tokens, behind the prefix, if any."""
        make = partial(KVCache.new, self.config, batch, size, self.cache_dtype)
        prefix = self.params.get("prefix")
        # In a program, or there would be two of the cache, or a whole one, for a moment.
        if prefix is not None or self.places.mesh is not None:
            return self.programs.call("begin", (batch, size), make, prefix)
        if self.programs.tracing:
            return jax.eval_shape(make, None)
        with jax.default_device(self.device):
            return make(None)

    def room(self, cache: KVCache) -> int:
        """Slots of a row for tokens: all but those of the prefix."""
        return cache.size - prefix_length(self.params)

    def read(self, job: Job, cache: KVCache) -> tuple[steps.State, steps.Output]:
        """Reads the parts of the prompts and draws the first tokens; `cache` is used up."""
        *full, last = job.parts
        for part in full:
            cache = self.programs.call(
                "read",
                (*part.tokens.shape, cache.size),
                partial(steps.read, self.config),
                self.params,
                *part,
                cache,
                donate=4,
            )
        return self._call(
            job,
            "extend",
            (*last.tokens.shape, cache.size),
            partial(steps.extend, self.config),
            self.params,
            *last,
            job.seen,
            self._controls(job),
            cache,
            donate=6,
        )

    def grow(self, cache: KVCache, needed: int, largest: int) -> KVCache:
        """The cache, with more slots if it has fewer than `needed` for tokens."""
        room = self.room(cache)
        if needed <= room:
            return cache
        size = cache.size - room + grown(room, needed, largest)
        key = (cache.length.size, cache.size, size)
        return self.programs.call("grow", key, partial(steps.grow, size), cache)

    def step(
        self,
        job: Job,
        state: steps.State,
        drawn: int,
        count: int | None = None,
        drafts: np.ndarray | None = None,
    ) -> tuple[steps.State, steps.Output]:
        """One step, or `count` of them on the device, in a cache that has room for them.

        Args:
          state: is used up.
          drawn: tokens that each row has drawn before.
          drafts: int32 [B, N], the tokens that may come, which the step then verifies.
        """
        name, width, more = "decode", count or 1, []
        function = partial(steps.decode, self.config)
        if count is not None:
            name, function = "decode_many", partial(steps.decode_many, self.config, count)
        if drafts is not None:
            name, function = "verify", partial(verify, self.config)
            width, more = drafts.shape[1] + 1, [drafts]
        cache = cast(KVCache, state.cache)
        cache = self.grow(cache, job.slots(drawn + width), job.largest_cache)
        return self._call(
            job,
            name,
            (job.batch, cache.size, *(array.shape[1] for array in more)),
            function,
            self.params,
            self._controls(job),
            job.keep,
            state._replace(cache=cache),
            *more,
            donate=3,
        )

    def _controls(self, job: Job) -> steps.Controls:
        """What every step of a job takes, put in its place once."""
        placed = self.places.put(job.controls) if job.placed is None else job.placed
        job.placed = placed
        return placed

    def _call(
        self, job: Job, *args: Any, donate: int | None = None
    ) -> tuple[steps.State, steps.Output]:
        state, output = self.programs.call(*args, donate=donate)
        if self.programs.tracing:
            return state, output
        if job.sampling.logprobs is None:  # then the host copies nothing but the tokens
            output = output._replace(logprobs=None)
        jax.tree.map(lambda array: array.copy_to_host_async(), output)
        return state, output
