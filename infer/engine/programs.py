"""The cache of compiled programs, by name and shape."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from glm2_jax import compiler_options
from glm2_jax.runtime.compile_cache import Lookup
from infer.engine.placement import Places

OnEvent = Callable[[str, str], None]
At = tuple[str, Hashable]  # name and key of a program
_JAX_CONFIG: Any = jax.config  # its names are made at run time
# One program is compiled at a time: the log that `Lookup` reads belongs to the process.
_COMPILING = threading.RLock()


@dataclass
class Made:
    """Counts the programs that one call had to wait for."""

    programs: int = 0
    kept: int = 0  # of them, found in the persistent compilation cache
    seconds: float = 0.0  # making them, or waiting for another thread that made them


class Programs:
    """Compiles each program once per shape, ahead of its first call.

    Programs depend on shapes alone, so engines with models of the same architecture, dtype and
    devices may share them. Threads may, too: a program that is compiled already runs while another
    one is being compiled.

    `on_event` is called with "compile" and a line of text for each program that is compiled;
    without `places` all arrays are on one device.
    """

    def __init__(
        self, platform: str, on_event: OnEvent | None = None, places: Places | None = None
    ):
        self._places = places or Places()
        self._options = compiler_options(platform)
        self._on_event = on_event
        self._programs: dict[At, Any] = {}
        self._shapes: dict[At, Any] = {}  # of what they return
        self._begun: set[Hashable] = set()
        # All devices of a mesh must get programs with collectives in the same order.
        on_mesh = self._places.mesh is not None
        self._launching = threading.Lock() if on_mesh else contextlib.nullcontext()
        self.seconds = 0.0  # spent making them

    @property
    def compiled(self) -> int:
        """How many programs there are; constant once everything is warm."""
        return len(self._programs)

    def bytes_accessed(self, name: str, key: Hashable) -> float | None:
        """Return the bytes that a compiled program moves, as the compiler counts them; None where
        it does not."""
        program = self._programs.get((name, key))  # none where jit is disabled
        costs = None if program is None else program.cost_analysis()
        return (costs or {}).get("bytes accessed")

    def call(
        self,
        name: str,
        key: Hashable,
        function: Callable,
        *args: Any,
        donate: int | None = None,
        made: Made | None = None,
    ) -> Any:
        """Call the program for `(name, key)`, and compile it for these arguments at first.

        Args:
            key: names everything that the shapes of `args` depend on; (rows, tokens or slots, ...)
                is shown to the user.
            donate: position of the argument whose buffers the result may take over.
            made: counts the program if it has to be made.
        """
        if _JAX_CONFIG.jax_disable_jit:  # plain steps that a debugger can follow
            with self._places.active():
                return function(*jax.tree.map(jax.numpy.asarray, args))
        at = name, key
        if at not in self._programs:
            # What is still running must not be counted as compiling.
            jax.block_until_ready(args)
            made = made or Made()
            with self._making(made):
                if at not in self._programs:
                    self._compile(at, self._places.trace(function, args, donate), made)
        with self._launching:
            return self._programs[at](*args)

    def ahead(self, key: Hashable, begin: Callable[[Callable], Any], made: Made) -> None:
        """Compile the programs that `begin` calls, and number them while it does; none is run.

        `begin` is handed a function to use in place of `call`, which returns shapes alone
        (`jax.ShapeDtypeStruct`). Each key, which names all that this depends on, is looked at once.
        """
        if key in self._begun or _JAX_CONFIG.jax_disable_jit:
            return
        traced: dict[At, Any] = {}

        def call(
            name: str, key: Hashable, function: Callable, *args: Any, donate: int | None = None
        ) -> Any:
            at = name, key
            if at in self._programs:
                return self._shapes[at]
            if at not in traced:
                traced[at] = self._places.trace(function, args, donate)
            return traced[at].out_info

        with self._making(made):
            begin(call)
            for number, (at, program) in enumerate(traced.items(), 1):
                self._compile(at, program, made, f" ({number}/{len(traced)})")
            self._begun.add(key)

    def _compile(self, at: At, traced: Any, made: Made, count: str = "") -> None:
        def missed() -> None:
            if self._on_event:
                self._on_event("compile", f"compiling {_label(*at)}{count}")

        with self._places.active(), Lookup(missed) as lookup:
            program = traced.lower().compile(compiler_options=self._options)
        made.programs += 1
        made.kept += lookup.found
        self._shapes[at] = traced.out_info
        self._programs[at] = program  # last: from now on other threads use it

    @contextlib.contextmanager
    def _making(self, made: Made) -> Iterator[None]:
        """Hold the lock of the compiler, and count the seconds."""
        called = time.perf_counter()
        with _COMPILING:
            start = time.perf_counter()
            try:
                yield
            finally:
                end = time.perf_counter()
                self.seconds += end - start
                made.seconds += end - called


def _label(name: str, key: Hashable) -> str:
    """Return what a user reads of a program: "prefill 512", of several rows "prefill 8 x 512"."""
    if not isinstance(key, tuple) or not all(isinstance(size, int) for size in key[:2]):
        return name
    rows, size = key[:2]
    return f"{name} {size}" if rows == 1 else f"{name} {rows} x {size}"
