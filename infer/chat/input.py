"""Read the lines of a chat from a terminal with line editing, or from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import NamedTuple

from glm2_jax.cli.text_input import decode_utf8, read_line
from glm2_jax.errors import InputError

PROMPT, MORE = "> ", ". "
_QUOTES = '"""'
ReadLine = Callable[[str], str | None]
"""Shows a prompt and returns a line without its end; None at the end of input."""


class GivenUp(Exception):
    """Ctrl-C was pressed after something was typed, which is dropped."""


class Entry(NamedTuple):
    """What was entered; quoted text is never a command."""

    text: str
    quoted: bool = False

    def is_command(self, word: str) -> bool:
        """Whether this is one of the official words `clear` and `stop`, with or without a slash."""
        return not self.quoted and self.text.strip() in (word, f"/{word}")


def read_entry(read: ReadLine) -> Entry | None:
    r"""Read a command or a question of one or several lines; None at the end of input.

    A line that ends with one backslash continues in the next one; a question that begins with three
    quotation marks continues to the next three. InputError: the input ends before those.
    """
    line = read(PROMPT)
    if line is None or (line.startswith("/") and not line.startswith("//")):
        return None if line is None else Entry(line)
    if line.lstrip().startswith(_QUOTES):
        lines = [line.lstrip().removeprefix(_QUOTES)]
        while not lines[-1].rstrip().endswith(_QUOTES):
            if (following := read(MORE)) is None:
                what = f"the input ended inside {_QUOTES}: nothing was asked"
                raise InputError(what, fix=f"end it with {_QUOTES}")
            lines.append(following)
        lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
        return Entry("\n".join(lines).strip("\n"), quoted=True)
    lines = [line]
    while lines[-1].endswith("\\") and not lines[-1].endswith("\\\\"):
        lines[-1] = lines[-1][:-1]
        if (following := read(MORE)) is None:
            break
        lines.append(following)
    return Entry("\n".join(lines))


def read_pipe(prompt: str) -> str | None:
    """Read a line of standard input where that is not a terminal; shows nothing.

    InputError: the line is not UTF-8, or too long. EndlessLine: it has no end.
    """
    if sys.stdin is None:
        return None
    line = read_line(sys.stdin.buffer, "a line of standard input")
    if not line:
        return None
    return decode_utf8(line, "a line of standard input").removesuffix("\n").removesuffix("\r")


def read_terminal(prompt: str) -> str | None:
    """Ask for a line on the terminal, with editing and history where Python has readline.

    Ctrl-C is KeyboardInterrupt in an empty line, and GivenUp in one that has text or continues
    another. InputError: the line is not UTF-8.
    """
    try:
        if sys.stdout.isatty():
            line = input(prompt)
        else:  # input() would write the prompt among the answers
            sys.stderr.write(prompt)
            sys.stderr.flush()
            line = sys.stdin.readline()
            if not line:
                raise EOFError
        line.encode("utf-8")  # in some locales other bytes arrive as lone surrogates
    except KeyboardInterrupt:
        readline = sys.modules.get("readline")
        if prompt == MORE or (readline is not None and readline.get_line_buffer()):
            raise GivenUp from None
        raise
    except EOFError:
        sys.stderr.write("\n")
        return None
    except UnicodeError:
        raise InputError("this line is not UTF-8 text", fix="set the terminal to UTF-8") from None
    return line.removesuffix("\n")


def enable_editing() -> None:
    """Turn on line editing: `input` uses readline once it is imported."""
    with contextlib.suppress(ImportError):
        import readline

        readline.set_auto_history(True)
