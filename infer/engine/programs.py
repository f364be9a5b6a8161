"""Compiled programs by shape, with the time that compiling took, and errors of the device."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax

from glm2_jax import compiler_options
from glm2_jax.runtime.compile_cache import Lookup
from infer.engine.placement import Places

OnEvent = Callable[[str, str], None]
At = tuple[str, Hashable]  # name and key of a program
_JAX_CONFIG: Any = jax.config  # its names are made at run time


class Programs:
    """Compiles each program once per shape, ahead of its first call; threads may share it.

    Args:
      platform: what to compile for.
      on_event: told of each program that is compiled.
      places: where arrays lie; None = on one device.

    Attributes:
      compiled: how many programs there are; constant once everything is warm.
      cached: how many of them were found in the persistent compilation cache.
      seconds: spent making them so far.
    """

    def __init__(
        self, platform: str, on_event: OnEvent | None = None, places: Places | None = None
    ):
        self._places = places or Places()
        self._options = compiler_options(platform)
        self._on_event = on_event
        self._programs: dict[At, Any] = {}
        self._shapes: dict[At, Any] = {}  # of what they return
        self._traced: dict[At, Any] = {}  # what `ahead` has met
        self._tracer: int | None = None  # the thread that is in it
        self._lock = threading.RLock()  # held to trace and to compile
        self._begun: set[Hashable] = set()
        self.cached = 0
        self.seconds = 0.0

    @property
    def compiled(self) -> int:
        return len(self._programs)

    def call(
        self, name: str, key: Hashable, function: Callable, *args: Any, donate: int | None = None
    ) -> Any:
        """Calls the program for `(name, key)`, compiling it for these arguments at first.

        Args:
          key: names everything that the shapes of `args` depend on; (rows, tokens or slots, ...)
            is shown to the user.
          donate: position of the argument whose buffers the result may take over.
        """
        if _JAX_CONFIG.jax_disable_jit:  # a wish for plain steps that a debugger can follow
            with self._places.active():
                return function(*jax.tree.map(jax.numpy.asarray, args))
        at = name, key
        if self.tracing:
            if at not in self._programs and at not in self._traced:
                self._traced[at] = self._trace(function, donate, args)
                self._shapes[at] = self._traced[at].out_info
            return self._shapes[at]
        if at not in self._programs:
            # What is still running must not be counted as compiling.
            jax.block_until_ready(args)
            with self._lock:
                if at not in self._programs:
                    traced = self._trace(function, donate, args)
                    self._shapes[at] = traced.out_info
                    self._compile(at, traced)
        return self._programs[at](*args)

    @property
    def tracing(self) -> bool:
        """Whether calls of this thread run nothing and give shapes, see `ahead`."""
        return self._tracer == threading.get_ident()

    def ahead(self, key: Hashable, begin: Callable[[], Any]) -> None:
        """Compiles what `begin` calls, and counts it while it does; nothing is run.

        Args:
          key: names everything that this depends on: each is looked at once.
          begin: calls programs, whose results are shapes alone (`jax.ShapeDtypeStruct`).
        """
        if key in self._begun or _JAX_CONFIG.jax_disable_jit:
            return
        with self._lock:
            self._traced = wanted = {}
            self._tracer = threading.get_ident()
            try:
                begin()
            finally:
                self._tracer, self._traced = None, {}
            for number, (at, traced) in enumerate(wanted.items(), 1):
                self._compile(at, traced, f" ({number}/{len(wanted)})")
            self._begun.add(key)

    def _trace(self, function: Callable, donate: int | None, args: tuple) -> Any:
        with self._timed():
            return self._places.trace(function, args, donate)

    def _compile(self, at: At, traced: Any, count: str = "") -> None:
        def missed() -> None:
            if self._on_event:
                self._on_event("compile", f"compiling {_label(*at)}{count}")

        with self._timed(), self._places.active(), Lookup(missed) as lookup:
            program = traced.lower().compile(compiler_options=self._options)
        self.cached += lookup.found
        self._programs[at] = program

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


def _label(name: str, key: Hashable) -> str:
    """What a user is told of a program: "prefill 512", of several rows "prefill 8 x 512"."""
    if not isinstance(key, tuple) or not all(isinstance(size, int) for size in key[:2]):
        return name
    rows, size = key[:2]
    return f"{name} {size}" if rows == 1 else f"{name} {rows} x {size}"
