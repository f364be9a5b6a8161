"""Ctrl-C and SIGTERM end a tool at once, whatever it is doing.

Python makes a signal an exception only between two bytecodes of the main thread: not while a
program is compiled or run, and one that arrives inside a callback of jax, or while an extension
module is loaded, is lost or turned into another error. Unwinding past a computation that still runs
can also crash while the interpreter shuts down. So a tool that has nothing to save, because each
answer is written as soon as it is there, simply ends.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from convert.cli import EXIT_INTERRUPTED, EXIT_TERMINATED, run_main

_GRACE = 0.5  # seconds that the main thread has to notice a signal itself
_ENDINGS = {
    signal.SIGINT: (b"interrupted\n", EXIT_INTERRUPTED),
    signal.SIGTERM: (b"terminated\n", EXIT_TERMINATED),
}


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Like `run_main`, for a tool that has nothing to clean up."""

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


def end_on_signals() -> None:
    """From now on SIGINT and SIGTERM end the process, with 130 and 143."""
    for signum in _ENDINGS:
        signal.signal(signum, lambda signum, frame: end(signum))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def _watch(reading: int) -> None:
    """Ends the process for a main thread that is busy outside Python."""
    while (signum := os.read(reading, 1)[0]) not in _ENDINGS:
        pass
    time.sleep(_GRACE)
    end(signum)


def end(signum: int) -> NoReturn:
    """Ends the process at once, with the message and exit code of the signal."""
    message, code = _ENDINGS[signal.Signals(signum)]
    with contextlib.suppress(
        OSError
    ):  # past Python's streams, whose locks the main thread may hold
        os.write(2, b"\n" + message if os.isatty(1) else message)
    os._exit(code)
