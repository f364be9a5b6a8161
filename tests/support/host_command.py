"""A command of several processes, for the tests of `glm2_jax.processes.join`.

--do says what a process does once all have joined, for example "1:kill,loop": process 1 kills
itself, the others compute together until they are ended.
"""

import json
import os
import signal
import sys
import time

from glm2_jax.cli import interrupt
from glm2_jax.cli.messages import Progress, note
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.errors import InputError
from glm2_jax.processes import join


def main(argv):
    parser = Parser(prog="host_command")
    join.add_host_options(parser)
    for flag in ("--do", "--model"):
        parser.add_argument(flag, default="")
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_common()
    args = parser.parse_args(argv)
    with join.start(from_flags(join.Hosts, args), vars(args)):
        import jax

        join.compare({"checkpoint": args.model})
        with Progress("working", 1, interval=0) as bar:
            bar(1)
        index = jax.process_index()
        note(f"a note, highest {join.highest(index * 7)}, first {join.is_first()}")
        print(json.dumps([jax.process_count(), jax.device_count()]), flush=True)
        for part in args.do.split(","):
            who, _, what = part.rpartition(":")
            if who in ("", str(index)):
                do(what)
    return 0


def do(what):
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "bad":
        raise InputError("a bad row", "why", "fix")
    if what in ("loop", "sleep"):
        print("begun", file=sys.stderr, flush=True)
        while True:
            time.sleep(0.02)
            if what == "loop":
                join.highest(1)


if __name__ == "__main__":
    interrupt.run(main)
