"""Saves a sharded state from two processes, and resumes from it.

Prints what the first process saw as JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np

from glm2_jax.cli import interrupt
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.processes import join


def main(argv):
    parser = Parser(prog="host_checkpoint")
    join.add_host_options(parser)
    for flag in ("--output", "--checkpoints", "--data"):
        parser.add_argument(flag)
    parser.add_common()
    args = parser.parse_args(argv)
    with join.start(from_flags(join.Hosts, args), vars(args)):
        return work(args)


def work(args):
    import jax

    from glm2_jax import make_mesh, rows_sharding
    from tests.support.training_data import open_rows
    from train.data.batches import Batches
    from train.devices import Devices
    from train.run_folder.checkpoints import Checkpoints
    from train.run_folder.folder import RunFolder

    mesh = make_mesh({"data": 2, "tensor": 4})
    lines = [line for line in Path(args.data).read_text().splitlines() if line]
    devices = Devices(jax.local_devices()[0], mesh)
    own = devices.rows(3)
    dataset = open_rows(Path(args.data), lines)
    batches = Batches(dataset, batch_size=3, shuffle=False, rows=own)
    batch = devices.batch(batches.at(0, 0)[0])  # three rows, padded to four
    rows = jax.make_array_from_callback((4, 2), rows_sharding(mesh), lambda at: whole()[at])
    with RunFolder(
        args.output, resume="auto", identity={"a": 1}, checkpoints=args.checkpoints
    ) as out:
        out.begin({"a": 1})
        with Checkpoints(out.state, keep=2) as checkpoints:
            before = checkpoints.newest
            if before is not None:
                rows = checkpoints.restore(before, {"rows": rows})[0]["rows"]
            checkpoints.save((before or 0) + 1, {"rows": rows + 1}, {"step": 1})
    total = int(jax.jit(lambda x: x.sum())(batch.tokens))
    found = {"before": before, "sum": total, "own": len(own), "shape": batch.tokens.shape}
    print(json.dumps(found), flush=True)
    return 0


def whole():
    return np.arange(8, dtype=np.float32).reshape(4, 2)


if __name__ == "__main__":
    if "jax" in sys.modules:
        raise AssertionError("jax was there before the processes had joined")
    interrupt.run(main)
