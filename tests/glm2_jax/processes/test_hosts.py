"""Several processes of one run, over loopback: joined, compared, and ended together."""

import argparse
import os
import queue
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.errors import DeviceError, InputError, UsageError
from glm2_jax.processes import join, supervise
from infer import launch
from tests.support.paths import ROOT

COMMAND = [sys.executable, "-m", "tests.support.host_command"]
LIMIT = 120  # seconds; a fail-safe alone


def flags(number, *, port=1, count=2):
    return ["--coordinator", f"127.0.0.1:{port}", "--num-processes", f"{count}",
            "--process-id", f"{number}"]  # fmt: skip


def popen(command, **environment):
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"} | environment,
    )  # fmt: skip


def start_two(*more, of_second=()):
    """The command as two processes of four devices."""
    port = launch._free_port()
    own = [more, [*more, *of_second]]
    return [popen([*COMMAND, *flags(i, port=port), *own[i]]) for i in range(2)]


def start_launcher(*more):
    return popen([sys.executable, "-m", "infer.launch", "--num-processes", "2",
                  "--devices-per-process", "4", "--", *COMMAND, *more])  # fmt: skip


def ends(process):
    out, err = process.communicate(timeout=LIMIT)
    assert "Traceback" not in err and "stack trace" not in err and "[Gloo]" not in err + out
    return process.returncode, out, err.splitlines()


def wait_for_begun(*processes):
    for process in processes:
        assert any("begun" in line for line in process.stderr)


