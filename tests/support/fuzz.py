"""Feeds a reader with broken files for as long as one likes: `python -m tests.support.fuzz TARGET`.

The input that breaks a reader stays in the file that is named at the start; what was found once
belongs into `tests/convert/files/fuzz_corpus/TARGET/`.
"""

import argparse
import contextlib
import faulthandler
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.support import fuzzing

ROUND = 1000  # inputs


def main() -> None:
    """Runs one target until the time is over or something is found; at least one round."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.fuzz", description=__doc__)
    parser.add_argument("target", choices=fuzzing.TARGETS)
    parser.add_argument("--minutes", type=float, default=1.0)
    args = parser.parse_args()
    with contextlib.suppress(OSError):  # where stderr is not a file
        faulthandler.enable()
    target = fuzzing.TARGETS[args.target]
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{args.target}-"))
    target.prepare(folder)
    print(f"the last input is {folder / target.file}", flush=True)
    outcomes = {True: 0, False: 0}
    options = settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # not Phase.shrink: the last input is the one that failed
    )

    def run(data: bytes) -> None:
        outcomes[fuzzing.survives(target, data, folder)] += 1

    end, number = time.monotonic() + 60 * args.minutes, 0
    try:
        while number == 0 or time.monotonic() < end:
            seed(number)(options(given(target.inputs)(lambda data: run(data))))()
            number += 1
    finally:
        print(f"{args.target}: {outcomes[True]} read, {outcomes[False]} refused", flush=True)


if __name__ == "__main__":
    main()
