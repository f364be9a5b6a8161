"""Supervised commands: an end in C++ is reported in a line.

JAX aborts a process that lost another one in C++, past every handler of Python. So a command that
is one of several runs as a child of a supervisor. What C++ writes in the child goes into a socket
between them (Python keeps the real streams), and when one of the two ends, the other sees it close.
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
from glm2_jax.cli.arguments import positive, whole
from glm2_jax.cli.main import EXIT_DEVICE, report
from glm2_jax.cli.messages import only_errors
from glm2_jax.cli.parser import flag
from glm2_jax.errors import DeviceError, GLMError
from glm2_jax.escape import escape_controls

AUTO = "auto"  # the coordinator of a cluster that JAX detects
JOINED = b"\0joined\n"  # the child sends it once it is connected to the others
_VARIABLE = "GLM2_SUPERVISED_FD"
_KEPT = 64  # lines of C++ that are kept for --debug
# The first line of C++ about a lost process; none of the lines after it are for the user.
_ABOUT_OTHERS = re.compile(
    rb"[WEF]\d{4} .* (coordination_service\w*|client|preemption_\w+|add_port)\.(cc|h):\d+\]"
)
# Two threads may write such lines at once: they then share one, and the end of it is a lone number.
_IGNORED = re.compile(rb".*(\[Gloo\] Rank|connected peer ranks)|\d*\s*$")
_UNHEALTHY = re.compile(rb"unhealthy[^:]*:((?:\s+\d+)+)\s")
_LEADER = re.compile(rb"the leader task was preempted|Failed to send RPC to coordination")


class Worker:
    """A command that runs in a child process; it is put into the queue `over` when it has ended.

    `prefix` is put before the lines that C++ writes in it, `environment` is added to that of this
    process, `stdin` is as in `subprocess.Popen`. `joined` says whether the command is connected to
    the other processes of its run.
    """

    def __init__(
        self,
        command: Sequence[str],
        over: queue.SimpleQueue[Worker],
        *,
        prefix: str = "",
        environment: Mapping[str, str] | None = None,
        stdin: int | None = None,
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
        self._waiter = threading.Thread(target=self._wait, args=(over,), daemon=True)
        self._waiter.start()

    @property
    def exit_code(self) -> int:
        """Exit code of a worker that has ended; negative for a signal."""
        return self._process.returncode

    @property
    def output(self) -> bytes:
        """What C++ wrote about other processes, or before an abort."""
        return b"".join(self._held)

    def send(self, signum: int) -> None:
        """Forward a signal; a stopped process gets it when it continues."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signum)
            self._process.send_signal(signal.SIGCONT)

    def is_stopped(self) -> bool:
        """Return whether it is stopped, by SIGSTOP for example."""
        # macOS lacks waitid before Python 3.13.
        with contextlib.suppress(ChildProcessError, AttributeError):
            states = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._process.pid, states) is not None
        return False

    def wait(self, seconds: float | None = None) -> bool:
        """Wait at most so many seconds; returns whether it has ended."""
        self._waiter.join(seconds)
        return not self._waiter.is_alive()

    def _wait(self, over: queue.SimpleQueue[Worker]) -> None:
        self._process.wait()
        self._reader.join(timeout=1)  # longer only where a grandchild holds the other end
        over.put(self)

    def _read(self) -> None:
        with self._ours, self._ours.makefile("rb") as lines:
            with contextlib.suppress(OSError):
                for line in lines:
                    if line.endswith(JOINED):
                        self.joined = True
                    elif self._held or _ABOUT_OTHERS.match(line):
                        self._held = [*self._held, line][:_KEPT]
                    elif not _IGNORED.match(line):
                        os.write(2, _escaped(self._prefix + line))


def _escaped(lines: bytes) -> bytes:
    """Return lines that C++ wrote as a terminal may show them."""
    return escape_controls(lines.decode(errors="replace"), keep="\n\t").encode()


