"""Feeds a reader with broken files: `python -m tests.support.fuzz TARGET [--minutes N]`.

With atheris, inputs are led by the code that they reach; without it, hypothesis draws them. The
input that brings a reader down stays in the file that is named at the start; what was found once
belongs into `tests/fuzz_corpus/TARGET/`.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import sys
import tempfile
import time
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

ROUND = 1000  # inputs


def main() -> None:
    """Runs one target until the time is over or something is found."""
    if atheris is None:
        from tests.support import fuzzing
    else:
        with atheris.instrument_imports(
            include=["convert", "glm2_jax", "infer", "zipfile", "pickletools", "json"]
        ):
            from tests.support import fuzzing
    parser = argparse.ArgumentParser(prog="python -m tests.support.fuzz", description=__doc__)
    parser.add_argument("target", choices=fuzzing.TARGETS)
    parser.add_argument("--minutes", type=float, default=1.0)
    args = parser.parse_args()
    with contextlib.suppress(OSError):  # where stderr is no file
        faulthandler.enable()
    target = fuzzing.TARGETS[args.target]
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{args.target}-"))
    target.prepare(folder)
    print(f"the last input is {folder / target.file}", flush=True)
    outcomes = {True: 0, False: 0}

    def run(data: bytes) -> None:
        outcomes[fuzzing.survives(target, data, folder)] += 1

    try:
        if atheris is None:
            _draw(target.inputs, run, args.minutes)
        else:
            _lead(target.inputs, run, args.minutes, folder / "corpus")
    finally:
        print(f"{args.target}: {outcomes[True]} read, {outcomes[False]} refused", flush=True)


def _draw(inputs, run, minutes: float) -> None:
    """Inputs by hypothesis, round by round; at least one round."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    options = settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # not Phase.shrink: the last input is the one that failed
    )
    end, number = time.monotonic() + 60 * minutes, 0
    while True:
        seed(number)(options(given(inputs)(lambda data: run(data))))()
        number += 1
        if time.monotonic() >= end:
            return


def _lead(inputs, run, minutes: float, corpus: Path) -> None:
    """Inputs by atheris, which changes a round of hypothesis."""
    corpus.mkdir()

    def keep(data: bytes) -> None:
        (corpus / hashlib.sha256(data).hexdigest()).write_bytes(data)

    _draw(inputs, keep, 0)
    flags = [f"-max_total_time={round(60 * minutes)}", "-rss_limit_mb=0", "-max_len=65536"]
    flags.append(f"-artifact_prefix={corpus.parent}/")
    atheris.Setup([sys.argv[0], *flags, str(corpus)], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
