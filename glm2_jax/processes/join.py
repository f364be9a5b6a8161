"""One run of several processes, on several hosts: started together, compared, and ended together.

`jax.distributed` connects them and detects clusters. Enter `start` before anything of jax is used.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glm2_jax.cli.main import version
from glm2_jax.cli.messages import note, only_errors
from glm2_jax.cli.parser import Parser, add_flags
from glm2_jax.errors import DeviceError, InputError, UsageError
from glm2_jax.processes import supervise
from glm2_jax.processes.supervise import AUTO, Hosts

# Paths may differ between hosts; the contents are compared instead.
_PLACES = {
    "coordinator", "process_id", "model", "hub_source", "revision", "adapter", "prefix",
    "init_adapter", "data", "mix_data", "val_data", "guard_data", "sample_prompts", "prompt_file",
    "batch_file", "history", "output", "predictions", "checkpoints", "log_jsonl", "plot",
    "compile_cache", "config", "debug",
}  # fmt: skip
_ASKED_FOR = {"output", "predictions"}  # paths that all processes or none must have
# Errors that JAX raises when the connection to another process breaks.
_LOST = re.compile(
    r"Gloo [\w-]+ failed|remote process exited|coordination service|unhealthy|heartbeat"
)
_UNLIMITED = 7 * 24 * 3600  # seconds that a finished process waits for others that still write
_GIVE = "Give --coordinator HOST:PORT, --num-processes N and --process-id I"

_started = False
_processes = 1
_flags: Mapping[str, Any] = {}


def add_host_options(parser: Parser) -> None:
    """Add the flags that make a process one of several."""
    group = add_flags(parser, "several processes", Hosts)
    group.description = "The same command on each host; only --process-id differs."


@contextlib.contextmanager
def start(hosts: Hosts, flags: Mapping[str, Any]) -> Iterator[None]:
    """Make this process one of the run that the flags name; around all that a command does.

    Without such flags nothing is done. Otherwise the command continues in a child process, and
    this one watches it and exits with its code; in the child the body is run. `flags` are all flags
    of the command, for `compare`.

    Raises:
        UsageError: flags that make no sense together. DeviceError: the processes did not find each
            other, or one of them was lost.
    """
    global _started, _processes, _flags
    if not _check(hosts):
        yield
        return
    if not supervise.is_supervised():
        sys.exit(supervise.supervise(hosts, debug=flags["debug"]))
    tell = supervise.connect()
    _processes, _flags = hosts.num_processes or 1, flags
    _join(hosts)
    tell(supervise.JOINED)
    try:
        yield
    except Exception as error:
        if _is_lost_connection(error):
            raise supervise.lost("", "The connection to it broke (--debug says how).") from error
        raise
    import jax

    jax.distributed.shutdown()  # waits for the others: none of them counts this process as lost
    _started = False


def are_several() -> bool:
    """Return whether this process is one of several."""
    return _started


def number_of_processes() -> int:
    """Return how many processes the flags name; 1 where a cluster says it. Does not start jax."""
    return _processes


def is_first() -> bool:
    """Return whether this process prints and writes files."""
    if not _started:
        return True
    import jax

    return jax.process_index() == 0


def highest(number: int) -> int:
    """Return the highest of the numbers that all processes call this with, at the same point.

    A collective, for example to agree to end.
    """
    if not _started:
        return number
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(number)).max())


def of_first(value: Any) -> Any:
    """Return the JSON value that the first process calls this with. A collective."""
    if not _started:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode() if is_first() else b""
    padded = np.zeros(highest(len(text)), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def compare(contents: Mapping[str, Any] | None = None) -> None:
    """Refuse a run whose processes were started differently; every one of them raises the same.

    Flags that say where something is stored may differ. `contents` are JSON values or checksums of
    what the processes work with; a name with "--" replaces a flag.

    Raises:
        UsageError: flags or commands differ. InputError: versions or contents do.
    """
    if not _started:
        return
    facts = {f"--{k.replace('_', '-')}": v for k, v in _flags.items() if k not in _PLACES}
    facts |= {f"--{name}": bool(_flags.get(name)) for name in _ASKED_FOR}
    facts |= {"version": version()} | dict(contents or {})
    command = "/".join(Path(sys.argv[0]).parts[-2:])  # the folders may differ between hosts
    _compare({"command": command, "kinds of flags": sorted(facts)})
    _compare(facts)


def _compare(facts: Mapping[str, Any]) -> None:
    """Compare facts of the same names in all processes."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    names = sorted(facts)
    mine = np.stack([np.frombuffer(_digest(facts[name]), np.uint8) for name in names])
    sums = np.asarray(multihost_utils.process_allgather(mine))  # [processes, names, 32]
    differs = (sums != sums[:1]).any(axis=-1)
    if not differs.any():
        return
    differing = []
    for name, others in zip(names, differs.T, strict=True):
        if others.any():
            numbers = [str(number) for number in np.flatnonzero(others)]
            differing.append(f"{name} (process{'es' * (len(numbers) > 1)} {', '.join(numbers)})")
    jax.distributed.shutdown()  # all are here, so that none counts another as lost
    of_flags = all(text.startswith(("--", "command", "kinds")) for text in differing)
    raise (UsageError if of_flags else InputError)(
        f"the processes differ from process 0 in {', '.join(differing)}",
        "All processes of a run must compute the same.",
        "Start all of them with the same flags, files and version.",
    )


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).digest()


