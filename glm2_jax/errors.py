"""The errors that a user may meet, each with the exit code that the command-line tools give it."""

import reprlib
from collections.abc import Sequence
from typing import Any

from glm2_jax.escape import escape_controls, join_lines


class GLMError(Exception):
    """An expected failure in up to three parts: what happened, why, and what to do.

    What a terminal would obey is escaped in all of them, newlines inside a line, too.

    Attributes:
        what: one line, what went wrong.
        why: the reason; may be empty, or have several lines where it was given as several.
        fix: one line, what the user can do; may be empty.
        exit_code: what a command-line tool exits with.
    """

    exit_code = 1

    def __init__(self, what: str, why: str | Sequence[str] = "", fix: str = ""):
        self.what, self.fix = escape_controls(what), escape_controls(fix)
        self.why = join_lines([why] if isinstance(why, str) else why)
        super().__init__("\n".join(line for line in (self.what, self.why, self.fix) if line))


class UsageError(GLMError):
    """A flag or argument that makes no sense."""

    exit_code = 2


class InputError(GLMError):
    """Bad input or data: prompts, files of questions, history."""

    exit_code = 3


class CheckpointError(GLMError):
    """A model folder that cannot be opened, or a model that computes nonsense."""

    exit_code = 4


class DeviceError(GLMError):
    """Out of memory, or a device that is not there."""

    exit_code = 5


def shown(value: Any) -> str:
    """`repr` for an error message: short, and for whole numbers that Python refuses to write."""
    try:
        text = reprlib.repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 200 else text[:199] + "…"  # lists in lists in lists
