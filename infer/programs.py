"""Compiled programs by shape, with the time that compiling took, and errors of the device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax

from glm2_jax import compiler_options
from glm2_jax.errors import DeviceError

OnEvent = Callable[[str, str], None]
Shortage = tuple[str, str]  # needed and free; what fits instead
_JAX_CONFIG: Any = jax.config  # its names are made at run time


class Programs:
    """Compiles each program once per shape, ahead of its first call.

    Attributes:
      compiled: how many programs there are; constant once everything is warm.
      seconds: spent compiling so far.
    """

    def __init__(self, platform: str, on_event: OnEvent | None = None):
        self._options = compiler_options(platform)
        self._on_event = on_event
        self._programs: dict[Hashable, Any] = {}
        self.seconds = 0.0

    @property
    def compiled(self) -> int:
        return len(self._programs)

    def call(
        self, name: str, key: Hashable, function: Callable, *args: Any, donate: int | None = None
    ) -> Any:
        """Calls the program for `(name, key)`, compiling it for these arguments at first.

        Args:
          key: names everything that the shapes of `args` depend on.
          donate: position of the argument whose buffers the result may take over.
        """
        if _JAX_CONFIG.jax_disable_jit:  # a wish for plain steps that a debugger can follow
            return function(*jax.tree.map(jax.numpy.asarray, args))
        program = self._programs.get((name, key))
        if program is None:
            # What is still running must not be counted as compiling.
            jax.block_until_ready(args)
            if self._on_event:
                self._on_event("compile", f"compiling {name} {key}")
            start = time.perf_counter()
            jitted = jax.jit(
                function,
                donate_argnums=() if donate is None else (donate,),
                compiler_options=self._options,
            )
            program = jitted.lower(*args).compile()
            self._programs[name, key] = program
            self.seconds += time.perf_counter() - start
        return program(*args)


@contextlib.contextmanager
def device_errors(
    doing: str, explain: Callable[[], Shortage | None] = lambda: None
) -> Iterator[None]:
    """Turns running out of memory, on the device or the host, into a DeviceError that says what
    fits.

    Args:
      doing: what was tried, with its sizes.
      explain: asked for the rest when it happens.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and not _exhausted(str(error)):
            raise
        first = (str(error).splitlines() or ["an allocation failed"])[0]
        numbers, fix = explain() or ("", "Load a narrower dtype, or --quantize int8 or int4.")
        raise DeviceError(
            f"out of device memory: {doing}", f"{numbers} ({first})".strip(), fix
        ) from error


def _exhausted(text: str) -> bool:
    return "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
