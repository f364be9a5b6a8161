"""One prepared run on a device that is at hand for minutes only: `python benchmarks/device.py`.

Starts the project's commands one after another, the most important first, each as a process with a
time limit. What they measure is written to a JSON file before and after every step, so that a run
that is cut keeps what it has; a table of it is printed at the end. Only the standard library is
needed here: a package that a command misses fails that command's step, and the next one starts.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from device_steps import REAL, SMALL, Step, plan

ROOT = Path(__file__).resolve().parents[1]
GRACE = 5.0  # seconds in which a command that has to end prints what it measured
LEAST = 5.0  # seconds: with less left no command is started
LAST_LINES = 30
DONE, FAILED, CUT, INTERRUPTED = "done", "failed", "cut at its time limit", "interrupted"
RUNNING, NOT_STARTED = "running", "not started"
TEST = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)", re.MULTILINE)
PLATFORMS = {"gpu": "cuda", "tpu": "tpu", "cpu": "cpu"}  # as jax calls them

Found = dict[str, Any]  # of JSON


class Run:
    """Takes steps until `seconds` are over or `stop` was called.

    Attributes: `record`, which is also what `output` holds, and `signum`, the signal that ended it.
    """

    def __init__(self, output: Path, seconds: float, about: Found):
        self.output, self.deadline = output, time.monotonic() + seconds
        self.record: Found = {"about": about, "steps": []}
        self.signum = 0
        # Tests have no --device; all optimizations are on as elsewhere, see tests/conftest.py.
        tests = {"JAX_PLATFORMS": PLATFORMS[about["device"]], "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
        self.of_tests = os.environ | tests

    def stop(self, signum: int, frame: object = None) -> None:
        """End the command that runs, and start no other one; the handler of a signal."""
        self.signum = signum

    def take(self, steps: Sequence[Step]) -> None:
        """Take the steps, and keep each one."""
        for number, (name, limit, command) in enumerate(steps, 1):
            left = self.deadline - time.monotonic() - GRACE
            found: Found = {"name": name, "command": f"python -m {command}"}
            self.record["steps"].append(found)
            if self.signum or left < LEAST:
                found["outcome"] = NOT_STARTED
            else:
                found["outcome"], found["limit"] = RUNNING, min(limit, left)
                self._save()
                print(f"{number} of {len(steps)}: {name} ...", file=sys.stderr, flush=True)
                found |= self._measure(command, found["limit"])
                taken = f"{found['outcome']} after {found['seconds']:.0f} s, {left:.0f} s were left"
                print(f"    {taken}", file=sys.stderr, flush=True)
            self._save()

    def _measure(self, command: str, seconds: float) -> Found:
        """Run a command, and return what came of it."""
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            start = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-m", *shlex.split(command)],
                cwd=ROOT,
                env=self.of_tests if command.startswith("pytest") else None,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,  # Ctrl-C ends this process, which then ends it
            )
            code = None
            while code is None and not self.signum and time.monotonic() < start + seconds:
                time.sleep(0.05)
                code = process.poll()
            if code is None:
                outcome = INTERRUPTED if self.signum else CUT
            else:
                outcome = FAILED if code else DONE
            _end(process)
            texts = [_text(file) for file in (output, errors)]
        said = [line for text in reversed(texts) for line in text.splitlines() if line.strip()]
        return {
            "outcome": outcome,
            "exit_code": process.returncode,
            "seconds": time.monotonic() - start,
            "results": list(_results(texts[0])),
            "last_lines": [line[:500] for line in said if line[0] != "{"][-LAST_LINES:],
        }

    def _save(self) -> None:
        """Write the record: the file is the old one or the new one at any time."""
        temporary = self.output.with_name(f".{self.output.name}.new")
        text = json.dumps(self.record, ensure_ascii=False, indent=1)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.output)


def _end(process: subprocess.Popen) -> None:
    """End a process and what it started; at first so that it can print what it has."""
    for signum in signal.SIGTERM, signal.SIGKILL:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _text(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _results(text: str) -> Iterator[Found]:
    """Yield the JSON objects that a command printed, and the outcomes of tests."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # it was killed while it printed
            if line.startswith("{"):
                yield json.loads(line)
    for name, outcome in TEST.findall(text):
        yield {"test": name, "outcome": outcome.lower()}


