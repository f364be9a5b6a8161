"""Ctrl-C and SIGTERM end a training between two steps, after saving."""

from __future__ import annotations

import os
import signal
import threading

from convert import interrupt
from convert.cli import EXIT_INTERRUPTED, EXIT_TERMINATED, note

EXIT_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}


class Stopping:
    """Takes SIGINT and SIGTERM over; for the main thread. The second signal ends the process at
    once: what was saved before is complete.

    Attributes:
        signal: the signal that asked for the end; None while nobody did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        for signum in EXIT_CODES:
            signal.signal(signum, lambda signum, frame: None)  # read from the pipe instead
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()

    @property
    def exit_code(self) -> int:
        """Of the process: 0 while nobody asked for the end."""
        return 0 if self.signal is None else EXIT_CODES[signal.Signals(self.signal)]

    def _watch(self, reading: int) -> None:
        """A thread, because the main one may be inside a step or a compilation for long."""
        while True:
            signum = os.read(reading, 1)[0]
            if signum not in EXIT_CODES:
                continue
            if self.signal is not None:
                interrupt.end(signum)
            self.signal = signum
            note("ending after this step, which is saved; once more ends at once")
