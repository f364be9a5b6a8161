"""Generators that were left early: closed before Python takes its modules apart.

Else one that is still referenced when Python ends would be closed when the names that its clean-up
uses are gone, and an exception would be printed.
"""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Generator
from typing import Any, TypeVar

AnyGenerator = TypeVar("AnyGenerator", bound=Generator[Any, None, None])
_open: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


def closed_at_exit(generator: AnyGenerator) -> AnyGenerator:
    """The generator, which is closed when Python ends if it is not before."""
    _open.add(generator)
    return generator


@atexit.register
def _close_all() -> None:
    for generator in list(_open):
        with contextlib.suppress(ValueError):  # another thread runs it
            generator.close()
