"""Commands in processes that are watched: what ends one without a word is told in a line.

JAX ends a process in C++ when another one of its run is lost, or none is found: with a stack trace,
and past every handler of Python's. So a command that is one of several runs as a child of a process
that does nothing but watch it. The two hold the ends of a socket: into the child's C++ writes
(Python keeps the real stdout and stderr), and where it ends, the other process is gone.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm2_jax.cli import interrupt
from glm2_jax.cli.main import EXIT_DEVICE, report
from glm2_jax.cli.messages import only_errors
from glm2_jax.errors import DeviceError, GLMError
from glm2_jax.escape import escape_controls

JOINED = b"\0joined\n"  # what the child says once it has found the others
_VARIABLE = "GLM2_SUPERVISED_FD"
_KEPT = 64  # lines of C++ that are kept for --debug
# Where C++ begins to tell that another process is gone: nothing of it is for the user.
_ABOUT_OTHERS = re.compile(
    rb"[WEF]\d{4} .* (coordination_service\w*|client|preemption_\w+|add_port)\.(cc|h):\d+\]"
)
_OF_NO_USE = re.compile(rb".*(\[Gloo\] Rank|connected peer ranks)")  # two of them may share a line
_UNHEALTHY = re.compile(rb"unhealthy[^:]*:((?:\s+\d+)+)\s")
_LEADER = re.compile(rb"the leader task was preempted|Failed to send RPC to coordination")


class Worker:
    """A command that runs in a process of its own.

    Args:
        command: its words.
        prefix: of the lines that C++ writes in it.
        environment: added to that of this process.
        stdin: as `subprocess.Popen` takes it.
        ended: called with this worker, in another thread, when it has ended.

    Attributes:
        joined: whether it has found the other processes of its run.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        prefix: str = "",
        environment: Mapping[str, str] | None = None,
        stdin: int | None = None,
        ended: Callable[[Worker], object] = lambda worker: None,
    ):
        self.joined = False
        self._prefix, self._held = prefix.encode(), []
        self._ours, theirs = socket.socketpair()
        environment = {**os.environ, **(environment or {}), _VARIABLE: str(theirs.fileno())}
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=stdin,
                    env=environment,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C comes here alone, and is passed on
                )
        except OSError:
            self._ours.close()
            raise
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._waiter = threading.Thread(target=self._wait, args=(ended,), daemon=True)
        self._waiter.start()

    @property
    def exit_code(self) -> int:
        """Of one that has ended; a signal's is negative."""
        return self._process.returncode

    @property
    def told(self) -> bytes:
        """What C++ wrote of other processes, or before a sudden end."""
        return b"".join(self._held)

    def send(self, signum: int) -> None:
        """Passes a signal on, which a stopped process gets when it continues."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signum)
            self._process.send_signal(signal.SIGCONT)

    def is_stopped(self) -> bool:
        """Whether it was stopped, by SIGSTOP for example, and does not run."""
        # macOS has no waitid before Python 3.13.
        with contextlib.suppress(ChildProcessError, AttributeError):
            states = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._process.pid, states) is not None
        return False

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it has ended, after so many seconds at most."""
        self._waiter.join(seconds)
        return not self._waiter.is_alive()

    def _wait(self, ended: Callable[[Worker], object]) -> None:
        self._process.wait()
        self._reader.join(timeout=1)  # longer only where a grandchild holds the other end
        ended(self)

    def _read(self) -> None:
        with self._ours, self._ours.makefile("rb") as lines:
            with contextlib.suppress(OSError):
                for line in lines:
                    if line.endswith(JOINED):
                        self.joined = True
                    elif _OF_NO_USE.match(line):
                        continue
                    elif self._held or _ABOUT_OTHERS.match(line):
                        self._held = [*self._held, line][:_KEPT]
                    else:
                        os.write(2, _escaped(self._prefix + line))


def _escaped(lines: bytes) -> bytes:
    """Lines that C++ wrote, for a terminal."""
    return escape_controls(lines.decode(errors="replace"), keep="\n\t").encode()


