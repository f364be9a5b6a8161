"""The expected errors, each with the exit code that the command-line tools return for it."""

import reprlib
from collections.abc import Sequence
from typing import Any

from glm2_jax.escape import escape_controls, join_lines

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100  # characters


class GLMError(Exception):
    """An expected failure: what happened, why ("", or several lines from a list), what to do.

    Control characters and newlines inside a line are escaped in all parts. The command-line tools
    exit with `exit_code`.
    """

    exit_code = 1

    def __init__(self, what: str, why: str | Sequence[str] = "", fix: str = ""):
        self.what, self.fix = escape_controls(what), escape_controls(fix)
        self.why = join_lines([why] if isinstance(why, str) else why)
        super().__init__("\n".join(line for line in (self.what, self.why, self.fix) if line))

    @property
    def cause(self) -> str:
        """What happened: why, for the line of a list; one line if `why` is one."""
        return f"{self.what.rstrip('.')}: {self.why}" if self.why else self.what


class UsageError(GLMError):
    """A flag or argument is not valid."""

    exit_code = 2


class InputError(GLMError):
    """Input or data is not valid: prompts, files of questions, history."""

    exit_code = 3


class CheckpointError(GLMError):
    """A model folder cannot be opened, or a model computes nonsense."""

    exit_code = 4


class DeviceError(GLMError):
    """Memory ran out, or a device was not found."""

    exit_code = 5


def shorten(value: Any) -> str:
    """Return a short `repr` for an error message; Python refuses that of very long integers."""
    try:
        text = _SHORT.repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 120 else text[:119] + "…"  # lists in lists in lists
