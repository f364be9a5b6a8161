"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end a command at once, whatever it is doing.

Python raises the exception of a signal only between two bytecodes of the main thread, jax's
callbacks lose it, and unwinding past a running computation can crash. So the process just exits:
each answer is written as soon as it is complete, and `always` names what must be cleaned up.
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
    """Run a command as `run_main` does; a signal ends the process."""

    def guarded(args: list[str]) -> int | None:
        for signum in ending_signals():
            signal.signal(signum, _handle)
        watch_signals(_watch)
        return main(args)

    try:
        run_main(guarded)
    except SystemExit as ending:
        if ending.code:  # a computation may still run: neither wait for it nor unwind it
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(ending.code if isinstance(ending.code, int) else 1)
        raise


@contextlib.contextmanager
def always(action: Callable[[], object]) -> Iterator[None]:
    """Run `action` when the block is left, also when a signal ends the process inside it.

    The action may run in another thread and for a second time.
    """
    _actions.append(action)
    try:
        yield
    finally:
        action()
        _actions.remove(action)


def watch_signals(watch: Callable[[int], object]) -> None:
    """Run `watch` in another thread, with a pipe from which it reads the numbers of signals."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=watch, args=(reading,), daemon=True).start()


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end a command: without SIGHUP where nohup ignores it."""
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signum for signum in _ENDINGS if not (nohup and signum == signal.SIGHUP)]


def exit_code(signum: int) -> int:
    """Return the exit code of a command that a signal ended."""
    return _ENDINGS[signal.Signals(signum)][1]


def _handle(signum: int, frame: object) -> NoReturn:
    for other in _ENDINGS:  # a second signal must not interrupt what the first one started
        signal.signal(other, signal.SIG_IGN)
    end(signum)


def _watch(reading: int) -> None:
    """End the process for a main thread that is busy outside Python."""
    while (signum := os.read(reading, 1)[0]) not in _ENDINGS:
        pass
    time.sleep(_GRACE)
    end(signum)


def leave_the_word() -> None:
    """Let a signal end this process silently from now on: its parent reports it."""
    global _silent
    _silent = True


def tell(ending: int, prefix: str = "") -> None:
    """Print that a signal ended the work, if `ending` is the exit code of one."""
    for message, code in set(_ENDINGS.values()):
        if code == ending:
            line = prefix.encode() + message
            # Past Python's streams, whose locks the main thread may hold.
            with contextlib.suppress(OSError):
                os.write(2, b"\n" + line if os.isatty(1) else line)


def end(signum: int) -> NoReturn:
    """End the process at once, with the message and exit code of the signal."""
    _ending.acquire()  # a second thread waits here for the end
    for action in reversed(_actions):
        with contextlib.suppress(Exception):
            action()
    if not _silent:
        tell(exit_code(signum))
    os._exit(exit_code(signum))
