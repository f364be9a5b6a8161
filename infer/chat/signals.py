"""Ctrl-C in a chat ends a reply, and twice the program.

Python handles a signal only between two bytecodes of the main thread, not while a program is
compiled or runs on the device. So a second thread reads the signals of a reply from a pipe, sets a
flag that is checked between two tokens, and ends the process if another signal comes first.
"""

import contextlib
import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from glm2_jax.cli import interrupt

_WAKE = (0.05, 0.2, 1.0)  # seconds between a Ctrl-C and the attempts to have it noticed


class ChatSignals:
    """Handles the signals that end a command; made in the main thread, for a chat on a terminal.

    `stop` says that Ctrl-C was pressed since the last reply began, until a line is asked for.
    """

    def __init__(self) -> None:
        self.stop = False
        self._waiting = False
        self._handled = 0  # signals that the other thread has not read yet
        try:
            self._terminal = termios.tcgetattr(sys.stdin.fileno())
        except (termios.error, OSError, ValueError):
            self._terminal = None
        self._endings = set(interrupt.ending_signals()) - {signal.SIGINT}
        signal.signal(signal.SIGINT, self._interrupted)
        for ending in self._endings:
            signal.signal(ending, lambda signum, frame: self._end(signum))
        interrupt.watch_signals(self._watch)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Enter the state of asking for a line, in which SIGINT raises KeyboardInterrupt."""
        self._waiting, self.stop = True, False
        try:
            yield
        finally:
            self._waiting = False

    def begin_reply(self) -> None:
        """Enter the state of a reply, in which SIGINT sets `stop`; a second ends the process."""
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
        if self._terminal is not None:  # line editing may have switched its echo off
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, self._terminal)
        interrupt.end(signum)


def _wake_main() -> None:
    """Interrupt what the main thread waits for, so that it handles a pending signal.

    A signal that comes while readline handles a key would otherwise wait for the next key. SIGWINCH
    (the window was resized) is harmless.
    """
    for seconds in _WAKE:
        time.sleep(seconds)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGWINCH)
