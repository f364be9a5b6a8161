"""The errors that a user may meet, each with the exit code that the command-line tools give it."""


class GLMError(Exception):
    """An expected failure, told in up to three lines: what happened, why, and what to do.

    Attributes:
        what: one line, what went wrong.
        why: one line, the reason; may be empty.
        fix: one line, what the user can do; may be empty.
        exit_code: what a command-line tool exits with.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = ""):
        self.what, self.why, self.fix = what, why, fix
        super().__init__("\n".join(line for line in (what, why, fix) if line))


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
