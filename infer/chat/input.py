"""Where a chat's lines come from: a terminal with line editing, or a pipe."""

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


class GivenUp(Exception):
    """Ctrl-C was pressed where something was typed, which is forgotten."""


class Entry(NamedTuple):
    """What was entered; what stands in quotation marks is no command, whatever it says."""

    text: str
    quoted: bool = False


def read_entry(read: ReadLine) -> Entry | None:
    r"""Reads a command or a question, which may have several lines; None at the end of input.

    A line that ends with one backslash goes on in the next one; a question that begins with three
    quotation marks goes on to the next three.

    Args:
      read: reads a line without its end, given the prompt to show; None at the end of input.

    Raises:
      InputError: the input ends inside quotation marks.
    """
    line = read(PROMPT)
    if line is None:
        return None
    if line.startswith("/") and not line.startswith("//"):
        return Entry(line)
    if line.lstrip().startswith(_QUOTES):
        return Entry(_quoted(line.lstrip().removeprefix(_QUOTES), read), quoted=True)
    lines = [line]
    while _goes_on(lines[-1]):
        lines[-1] = lines[-1][:-1]
        following = read(MORE)
        if following is None:
            break
        lines.append(following)
    return Entry("\n".join(lines))


def _goes_on(line: str) -> bool:
    return line.endswith("\\") and not line.endswith("\\\\")


def _quoted(line: str, read: ReadLine) -> str:
    lines = [line]
    while not lines[-1].rstrip().endswith(_QUOTES):
        following = read(MORE)
        if following is None:
            raise InputError(
                f"the input ended inside {_QUOTES}: nothing was asked", fix=f"end it with {_QUOTES}"
            )
        lines.append(following)
    lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
    return "\n".join(lines).strip("\n")


def read_pipe(prompt: str) -> str | None:
    """Reads a line from a standard input that is no terminal; nothing is shown.

    Raises:
      InputError: the line is not UTF-8, or too long. EndlessLine: it has no end.
    """
    if sys.stdin is None:
        return None
    line = read_line(sys.stdin.buffer, "a line of standard input")
    if not line:
        return None
    return decode_utf8(line, "a line of standard input").removesuffix("\n").removesuffix("\r")


def read_terminal(prompt: str) -> str | None:
    """Asks for a line on the terminal, with editing and history where Python has readline.

    Raises:
      GivenUp: Ctrl-C, in a line that has text or goes on from another.
      KeyboardInterrupt: Ctrl-C in an empty line.
      InputError: the line is not UTF-8.
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
        line.encode("utf-8")  # bytes that are none come as lone surrogates in some locales
    except KeyboardInterrupt:
        if prompt == MORE or _typed():
            raise GivenUp from None
        raise
    except EOFError:
        sys.stderr.write("\n")
        return None
    except UnicodeError:
        raise InputError("this line is not UTF-8 text", fix="set the terminal to UTF-8") from None
    return line.removesuffix("\n")


def _typed() -> str:
    """What stands in the line that is edited, as far as that can be known."""
    readline = sys.modules.get("readline")
    return "" if readline is None else readline.get_line_buffer()


def enable_editing() -> None:
    """Turns on line editing; `input` uses the module as soon as it is imported."""
    with contextlib.suppress(ImportError):
        import readline

        readline.set_auto_history(True)
