"""Read the lines of a chat from a terminal with line editing, or from a pipe; Ctrl-C in a chat.

Python handles a signal only between two bytecodes of the main thread, not while a program is
compiled or runs. So a second thread reads the signals of a reply from a pipe, sets a flag that is
checked between two tokens, and ends the process if another signal comes first.
"""

import contextlib
import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from glm2_jax.cli import interrupt
from glm2_jax.cli.messages import note
from glm2_jax.cli.text_input import decode_utf8, read_line
from glm2_jax.errors import InputError

AGAIN = "Ctrl-C again leaves"
_PROMPT, _MORE = "> ", ". "
_QUOTES = '"""'
_WAKE = (0.05, 0.2, 1.0)  # seconds between a Ctrl-C and the attempts to have it noticed
ReadLine = Callable[[str], str | None]
"""Shows a prompt and returns a line without its end; None at the end of input."""


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
    line = read(_PROMPT)
    if line is None or (line.startswith("/") and not line.startswith("//")):
        return None if line is None else Entry(line)
    if line.lstrip().startswith(_QUOTES):
        lines = [line.lstrip().removeprefix(_QUOTES)]
        while not lines[-1].rstrip().endswith(_QUOTES):
            if (following := read(_MORE)) is None:
                what = f"the input ended inside {_QUOTES}: nothing was asked"
                raise InputError(what, fix=f"end it with {_QUOTES}")
            lines.append(following)
        lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
        return Entry("\n".join(lines).strip("\n"), quoted=True)
    lines = [line]
    while lines[-1].endswith("\\") and not lines[-1].endswith("\\\\"):
        lines[-1] = lines[-1][:-1]
        if (following := read(_MORE)) is None:
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


class _GivenUp(Exception):
    """Ctrl-C was pressed after something was typed, which is dropped."""


class Terminal:
    """A chat on a terminal, with line editing; made in the main thread.

    It handles the signals that end a command. `stop` says that Ctrl-C was pressed since the last
    reply began, until a line is asked for.
    """

    def __init__(self) -> None:
        self.stop = False
        self._waiting = False  # for a line; then SIGINT raises KeyboardInterrupt
        self._handled = 0  # signals that the other thread has not read yet
        with contextlib.suppress(ImportError):
            import readline  # `input` uses it once it is imported

            readline.set_auto_history(True)
        try:
            self._state = termios.tcgetattr(sys.stdin.fileno())
        except (termios.error, OSError, ValueError):
            self._state = None
        self._endings = set(interrupt.ending_signals()) - {signal.SIGINT}
        signal.signal(signal.SIGINT, self._interrupted)
        for ending in self._endings:
            signal.signal(ending, lambda signum, frame: self._end(signum))
        interrupt.watch_signals(self._watch)

    def read(self) -> Entry | None:
        """Return the next entry; Ctrl-C drops what was typed, or where it is the second with
        nothing in between, is a KeyboardInterrupt."""
        pressed = self.stop  # the one that ended a reply is the first
        while True:
            try:
                self._waiting, self.stop = True, False
                try:
                    return read_entry(_ask)
                finally:
                    self._waiting = False
            except _GivenUp:
                pressed = False
                note("")
            except KeyboardInterrupt:
                if pressed:
                    raise
                pressed = True
                note("")
                note(f"({AGAIN})")

    def begin_reply(self) -> None:
        """Let SIGINT set `stop` from now on; a second one ends the process."""
        self.stop = self._waiting = False
        self._handled = 0

    def _interrupted(self, signum: int, frame: object) -> None:
        if self._waiting:
            self._handled += 1
            raise KeyboardInterrupt

    def _watch(self, reading: int) -> None:
        while signum := os.read(reading, 1)[0]:
            if signum in self._endings:
                self._end(signum)
            if signum != signal.SIGINT:
                continue
            if self._waiting:
                threading.Thread(target=_wake_main, daemon=True).start()
            if self._waiting or self._handled > 0:
                self._handled -= 1
            elif self.stop:
                self._end(signal.SIGINT)
            else:
                self.stop = True

    def _end(self, signum: int) -> NoReturn:
        if self._state is not None:  # line editing may have switched its echo off
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, self._state)
        interrupt.end(signum)


def _ask(prompt: str) -> str | None:
    """Ask for a line; InputError if it is not UTF-8."""
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
        if prompt == _MORE or (readline is not None and readline.get_line_buffer()):
            raise _GivenUp from None
        raise
    except EOFError:
        sys.stderr.write("\n")
        return None
    except UnicodeError:
        raise InputError("this line is not UTF-8 text", fix="set the terminal to UTF-8") from None
    return line.removesuffix("\n")


def _wake_main() -> None:
    """Interrupt what the main thread waits for, so that it handles a pending signal.

    A signal that comes while readline handles a key would otherwise wait for the next key. SIGWINCH
    (the window was resized) is harmless.
    """
    for seconds in _WAKE:
        time.sleep(seconds)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGWINCH)
