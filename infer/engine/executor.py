"""The device's side of the engine: runs programs on the arrays that it is handed."""

from __future__ import annotations

import copy
import dataclasses
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
from infer.engine.placement import Places
from infer.engine.programs import Made, Programs
from infer.engine.sampling import Array, Logprobs
from infer.engine.steps import Controls, Part, Read, State, Stepped


class Executor:
    """Runs the programs of one model; it keeps nothing of a call, so threads may share it.

    Attributes:
        params: the weights; others of the same shapes and dtypes may replace them.
        kv: how its caches store keys and values, of `glm2_jax.choices.KV`.
        device: where they are; on a mesh one of its devices, which stands for all.
        places: where arrays are placed.
        programs: the compiled programs, which several executors may share.
        made: what this executor had to compile, see `counting`.
    """

    def __init__(
        self,
        config: GLMConfig,
        params: Any,
        programs: Programs | None = None,
        *,
        kv: str = "auto",
        **new: Any,
    ):
        self.config, self.params, self.kv = config, params, kv
        devices = jax.tree.leaves(params)[0].sharding.addressable_devices
        self.device = min(devices, key=lambda device: device.id)
        self.places = Places(mesh_of(params), self.device)
        self.cache_dtype = cache_dtype(self.device.platform, params["final_norm"].dtype, kv)
        self.programs = programs or Programs(self.device.platform, places=self.places, **new)
        self.made = Made()
        self._call: Callable = self.programs.call
        self._traces = False

    def counting(self) -> Executor:
        """Return an executor of the same model for one call, which counts what it compiles."""
        one = copy.copy(self)
        one.made = Made()
        one._call = partial(self.programs.call, made=one.made)
        return one

    def compile_ahead(self, key: Hashable, begin: Callable[[Executor], Any]) -> None:
        """Compile the programs that `begin` runs, ahead of all work.

        It is handed an executor that runs nothing and returns shapes; `key` names everything that
        the programs depend on.
        """

        def trace(call: Callable) -> None:
            one = copy.copy(self)
            one._call, one._traces = call, True
            begin(one)

        self.programs.ahead(key, trace, self.made)

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

    def prefill(self, part: Part, size: int, counts: np.ndarray, controls: Controls) -> Stepped:
        """Read prompts into a new cache of `size` slots and draw the first tokens.

        `counts` are the `sampling.prompt_counts` of the complete prompts.
        """
        function = partial(steps.prefill, self.config, size, dtype=self.cache_dtype)
        key = (*part.tokens.shape, size)
        read = self._call("prefill", key, function, self.params, part)
        return self.pick(read, controls, part.lengths > 0, State.first(part, counts))

    def read(self, part: Part, cache: KVCache) -> KVCache:
        """Read a part of the prompts that is not their last; the cache is used up."""
        function, key = partial(steps.read, self.config), (*part.tokens.shape, cache.size)
        return self._call("read", key, function, self.params, part, cache, donate=2)

    def extend(self, part: Part, counts: np.ndarray, controls: Controls, cache: KVCache) -> Stepped:
        """Read the last part of the prompts and draw the first tokens; the cache is used up."""
        function, key = partial(steps.extend, self.config), (*part.tokens.shape, cache.size)
        read = self._call("extend", key, function, self.params, part, cache, donate=2)
        return self.pick(read, controls, part.lengths > 0, State.first(part, counts))

    def fill(
        self,
        part: Part,
        rows: np.ndarray,
        cache: KVCache,
        *,
        view: int,
        adapters: np.ndarray | None = None,
    ) -> Read:
        """Read a part of the prompts into these rows of the cache, which is used up.

        `rows` is int32 [R], a number past the end is an empty row. No more than `view` slots of
        them are used.
        """
        view += prefix_length(self.params)
        key = (*part.tokens.shape, cache.length.size, cache.size, view)
        args = self.params, part, rows, adapters, cache
        return self._call("fill", key, partial(steps.fill, self.config, view), *args, donate=4)

    def score(
        self,
        part: Part,
        following: np.ndarray,
        rows: np.ndarray,
        cache: KVCache,
        *,
        view: int,
        adapters: np.ndarray | None = None,
    ) -> tuple[jax.Array, Logprobs, KVCache]:
        """Do as `fill`, and return the log-probabilities of the `following` tokens, [R, T]."""
        view += prefix_length(self.params)
        key = (*part.tokens.shape, cache.length.size, cache.size, view)
        args = self.params, part, following, rows, adapters, cache
        return self._call("score", key, partial(steps.score, self.config, view), *args, donate=5)

    def insert(self, rows: np.ndarray, begun: State, state: State) -> State:
        """Put R rows that drew their first token into the state, which is used up, at int32 [R].

        A number past the end is left out.
        """
        apart = begun._replace(cache=None), state._replace(cache=None)
        key = (rows.size, state.counts.shape[0])
        inserted = self._call("insert", key, steps.insert, rows, *apart, donate=2)
        return inserted._replace(cache=state.cache)

    def draft(self, keep: np.ndarray, state: State) -> tuple[State, jax.Array]:
        """Return the state, which is used up, and int32 [B, N]: tokens that the idea drafts."""
        cache, rest = state.cache, state._replace(cache=None)
        assert cache is not None
        function, key = partial(steps.draft, self.config), (keep.size, cache.size)
        args = self.params, keep, rest, cache
        drafts, cache = self._call("draft", key, function, *args, donate=3)
        return state._replace(cache=cache), drafts

    def decode(
        self,
        controls: Controls,
        keep: np.ndarray,
        state: State,
        *,
        drafts: Array | None = None,
        view: int | None = None,
        adapters: np.ndarray | None = None,
        allowed: Array | None = None,
        rows: np.ndarray | None = None,
    ) -> Stepped:
        """Take one step, or verify `drafts`, int32 [B, N].

        The state is used up; its cache has room for what is drawn. `keep` is bool [B]; a row where
        it is false takes no part. `view` and `adapters` are as in `fill`, `allowed` as in `pick`;
        drafts are verified without them. With `rows`, int32 [R], only those rows of the state are
        computed; all other arguments and the output then have R rows, a number past the end is an
        empty one.
        """
        cache, state = state.cache, state._replace(cache=None)
        assert cache is not None
        if drafts is None:
            few, count = state, cache.length.size
            if rows is not None:
                few = self._call("take", (rows.size, count), steps.take, rows, state)
            view = None if view is None else view + prefix_length(self.params)
            more = (() if view is None else (view,)) + (() if rows is None else (count,))
            key = (keep.size, cache.size, *more)
            args = self.params, keep, few, adapters, rows, cache
            function = partial(steps.decode, self.config, view)
            read = self._call("decode", key, function, *args, donate=5)
            few, output = self.pick(read, controls, keep, few, allowed)
            if rows is not None:
                few = self.insert(rows, few, state._replace(cache=few.cache))
            return few, output
        function, key = partial(steps.verify, self.config), (keep.size, cache.size, drafts.shape[1])
        args = self.params, keep, state, drafts, cache
        logits, cache = self._call("verify", key, function, *args, donate=4)
        args = logits, controls, keep, drafts, cache.length, state
        state, output, length = self._call("accept", drafts.shape, steps.accept, *args, donate=5)
        cache = dataclasses.replace(cache, length=length)
        return state._replace(cache=cache), output

    def pick(
        self,
        read: Read,
        controls: Controls,
        keep: np.ndarray,
        state: State,
        allowed: Array | None = None,
    ) -> Stepped:
        """Draw a token of each row, one of those `allowed`: uint32 [B, V / 32], a bit for each.

        There are two programs for a number of rows: with `allowed`, and without. The state is used
        up; its cache is that of `read`.
        """
        logits, cache = read
        args = logits, controls, keep, state, allowed
        key = (keep.size, 1, *(() if allowed is None else ("allowed",)))
        state, output = self._call("pick", key, steps.pick, *args, donate=3)
        return state._replace(cache=cache), output
