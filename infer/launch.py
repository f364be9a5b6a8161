"""`python -m infer.launch`: the processes of one run, all on this machine."""

import argparse
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
from glm2_jax.cli.arguments import positive, use_utf8
from glm2_jax.cli.main import EXIT_DEVICE, EXIT_INTERRUPTED, EXIT_TERMINATED
from glm2_jax.cli.messages import note
from glm2_jax.cli.parser import Parser
from glm2_jax.errors import UsageError
from glm2_jax.processes.supervise import Worker, pass_signals_on, peers_lost

PROG = "python -m infer.launch"
DESCRIPTION = """Starts a command as several processes of one run on this machine: to try out what
is to run on several hosts, or where a host wants a process for each of its devices. Where one ends
with an error, the others are ended, too. For several hosts, start the command on each of them with
--coordinator, --num-processes and --process-id instead; under Slurm or Kubernetes and on TPU VMs
with --coordinator auto."""
EXAMPLE = f"""{PROG} --num-processes 2 --devices-per-process 4 -- \\
    python -m train.lora --mesh data=2,tensor=4 --data data.jsonl --output adapter"""
_GRACE = 5.0  # seconds that processes which are ended have to end themselves
_ECHO = 2.0  # seconds in which those that fail together, or the one that was lost, may end
_NO_ERROR = (0, EXIT_INTERRUPTED, EXIT_TERMINATED)


def parser() -> Parser:
    """The flags of the command."""
    result = Parser(
        prog=PROG,
        description=DESCRIPTION,
        example=EXAMPLE,
        usage=f"{PROG} --num-processes N [flags] -- COMMAND ...",
    )
    group = result.add_argument_group("processes")
    group.add_argument(
        "--num-processes", type=positive, required=True, metavar="N", help="how many to start"
    )
    group.add_argument(
        "--devices-per-process",
        type=positive,
        metavar="M",
        help="compute on so many virtual devices of the CPU in each (default: on the devices that "
        "each of them finds)",
    )
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, raises GLMError for what the user can mend."""
    use_utf8()
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    args, command = parser().parse_args(words[:at]), words[at + 1 :]
    if not command:
        raise UsageError("there is no command to start", fix="Write it after --.")
    over: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    workers = _start(args, command, over)
    came = pass_signals_on(workers)
    code, cause = _wait(workers, over, came)
    if cause is None:
        interrupt.tell(code)
        return code
    which = f"process {workers.index(cause)} of {len(workers)} {_ending(cause)}"
    note(f"{which}; the others are ended")
    if code <= 0:
        note("start again: a batch with --output, and a training with --resume auto, go on")
    _end([worker for worker in workers if not worker.wait(0)])
    return code if code > 0 else EXIT_DEVICE


def _start(
    args: argparse.Namespace, command: list[str], over: queue.SimpleQueue[Worker]
) -> list[Worker]:
    """The processes; each is put into the queue when it has ended."""
    environment = {}
    if args.devices_per_process is not None:
        environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices_per_process)}
    flags = f"--coordinator 127.0.0.1:{_free_port()} --num-processes {args.num_processes}"
    try:
        return [
            Worker(
                [*command, *flags.split(), "--process-id", str(number)],
                prefix=f"process {number}: " if number else "",
                environment=environment,
                stdin=subprocess.DEVNULL,  # or they would take it from each other
                ended=over.put,
            )
            for number in range(args.num_processes)
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
    """Waits until all have ended, or one has with an error.

    Returns:
        (exit code, None) where nobody is to blame: the first that was not 0, or that of all;
        (exit code, worker) of the one that is; 0 where it has not ended.
    """
    code = 0
    for left in reversed(range(len(workers))):
        worker = over.get()
        if came and (worker.exit_code < 0 or worker.exit_code == EXIT_DEVICE):
            # It lost another that obeyed the signal first.
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
    """Whose end is that of the others, `left` of which run; None where all fail alike.

    It is the first that ended, but where that one had only lost another: the one that was lost,
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
    code = worker.exit_code
    return (
        f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    )


def _end(workers: Sequence[Worker]) -> None:
    """Ends processes that wait for one that is gone; those that can may tidy up first."""
    for worker in workers:
        worker.send(signal.SIGTERM)
    until = time.monotonic() + _GRACE
    for worker in workers:
        if not worker.wait(max(until - time.monotonic(), 0)):
            worker.send(signal.SIGKILL)
            worker.wait()


if __name__ == "__main__":
    interrupt.run(main)