def children(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def parsed(*argv):
    parser = Parser(prog="x")
    join.add_host_options(parser)
    parser.add_argument("--lr", default=1)
    parser.add_argument("--output")
    parser.add_common()
    return parser.parse_args(list(argv))


def test_two_processes_join_and_only_the_first_one_prints():
    first, second = (ends(process) for process in start_two())
    code, out, err = first
    assert (code, out) == (0, "[2, 8]\n")
    assert err[0].startswith("process 0 of 2: waiting for the others at 127.0.0.1:")
    assert err[1].startswith("working: 1 of 1") and err[2:] == ["a note, highest 7, first True"]
    assert second == (0, "", [])


def test_a_cluster_that_jax_detects():
    """What Slurm would say to each of two processes on this machine."""
    job = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1"}
    job |= {"SLURM_JOB_ID": "7", "JAX_COORDINATOR_PORT": f"{launch._free_port()}"}
    command = [*COMMAND, "--coordinator", "auto"]
    both = [popen(command, **job, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    both.append(popen(command))
    first, second, alone = (ends(process) for process in both)
    assert first[:2] == (0, "[2, 8]\n") and second == (0, "", [])
    assert alone == (5, "", [
        "error: no cluster was found",
        "JAX says: coordinator_address should be defined.",
        "Give --coordinator HOST:PORT, --num-processes N and --process-id I.",
    ])  # fmt: skip


def test_processes_with_other_flags_and_another_checkpoint_are_refused():
    both = start_two("--lr", "1", "--do", "0:bad", of_second=("--lr", "2", "--model", "other"))
    first, second = (ends(process) for process in both)
    lines = [
        "error: the processes differ from process 0 in --lr (process 1), checkpoint (process 1)",
        "All processes of a run must compute the same.",
        "Start all of them with the same flags, files and version.",
    ]
    assert first[:2] == second[:2] == (3, "") and first[2][1:] == lines
    assert second[2] == [f"process 1: {line}" for line in lines]


def test_a_process_that_is_killed_ends_the_other_one():
    """Killed is the process that watches: what it watches ends with it."""
    first, second = start_two("--do", "loop")
    wait_for_begun(first)
    second.kill()
    code, _, err = ends(first)
    second.communicate()
    assert code == 5 and err[0] == "error: a process of this run was lost" and len(err) == 3
    assert err[1] == "The connection to it broke (--debug says how)." and "start all" in err[2]


def test_a_process_that_stops_to_answer_ends_the_other_one():
    """Without a collective, where only JAX's heartbeats tell, and it ends the process in C++."""
    first, second = start_two("--do", "sleep", "--heartbeat-timeout", "3")
    wait_for_begun(first, second)
    (watched,) = children(second)
    os.kill(int(watched), signal.SIGSTOP)
    assert ends(first) == (5, "[2, 8]\n", [
        "error: process 1 of this run was lost",
        "It stopped responding.",
        "Read its output, then start all processes again. Training resumes with --resume auto.",
    ])  # fmt: skip
    os.kill(int(watched), signal.SIGKILL)
    code, _, err = ends(second)
    assert code == 5 and err[0] == "process 1: error: the command was terminated by SIGKILL"


def test_a_coordinator_that_is_not_there():
    port = launch._free_port()
    code, out, err = ends(popen([*COMMAND, *flags(1, port=port), "--join-timeout", "1"]))
    assert (code, out) == (5, "") and err == [
        f"process 1: error: process 0 did not answer at 127.0.0.1:{port}",
        "process 1: This process waited 1 s (--join-timeout).",
        "process 1: Start all processes; process 0 on the host of --coordinator, which all can "
        "reach.",
    ]


def test_the_launcher_ends_all_where_one_ends_and_blames_nobody_where_all_fail_alike():
    code, out, err = ends(start_launcher("--do", "1:kill,loop"))
    assert (code, out) == (5, "[2, 8]\n")
    assert "process 1 of 2 was terminated by SIGKILL; the others are terminated" in err
    code, _, err = ends(start_launcher("--do", "bad"))
    errors = [line for line in err if "error" in line]
    assert code == 3 and sorted(errors) == ["error: a bad row", "process 1: error: a bad row"]
    assert not any("process 1 of 2" in line or "terminated" in line for line in err)


def test_the_launcher_names_the_process_that_stopped():
    """The other one is healthy, though it is the one that JAX ends."""
    stopped = 1
    launcher = start_launcher("--do", "sleep", "--heartbeat-timeout", "3")
    wait_for_begun(launcher, launcher)
    for pid in children(launcher):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if words[words.index(b"--process-id") + 1] == b"%d" % stopped:
            os.kill(int(pid), signal.SIGSTOP)
    code, _, err = ends(launcher)
    assert code == 5 and err[-1].startswith("start again")
    assert err[-2] == f"process {stopped} of 2 stopped responding; the others are terminated"


def test_the_launcher_passes_signals_on():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    launcher = start_launcher("--do", "sleep")
    signal.signal(signal.SIGHUP, before)
    wait_for_begun(launcher, launcher)
    launcher.send_signal(signal.SIGHUP)
    code, _, err = ends(launcher)
    assert (code, err) == (143, ["terminated"])


class Ended:
    """A worker as the launcher sees it: which lost `peers`, ended by itself, or runs."""

    def __init__(self, exit_code=None, output=b"", stopped=False):
        self.exit_code, self.output, self.is_stopped = exit_code, output, lambda: stopped

    def wait(self, seconds):
        return self.exit_code is not None


def waited(workers, came=(), order=1):
    over = queue.SimpleQueue()
    for worker in workers[::order]:
        if worker.wait(0):
            over.put(worker)
    return launch._wait(workers, over, came)


LOST_1 = b"tasks are unhealthy (stopped sending heartbeats): 1 \n"
LOST_0 = b"F1121 10:00:00.1 7 client.h:80] Most likely the leader task was preempted\n"


def test_whose_end_is_that_of_the_others(monkeypatch):
    monkeypatch.setattr(launch, "_ECHO", 0)
    for workers, cause, ending in (
        ([Ended(-6, LOST_1), Ended()], 1, "stopped responding"),
        ([Ended(), Ended(-6, LOST_0)], 0, "stopped responding"),
        ([Ended(5), Ended(stopped=True)], 1, "stopped responding"),
        ([Ended(-6, LOST_1), Ended(-9)], 1, "was terminated by SIGKILL"),
        ([Ended(-9), Ended(-6, LOST_0)], 0, "was terminated by SIGKILL"),
        ([Ended(-6, LOST_1), Ended(3)], 1, "exited with code 3"),
        ([Ended(-6), Ended()], 0, "was terminated by SIGABRT"),
    ):
        for order in (1, -1):
            code, found = waited(workers, order=order)
            assert found is workers[cause]
            assert launch._ending(found) == ending and code == (found.exit_code or 0)


def test_nobody_is_blamed_for_losing_one_that_obeyed_a_signal(monkeypatch):
    monkeypatch.setattr(launch, "_ECHO", 0)
    for codes in ((143, -signal.SIGABRT), (-signal.SIGABRT, 143), (5, 143), (-6, 5)):
        assert waited([*map(Ended, codes)], [signal.SIGTERM]) == (143, None), codes
    assert waited([Ended(143), Ended(3)], [signal.SIGTERM])[0] == 3  # such as a full disk
    assert waited([Ended(-signal.SIGABRT), Ended(0)])[0] == -signal.SIGABRT


def test_the_launcher_needs_a_command(capsys):
    for more, message in (([], "no command"), (["--", "no-such"], "no-such cannot be started")):
        with pytest.raises(UsageError, match=message):
            launch.main(["--num-processes", "2", *more])


def started(*argv):
    args = parsed(*argv)
    return join.start(from_flags(join.Hosts, args), vars(args))


def test_flags_that_make_no_sense_and_none(capsys):
    for argv, message in (
        (["--process-id", "0"], "needs a coordinator, a number of processes and an index"),
        (["--coordinator", "auto", "--process-id", "0"], "or --coordinator auto alone"),
        (flags(2), "--process-id must be below --num-processes 2, got 2"),
        (flags(0, port=65536), "must be HOST:PORT"),
        (["--coordinator", "host", *flags(0)[2:]], "must be HOST:PORT, got host"),
    ):
        with pytest.raises(UsageError, match=message), started(*argv):
            raise AssertionError("not to be entered")
    for argv in (["--process-id", "-1"], ["--join-timeout", "0"]):
        with pytest.raises(SystemExit):
            parsed(*argv)
        assert argv[0] in capsys.readouterr().err
    with started():
        assert join.is_first() and join.highest(3) == 3
        join.compare({"anything": object()})


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(DeviceError, match="cannot be used"):
            join._check_port(f"127.0.0.1:{taken.getsockname()[1]}")


def test_what_differs_is_named_with_its_processes(monkeypatch):
    def compare(*facts):
        """Compares the facts of three processes, as the first of them."""
        sums = [[join._digest(known[name]) for name in sorted(known)] for known in facts]
        table = np.array([[np.frombuffer(one, np.uint8) for one in row] for row in sums])
        monkeypatch.setattr(
            "jax.experimental.multihost_utils.process_allgather",
            lambda mine: table if (mine == table[0]).all() else None,
        )
        join._compare(facts[0])

    monkeypatch.setattr("jax.distributed.shutdown", lambda: None)
    same, other_rate = {"--lr": 1, "data": 2}, {"--lr": 3, "data": 2}
    compare(same, same, same)
    with pytest.raises(UsageError, match=r"in --lr \(processes 1, 2\)\n"):
        compare(same, other_rate, other_rate)
    with pytest.raises(InputError, match=r"in --lr \(process 1\), data \(process 2\)\n"):
        compare(same, other_rate, {"--lr": 1, "data": "2"})


def test_where_things_are_may_differ(monkeypatch):
    compared = []
    monkeypatch.setattr(join, "_started", True)
    monkeypatch.setattr(join, "_compare", compared.append)
    for more in (["--output", "a"], ["--output", "b", *flags(1)], [*flags(0), "--lr", "2"]):
        monkeypatch.setattr(join, "_flags", vars(parsed(*more)))
        join.compare({"checkpoint": "c"})
    names, first, _, second, _, third = compared
    assert first["--output"] is True and first["--predictions"] is False  # whether, not where
    assert first["checkpoint"] == "c" and "version" in first
    assert names == compared[2] and set(first) == set(second)
    assert first != third and first["--lr"] != third["--lr"]


def test_lines_of_gloo_are_left_out_also_where_two_are_mixed(capfd):
    lines = b"[Gloo] Rank 1 is connected to 1 [Gloo] Rank 1 is connected: 1\n1\n\nE1121 news 1\n"
    write = f"import os; os.write(int(os.environ[{supervise._VARIABLE!r}]), {lines!r})"
    over = queue.SimpleQueue()
    supervise.Worker([sys.executable, "-c", write], over, prefix="process 1: ")
    assert over.get().exit_code == 0
    assert capfd.readouterr().err == "process 1: E1121 news 1\n"


def test_why_a_process_ended():
    for code, joined, output, message in (
        (-6, False, b"", "not all 2 processes have connected"),
        (-6, True, LOST_0, "process 0 of this run was lost"),
        (-6, True, b"F1121 10:00:00.1 7 client.h:80] What?\n", "a process of this run was lost"),
        (-9, True, b"", "was terminated by SIGKILL"),
        (3, True, b"E1121 ...", "None"),
    ):
        worker = argparse.Namespace(exit_code=code, joined=joined, output=output)
        assert message in str(supervise.why_ended(worker, parsed(*flags(0))))


@pytest.mark.parametrize("operation", ["AllReduce", "all-reduce"])  # both are seen
def test_a_lost_connection_is_found_among_the_causes(operation):
    class JaxRuntimeError(RuntimeError):
        pass

    broken = JaxRuntimeError(f"UNKNOWN: Gloo {operation} failed: Connection closed by peer\nmore")
    assert not join._is_lost_connection(ValueError("Gloo AllReduce failed"))
    assert not join._is_lost_connection(JaxRuntimeError("RESOURCE_EXHAUSTED"))
    error = InputError("the checkpoints cannot be written")
    error.__cause__ = broken
    assert join._is_lost_connection(error)