@dataclass(frozen=True)
class Hosts:
    """The flags that make a process one of several, see `glm2_jax.processes.join`."""

    coordinator: str | None = flag(
        f"host of process 0 and a free port there; {AUTO} = Kubernetes, Slurm or TPU VMs provide "
        "this and the next two",
        metavar="HOST:PORT",
    )
    num_processes: int | None = flag("number of processes", type=positive, metavar="N")
    process_id: int | None = flag("index of this process, from 0", type=whole, metavar="I")
    join_timeout: int = flag(
        "seconds to wait for the other processes to start", type=positive, default=120, metavar="S"
    )
    heartbeat_timeout: int = flag(  # the default of JAX
        "seconds without a heartbeat after which a process counts as lost, which ends the others",
        type=positive, default=100, metavar="S",
    )  # fmt: skip


def supervise(hosts: Hosts, *, debug: bool) -> int:
    """Run this command again in a child process and watch it; returns its exit code."""
    name = "" if hosts.process_id is None else f"process {hosts.process_id}"
    prefix = f"{name}: " if hosts.process_id else ""
    over: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    worker = Worker([sys.executable, *sys.orig_argv[1:]], over, prefix=prefix)
    came = pass_signals_on([worker])
    over.get()
    code, error = worker.exit_code, why_ended(worker, hosts)
    if came and code < 0:  # JAX was faster: another process had ended by the same signal
        code, error = interrupt.exit_code(came[0]), None
    if error is None:
        interrupt.tell(code, prefix)
        return code
    if prefix:
        only_errors(name)
    if debug:
        os.write(2, _escaped(worker.output))
    return report(error)


def pass_signals_on(workers: Sequence[Worker]) -> list[int]:
    """Forward signals that end a tool to the workers; return the list of those that came."""
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
    """Return what ended a worker that could not report it; None for one that could."""
    code = worker.exit_code
    if code >= 0:
        return None
    if not worker.joined and code in (-signal.SIGABRT, -signal.SIGSEGV):
        what = "process 0 did not answer"
        if hosts.process_id == 0:
            what = f"not all {hosts.num_processes} processes have connected"
        return DeviceError(
            f"{what} at {hosts.coordinator}",
            f"This process waited {hosts.join_timeout} s (--join-timeout).",
            "Start all processes; process 0 on the host of --coordinator, which all can reach.",
        )
    peers = peers_lost(worker)
    if peers is not None:
        which = ", ".join(map(str, peers))
        return lost(which, "It stopped responding." if which else "JAX ended this one.")
    return DeviceError(
        f"the command was terminated by {signal.Signals(-code).name}",
        "It could not report why.",
        "Check whether this host ran out of memory; --debug shows the output of C++.",
    )


def peers_lost(worker: Worker) -> list[int] | None:
    """Return the processes whose loss made JAX abort a worker; [] = unnamed, None = another end."""
    if not worker.output or worker.exit_code != -signal.SIGABRT:
        return None
    if tasks := _UNHEALTHY.search(worker.output):
        return [*dict.fromkeys(map(int, tasks[1].split()))]
    return [0] if _LEADER.search(worker.output) else []


def lost(which: str, why: str) -> DeviceError:
    """Return the error of a run that lost a process: its number, or several, or "" if unknown."""
    return DeviceError(
        f"process {which} of this run was lost" if which else "a process of this run was lost",
        why,
        "Read its output, then start all processes again. Training resumes with --resume auto.",
    )


def is_supervised() -> bool:
    """Return whether this process is a supervised child."""
    return _VARIABLE in os.environ


def connect() -> Callable[[bytes], object]:
    """Connect a supervised process to its supervisor; returns a function that sends bytes to it."""
    line = socket.socket(fileno=int(os.environ.pop(_VARIABLE)))
    interrupt.leave_the_word()
    sys.stdout, sys.stderr = (_for_python(stream, line) for stream in (sys.stdout, sys.stderr))
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    return line.sendall


def _for_python(stream: Any, line: socket.socket) -> Any:
    """Return the stream for Python; what C++ writes to its descriptor goes into the socket."""
    stream.flush()
    number, buffering = stream.fileno(), 1 if stream.line_buffering else -1
    kept = os.dup(number)
    os.dup2(line.fileno(), number)
    return open(kept, "w", buffering, encoding=stream.encoding, errors=stream.errors)


def _end_with(line: socket.socket) -> None:
    """End this process when its supervisor has ended."""
    with contextlib.suppress(OSError):
        line.recv(1)
    os._exit(EXIT_DEVICE)