def table(record: Found) -> str:
    """Return what a run measured as a table in Markdown."""
    lines = [("step", "outcome", "what", "measured"), ("---",) * 4]
    limits: Found = {}
    answers: list[Any] = []
    for step in record["steps"]:
        rows, results = [], step.get("results", [])
        for found in results:
            limits = found.get("ceilings") or limits
            rows += _rows(found, limits)
        if tests := [found["outcome"] for found in results if "test" in found]:
            counts = (f"{tests.count(name)} {name}" for name in dict.fromkeys(tests))
            rows.append(("tests", ", ".join(counts)))
        if ids := [found["output_ids"] for found in results if "output_ids" in found]:
            equal = sum(map(list.__eq__, ids, answers))
            same = f", {equal} of them the same as on the device" if answers else ""
            rows.append(("greedy answers", f"{len(ids)}{same}"))
            answers = ids
        if step["outcome"] in (FAILED, CUT):
            rows.append(("last line", (step["last_lines"] or ["nothing"])[-1]))
        outcome = step["outcome"] + (f", {step['seconds']:.0f} s" if "seconds" in step else "")
        first, *rest = rows or [("", "")]
        lines += [(step["name"], outcome, *first), *(("", "", *row) for row in rest)]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _rows(found: Found, limits: Found) -> Iterator[tuple[str, str]]:
    """Yield what one object of a command says: what was measured, and the figures."""
    if machine := found.get("machine"):
        kinds = [device["kind"] for device in machine["jax"]["devices"]]
        yield "devices", ", ".join(kinds) or machine["jax"]["error"]
        versions = {"Python": machine["python"], **machine["packages"]}
        versions["driver"] = machine["nvidia"]["driver"] or "none"
        yield "software", ", ".join(f"{name} {version}" for name, version in versions.items())
        yield "problems", str(found["problems"])
    if ceilings := found.get("ceilings"):
        yield "memory", f"read {ceilings['read'] / 1e9:.4g}, copy {ceilings['copy'] / 1e9:.4g} GB/s"
        for dtype, rate in ceilings["matmul"].items():
            yield f"products, {dtype}", f"{rate / 1e12:.4g} TFLOP/s"
    for choice in found.get("measured", ()):
        seconds, name, usual = choice["seconds"], choice["name"], choice["usual"]
        gain = f", {seconds[usual] / seconds[name]:.2f} times as fast as {usual}" if seconds else ""
        refused = "".join(f"; refused {form}: {why}" for form, why in choice["refused"].items())
        yield choice["what"], name + (gain if name != usual else " (usual)") + refused
    for result in found.get("results", ()):
        if "server" in result:
            yield f"{result['users']} users", _load(result)
        elif "tokens_per_s" in result:
            variant = result["variant"]
            weights = {"none": variant["dtype"]}.get(variant["quantization"])
            yield f"{result['what']}, {weights or variant['quantization']}", _rate(result, limits)
    for line in found.get("not_measured", ()):
        yield "", line


def _rate(result: Found, limits: Found) -> str:
    """Return the figures of a result of `infer.bench` or `train.bench`."""
    rate, dtype = result["tokens_per_s"], result["variant"]["dtype"]
    parts = [f"{rate:.4g} tok/s", f"{1e3 * result['tokens'] / rate:.3g} ms"]
    if limits and result["bytes_per_s"]:
        share = result["bytes_per_s"] / max(limits["read"], limits["copy"])
        parts.append(f"{share:.0%} of the bandwidth")
    if dtype in limits.get("matmul", ()):
        parts.append(f"{result['flops_per_s'] / limits['matmul'][dtype]:.0%} of the products")
    parts += [f"{times:.2f} times {mode}" for mode, times in result["ratios"].items()]
    return ", ".join(parts)


def _load(result: Found) -> str:
    """Return the figures of a result of `infer.bench --serve`."""
    parts = [f"{result['output_tokens_per_s']:.4g} tok/s"]
    for name, key in ("time to first token", "ttft"), ("inter-token latency", "inter_token"):
        if result[key]:
            parts.append(f"{name} {1e3 * result[key]['p50']:.3g} ms")
    return ", ".join((*parts, f"{sum(result['errors'].values())} failed"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return the exit code: 0 = every step is done, 1 = not, 130 and 143 = a signal."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[1])
    add = parser.add_argument
    add("--minutes", type=float, default=8, metavar="N", help="time for all steps (default: 8)")
    add("--output", type=Path, default="device.json", metavar="F", help="default: device.json")
    add("--device", choices=PLATFORMS, default="gpu", help="where to compute (default: gpu)")
    add("--only", action="append", metavar="TEXT", help="only steps with this in their name")
    add("--small", action="store_true", help="tiny shapes, to try the steps with --device cpu")
    add("--table", type=Path, metavar="F", help="only print the table of such a file again")
    args = parser.parse_args(argv)
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
        return 0
    if args.output.exists():
        parser.error(f"--output {args.output} exists; name another file or remove it.")
    about = {name: getattr(args, name) for name in ("minutes", "device", "only", "small")}
    about["started"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    run = Run(args.output.resolve(), 60 * args.minutes, about)
    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, run.stop)
    with tempfile.TemporaryDirectory(prefix="glm2-device-") as folder:
        steps = plan(SMALL if args.small else REAL, args.device, Path(folder))
        only = args.only or [""]
        run.take([step for step in steps if any(text in step[0] for text in only)])
    print(table(run.record))
    if run.signum:
        return 128 + run.signum
    return 0 if all(step["outcome"] == DONE for step in run.record["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
