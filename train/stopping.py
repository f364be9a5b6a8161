"""Ctrl-C, SIGTERM and SIGHUP end a training run between two steps, after saving."""

from __future__ import annotations

import os
import signal
import threading

from glm2_jax.cli import interrupt
from glm2_jax.cli.messages import note
from glm2_jax.processes import join


class Stopping:
    """Handles the signals that end a command as long as it is open. A context manager.

    The second signal ends the process at once: what was saved before is complete. `signal` is the
    one that asked to stop, or None; all processes of a run have the one that any of them received,
    once they have agreed.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._received: int | None = None  # by this process

    def __enter__(self) -> Stopping:
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        # A thread reads them from the pipe, because the main one may be inside a step for long.
        self._before = {
            signum: signal.signal(signum, lambda signum, frame: None)
            for signum in interrupt.ending_signals()
        }
        self._pipe_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._pipe_before, warn_on_full_buffer=False)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        os.close(self._writing)

    @property
    def exit_code(self) -> int:
        """The exit code of the process: 0 without a signal."""
        return 0 if self.signal is None else interrupt.exit_code(self.signal)

    def agree(self) -> bool:
        """Return whether any process of the run was asked to stop.

        All processes must call this at the same point of their work: `signal` changes nowhere else.
        """
        self.signal = join.highest(self._received or self.signal or 0) or None
        return self.signal is not None

    def _watch(self, reading: int) -> None:
        while read := os.read(reading, 1):
            if read[0] not in self._before:
                continue
            if self._received is not None:
                interrupt.end(read[0])
            self._received = read[0]
            note("stopping after this step, which is saved; a second signal stops at once")
        os.close(reading)
