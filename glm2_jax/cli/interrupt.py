"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end a tool at once, whatever it is doing.

Python makes a signal an exception only between two bytecodes of the main thread: not while a
program is compiled or run, and one that arrives inside a callback of jax, or while an extension
module is loaded, is lost or turned into another error. Unwinding past a computation that still runs
can also crash while the interpreter shuts down. So a tool simply ends: each answer is written as
soon as it is there, and what must not be left behind is named with `always`.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from glm2_jax.cli.main import EXIT_INTERRUPTED, EXIT_TERMINATED, run_main

_GRACE = 0.5  # seconds that the main thread has to notice a signal itself
_ENDINGS = {
    signal.SIGINT: (b"interrupted\n", EXIT_INTERRUPTED),
    signal.SIGTERM: (b"terminated\n", EXIT_TERMINATED),
    signal.SIGHUP: (b"terminated\n", EXIT_TERMINATED),
}
_actions: list[Callable[[], object]] = []
_ending = threading.Lock()  # taken once, by the thread that ends the process
_silent = False


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Like `run_main`, and a signal ends the process."""

    def guarded(args: list[str]) -> int | None:
        end_on_signals()
        return main(args)

    try:
        run_main(guarded)
    except SystemExit as ending:
        if ending.code:  # a computation may still be running: do not wait for it, nor unwind it
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(ending.code if isinstance(ending.code, int) else 1)
        raise


@contextlib.contextmanager
def always(action: Callable[[], object]) -> Iterator[None]:
    """Runs `action` when the block is left, also when a signal ends the process inside it.

    It may then run in another thread, and for a second time: it must not mind either.
    """
    _actions.append(action)
    try:
        yield
    finally:
        action()
        _actions.remove(action)


def end_on_signals() -> None:
    """From now on SIGINT ends the process with 130, SIGTERM and SIGHUP with 143."""
    for signum in ending_signals():
        signal.signal(signum, _handle)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def ending_signals() -> list[signal.Signals]:
    """The signals that end a tool: without SIGHUP where it is ignored, as nohup does it."""
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    return [signum for signum in _ENDINGS if signum not in ignored]


def exit_code(signum: int) -> int:
    """The exit code of a tool that a signal ended."""
    return _ENDINGS[signal.Signals(signum)][1]


def _handle(signum: int, frame: object) -> NoReturn:
    for other in _ENDINGS:  # a second signal must not interrupt what the first one started
        signal.signal(other, signal.SIG_IGN)
    end(signum)


def _watch(reading: int) -> None:
    """Ends the process for a main thread that is busy outside Python."""
    while (signum := os.read(reading, 1)[0]) not in _ENDINGS:
        pass
    time.sleep(_GRACE)
    end(signum)


def leave_the_word() -> None:
    """From here on a signal ends this process without a word: the one that watches it tells."""
    global _silent
    _silent = True


def tell(ending: int, prefix: str = "") -> None:
    """Says that a signal ended the work, where `ending` is the exit code of one."""
    for message, code in set(_ENDINGS.values()):
        if code == ending:
            line = prefix.encode() + message
            # Past Python's streams, whose locks the main thread may hold.
            with contextlib.suppress(OSError):
                os.write(2, b"\n" + line if os.isatty(1) else line)


def end(signum: int) -> NoReturn:
    """Ends the process at once, with the message and exit code of the signal."""
    _ending.acquire()  # whoever comes second waits here for the end
    for action in reversed(_actions):
        with contextlib.suppress(Exception):
            action()
    code = exit_code(signum)
    if not _silent:
        tell(code)
    os._exit(code)
