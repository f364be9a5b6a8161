"""`python -m infer.launch`: the processes of one run, all on this machine."""

import contextlib
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import chain

from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import positive
from glm2_jax.cli.main import EXIT_DEVICE, EXIT_INTERRUPTED, EXIT_TERMINATED
from glm2_jax.cli.messages import note
from glm2_jax.cli.parser import Parser
from glm2_jax.errors import UsageError
from glm2_jax.processes.supervise import Worker, pass_signals_on, peers_lost

PROG = "python -m infer.launch"
DESCRIPTION = """Starts a command as several processes of one run on this machine: to try out a run
of several hosts, or to have one process per device. If one ends with an error, the
others are terminated.

For several hosts, start the command on each of them with --coordinator, --num-processes and
--process-id instead; under Slurm or Kubernetes and on TPU VMs with --coordinator auto."""
EXAMPLE = f"""{PROG} --num-processes 2 --devices-per-process 4 -- \\
    python -m train.lora --mesh data=2,tensor=4 --data data.jsonl --output adapter"""
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL
_ECHO = 2.0  # seconds within which processes that fail together end
_NO_ERROR = (0, EXIT_INTERRUPTED, EXIT_TERMINATED)


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(
        prog=PROG,
        description=DESCRIPTION,
        example=EXAMPLE,
        usage=f"{PROG} --num-processes N [flags] -- COMMAND ...",
    )
    add = result.add_argument_group("processes").add_argument
    add("--num-processes", type=positive, required=True, metavar="N", help="processes to start")
    add(
        "--devices-per-process", type=positive, metavar="M",
        help="virtual CPU devices in each process (default: the devices that each of them finds)",
    )  # fmt: skip
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, or raise GLMError for what the user can fix."""
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    args, command = parser().parse_args(words[:at]), words[at + 1 :]
    if not command:
        raise UsageError("no command to start", fix="Write it after --.")
    over: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    workers = _start(command, args.num_processes, args.devices_per_process, over)
    came = pass_signals_on(workers)
    code, cause = _wait(workers, over, came)
    if cause is None:
        interrupt.tell(code)
        return code
    which = f"process {workers.index(cause)} of {len(workers)} {_ending(cause)}"
    note(f"{which}; the others are terminated")
    if code <= 0:
        note("start again: a batch with --output and training with --resume auto resume")
    _end([worker for worker in workers if not worker.wait(0)])
    return code if code > 0 else EXIT_DEVICE


def _start(
    command: list[str], processes: int, devices: int | None, over: queue.SimpleQueue[Worker]
) -> list[Worker]:
    environment = {}
    if devices is not None:
        environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    flags = f"--coordinator 127.0.0.1:{_free_port()} --num-processes {processes}"
    try:
        return [
            Worker(
                [*command, *flags.split(), "--process-id", str(number)],
                over,
                prefix=f"process {number}: " if number else "",
                environment=environment,
                stdin=subprocess.DEVNULL,  # or they would compete for it
            )
            for number in range(processes)
        ]
    except OSError as error:
        raise UsageError(
            f"{command[0]} cannot be started", error.strerror or str(error), "Check the command."
        ) from error


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def _wait(
    workers: Sequence[Worker], over: queue.SimpleQueue[Worker], came: Sequence[int]
) -> tuple[int, Worker | None]:
    """Wait until all have ended, or one has with an error.

    Returns (exit code, None) where all ended alike or well: the first code that was not 0; or
    (exit code, worker) for the worker that caused an error; code 0 if it still runs.
    """
    code = 0
    for left in reversed(range(len(workers))):
        worker = over.get()
        if came and (worker.exit_code < 0 or worker.exit_code == EXIT_DEVICE):
            # It lost another process that ended first by the same signal.
            code = code or interrupt.exit_code(came[0])
            continue
        code = code or worker.exit_code
        if worker.exit_code not in _NO_ERROR:
            cause = _cause(worker, left, over, workers)
            if cause is None:
                return worker.exit_code, None
            return cause.exit_code if cause.wait(0) else 0, cause
    return code, None


def _cause(
    first: Worker, left: int, over: queue.SimpleQueue[Worker], workers: Sequence[Worker]
) -> Worker | None:
    """Return the worker that made the others fail, `left` of which run; None if all fail alike.

    It is the first that ended; if that one had only lost another process, it is the lost one,
    which may still run without responding.
    """
    ended, until = [first], time.monotonic() + _ECHO
    with contextlib.suppress(queue.Empty):
        while len(ended) <= left and ended[-1].exit_code == first.exit_code:
            ended.append(over.get(timeout=max(until - time.monotonic(), 0)))
    alike = len(ended) > left and {worker.exit_code for worker in ended} == {first.exit_code}
    if alike and first.exit_code > 0:
        return None
    named = {number for worker in ended for number in peers_lost(worker) or ()}
    running = [worker for worker in workers if not worker.wait(0)]
    return next(
        chain(
            (w for w in ended if w.exit_code != EXIT_DEVICE and peers_lost(w) is None),
            (w for w in running if w.is_stopped() or workers.index(w) in named),
        ),
        first,
    )


def _ending(worker: Worker) -> str:
    if not worker.wait(0):
        return "stopped responding"
    if worker.exit_code > 0:
        return f"exited with code {worker.exit_code}"
    return f"was terminated by {signal.Signals(-worker.exit_code).name}"


def _end(workers: Sequence[Worker]) -> None:
    """End processes that wait for a lost one; SIGTERM lets them clean up first."""
    for worker in workers:
        worker.send(signal.SIGTERM)
    until = time.monotonic() + _GRACE
    for worker in workers:
        if not worker.wait(max(until - time.monotonic(), 0)):
            worker.send(signal.SIGKILL)
            worker.wait()


if __name__ == "__main__":
    interrupt.run(main)