@dataclass(frozen=True)
class Hosts:
    """The flags that make a process one of several, see `glm2_jax.processes.join`."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    join_timeout: int = 120  # seconds
    heartbeat_timeout: int = 100  # seconds, the default of JAX
    debug: bool = False


def supervise(hosts: Hosts) -> int:
    """Run this command again in a child process and watch it; returns its exit code."""
    name = "" if hosts.process_id is None else f"process {hosts.process_id}"
    prefix = f"{name}: " if hosts.process_id else ""
    over: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    worker = Worker([sys.executable, *sys.orig_argv[1:]], prefix=prefix, ended=over.put)
    came = pass_signals_on([worker])
    over.get()
    code, error = worker.exit_code, why_ended(worker, hosts)
    if came and code < 0:  # JAX was faster: another one had obeyed the signal, and was gone
        code, error = interrupt.exit_code(came[0]), None
    if error is None:
        interrupt.tell(code, prefix)
        return code
    if prefix:
        only_errors(name)
    if hosts.debug:
        os.write(2, _escaped(worker.told))
    return report(error)


def pass_signals_on(workers: Sequence[Worker]) -> list[int]:
    """Signals that end a tool go to the workers from here on; returns the list of those that
    came."""
    came: list[int] = []

    def pass_on(signum: int, frame: object) -> None:
        came.append(signum)
        for worker in workers:
            worker.send(signum)

    signal.set_wakeup_fd(-1)
    for signum in interrupt.ending_signals():
        signal.signal(signum, pass_on)
    return came


def why_ended(worker: Worker, hosts: Hosts) -> GLMError | None:
    """What ended a worker that could not tell it itself; None for one that could.

    Args:
        worker: one that has ended.
        hosts: the flags it was started with.
    """
    code = worker.exit_code
    if code >= 0:
        return None
    if not worker.joined and code in (-signal.SIGABRT, -signal.SIGSEGV):
        return _not_found(hosts)
    peers = peers_lost(worker)
    if peers is not None:
        which = ", ".join(map(str, peers))
        return lost(which, "It stopped responding." if which else "JAX ended this one.")
    return DeviceError(
        f"the command was ended by {signal.Signals(-code).name}",
        "It could not tell why itself.",
        "See whether the memory of this host was full; --debug shows what C++ said.",
    )


def peers_lost(worker: Worker) -> list[int] | None:
    """The processes without which JAX ended a worker, [] where it names none; None for another end.

    Args:
        worker: one that has ended.
    """
    if not worker.told or worker.exit_code != -signal.SIGABRT:
        return None
    if tasks := _UNHEALTHY.search(worker.told):
        return [*dict.fromkeys(map(int, tasks[1].split()))]
    return [0] if _LEADER.search(worker.told) else []


def lost(which: str, why: str) -> DeviceError:
    """The error of a run of which another process is gone.

    Args:
        which: its number, or several; "" where nobody knows.
        why: how that was seen.
    """
    return DeviceError(
        f"process {which} of this run was lost" if which else "a process of this run was lost",
        why,
        "See what that one said; then start all again. A training goes on with --resume auto.",
    )


def _not_found(hosts: Hosts) -> DeviceError:
    where, limit = hosts.coordinator, f"within {hosts.join_timeout} s (--join-timeout)"
    if hosts.process_id == 0:
        return DeviceError(
            f"not all {hosts.num_processes} processes have come",
            f"This one, process 0, waited for them at {where} {limit}.",
            "Start the others, and see that they reach that address.",
        )
    return DeviceError(
        f"no coordinator at {where}",
        f"Process 0 of the run did not answer there {limit}.",
        "Start process 0 on that host, or name its address: --coordinator HOST:PORT.",
    )


def is_supervised() -> bool:
    """Whether this process is one that is watched."""
    return _VARIABLE in os.environ


def connect() -> Callable[[bytes], object]:
    """Connects a watched process with the one that watches; returns what tells it something."""
    line = socket.socket(fileno=int(os.environ.pop(_VARIABLE)))
    interrupt.leave_the_word()
    sys.stdout, sys.stderr = (_for_python(stream, line) for stream in (sys.stdout, sys.stderr))
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    return line.sendall


def _for_python(stream: Any, line: socket.socket) -> Any:
    """The stream as Python goes on to use it, while what C++ writes into it goes into the line."""
    stream.flush()
    number, buffering = stream.fileno(), 1 if stream.line_buffering else -1
    kept = os.dup(number)
    os.dup2(line.fileno(), number)
    return open(kept, "w", buffering, encoding=stream.encoding, errors=stream.errors)


def _end_with(line: socket.socket) -> None:
    """Ends this process when the one that watches it has ended."""
    with contextlib.suppress(OSError):
        line.recv(1)
    os._exit(EXIT_DEVICE)