def _check(hosts: Hosts) -> bool:
    """Return whether there are several processes; UsageError for flags that do not fit."""
    given = hosts.coordinator, hosts.num_processes, hosts.process_id
    if given in ((None, None, None), (AUTO, None, None)):
        return hosts.coordinator is not None
    if hosts.coordinator in (None, AUTO) or hosts.num_processes is None or hosts.process_id is None:
        raise UsageError(
            "a run of several processes needs a coordinator, a number of processes and an index",
            f"With --coordinator {AUTO} the cluster provides them.",
            f"{_GIVE}, or --coordinator {AUTO} alone.",
        )
    found = re.fullmatch(r".+:([0-9]{1,5})", hosts.coordinator)
    if not found or not 0 < int(found[1]) < 65536:
        raise UsageError(
            f"--coordinator must be HOST:PORT, got {hosts.coordinator}",
            fix="For example 10.0.0.1:1234.",
        )
    if hosts.process_id >= hosts.num_processes:
        raise UsageError(
            f"--process-id must be below --num-processes {hosts.num_processes}, "
            f"got {hosts.process_id}",
            fix="Number the processes from 0.",
        )
    return True


def _join(hosts: Hosts) -> None:
    """Connect to the other processes; from here on only the first one prints notes."""
    global _started
    if hosts.process_id == 0 and hosts.coordinator is not None:
        _check_port(hosts.coordinator)
        note(f"process 0 of {hosts.num_processes}: waiting for the others at {hosts.coordinator}")
    elif hosts.process_id is not None:
        only_errors(f"process {hosts.process_id}")
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM over
    auto = hosts.coordinator == AUTO
    try:
        jax.distributed.initialize(
            None if auto else hosts.coordinator,
            hosts.num_processes,
            hosts.process_id,
            cluster_detection_method=None if auto else "deactivate",
            initialization_timeout=hosts.join_timeout,
            heartbeat_timeout_seconds=hosts.heartbeat_timeout,
            shutdown_timeout_seconds=_UNLIMITED,
        )
    except (ValueError, RuntimeError) as error:
        raise DeviceError(
            "no cluster was found" if auto else "the processes of this run could not connect",
            f"JAX says: {(str(error).splitlines() or [type(error).__name__])[0][:300]}",
            f"{_GIVE}." if auto else "Check that all processes run, with the same --coordinator.",
        ) from error
    _started = True
    if jax.process_index() != 0:
        only_errors(f"process {jax.process_index()}")
        sys.stdout = open(os.devnull, "w")


def _check_port(coordinator: str) -> None:
    """Refuse a port that is in use: JAX would end the process without a message."""
    port = int(coordinator.rpartition(":")[2])
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(("", port))
    except OSError as error:
        raise DeviceError(
            f"port {port} of --coordinator cannot be used",
            error.strerror or str(error),
            "Name another port, in all processes.",
        ) from error


def _is_lost_connection(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, is a broken connection."""
    while error is not None:
        kind = type(error).__name__
        if kind in ("XlaRuntimeError", "JaxRuntimeError") and _LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
