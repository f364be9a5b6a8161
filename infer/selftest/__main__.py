"""`python -m infer.selftest`: does this model compute what is known of it, and how fast?

The report names no user, no path beyond the folder's last part and no prompt of anybody, so that it
can be pasted into a bug report as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm2_jax.cli import arguments, flags, interrupt
from glm2_jax.cli.main import version
from glm2_jax.cli.messages import note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.escape import join_lines, json_line
from infer import options, startup

if TYPE_CHECKING:
    from infer.engine.engine import Engine
    from infer.selftest.checks import Check

PROG = "python -m infer.selftest"
DESCRIPTION = """Checks a checkpoint (or the bundled demo model) against what is known of it:
checksums, shapes, finite values, prompt ids, the greedy answers of published models, speed.
Exit codes: 0 all passed, 2 usage, 4 a check failed, 5 out of memory or device."""
LABEL = 13


def parser() -> Parser:
    """The flags."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=f"{PROG} --model chatglm2-6b")
    flags.add_model_options(result)
    options.add_performance_options(result)
    output = result.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object instead of a report")
    result.add_common()
    result.set_defaults(max_length=None, stats=False)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments.use_utf8()
    args = parser().parse_args(argv)
    arguments.choose_platform(args.device)
    report = examine(args)
    print(json_line(report) if args.json else render(report))
    codes = [check["exit_code"] for check in report["checks"] if check["status"] == "FAIL"]
    return max(codes, default=0)


def examine(args: argparse.Namespace) -> dict[str, Any]:
    """Opens the model, runs everything; the report, ready for JSON.

    Raises:
      UsageError: flags that make no sense. CheckpointError: --model is no folder.
    """
    from convert.files.shards import read_json
    from convert.loading.folder import open_folder
    from glm2_jax.errors import CheckpointError, DeviceError, GLMError
    from infer.selftest import checks

    startup.note_demo_model(from_flags(ModelChoice, args))
    report: dict[str, Any] = {"model": _name(args.model), "versions": _versions()}
    if (folder := startup.model_folder(from_flags(ModelChoice, args))) is not None:
        args.model, args.hub_source, args.revision = str(folder), None, None
    if args.model is not None and not Path(args.model).is_dir():
        open_folder(args.model)  # says what it is instead; there is nothing to report on
    found = [checks.check_files(_folder(args))]
    try:
        engine = startup.open_engine(from_flags(ModelChoice, args), from_flags(EngineOptions, args))
    except (CheckpointError, DeviceError) as error:
        found.append(checks.failure("opens", error))
    else:
        report |= _about(engine)
        config = read_json(_folder(args) / "config.json")
        for check in checks.run_checks(engine, name=config.get("_name_or_path")):
            if sys.stderr.isatty():  # a large model takes minutes
                note(f"{check.status} {check.name}")
            found.append(check)
        try:
            report["figures"] = dataclasses.asdict(checks.measure(engine))
        except GLMError as error:
            found.append(checks.failure("speed", error))
        from infer.console import peak_memory

        report["peak_memory"] = peak_memory()
    report["checks"] = [_scrubbed(check, args.model) for check in found]
    for status in (checks.PASS, checks.FAIL, checks.SKIPPED):
        report[status.lower()] = sum(check.status == status for check in found)
    return report


def _name(model: str | None) -> str:
    """The last part of a folder, or of a model's name on a hub."""
    if model is None:
        return "demo (bundled)"
    return Path(os.path.realpath(model) if os.path.isdir(model) else model).name


def _versions() -> str:
    from glm2_jax.runtime.probing import PACKAGES, PLUGINS, installed

    found = installed(PACKAGES + PLUGINS)
    found.pop("glm2-jax", None)
    parts = [version(), *(f"{name} {number}" for name, number in found.items())]
    python = f"Python {platform.python_version()}"
    return ", ".join([*parts, python, f"{platform.system()} {platform.machine()}"])


def _about(engine: Engine) -> dict[str, Any]:
    from glm2_jax.runtime.probing import find_nvidia

    config, summary = engine.config, engine.checkpoint.summary
    device = engine.device
    driver = find_nvidia().driver if device.platform == "gpu" else ""
    return {
        "family": config.family,
        "parameters": config.num_params,
        "layers": config.num_layers,
        "vocabulary": config.vocab_size,
        "rope": f"{config.rope_kind}, ratio {config.rope_ratio:g}",
        "template": engine.template,
        "layout": summary.layout,
        "stored_dtype": summary.stored_dtype,
        "dtype": summary.dtype,
        "device": device.device_kind + (f", driver {driver}" if driver else ""),
        "fingerprint": engine.checkpoint.fingerprint,
    }


def _folder(args: argparse.Namespace) -> Path:
    from infer.engine.load import demo_folder

    return demo_folder() if args.model is None else Path(args.model)


def _scrubbed(check: Check, folder: str | None) -> dict[str, Any]:
    """The check without the paths that errors name: of the folder only its last part stays."""
    values = dataclasses.asdict(check)
    names = {os.path.expanduser("~"): "~"}
    if folder is not None:
        path, real = Path(folder), Path(os.path.realpath(folder))
        spellings = {str(real), str(path.absolute()), str(path), folder.rstrip(os.sep)}
        names = dict.fromkeys(spellings - {"", "."}, real.name) | names
    for key in ("expected", "got", "note"):
        for path, name in sorted(
            names.items(), key=lambda pair: -len(pair[0])
        ):  # whole paths first
            if len(path) > 1:
                values[key] = values[key].replace(path, name)
    return values


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["glm2-jax selftest", _row("model", report["model"])]
    if "layout" in report:
        lines += [
            _row(
                "architecture",
                f"{report['family']}, {report['parameters']:,} parameters, "
                f"{report['layers']} layers, vocabulary {report['vocabulary']:,}",
            ),
            _row("rope", f"{report['rope']}; template {report['template']}"),
            _row(
                "layout",
                f"{report['layout']}, stored in {report['stored_dtype']}, "
                f"computed in {report['dtype']}",
            ),
            _row("device", report["device"]),
            _row("fingerprint", report["fingerprint"][:16]),
        ]
    lines += [_row("versions", report["versions"]), ""]
    for check in report["checks"]:
        lines += _check_lines(check)
    if figures := report.get("figures"):
        lines += [
            "",
            _row("load", f"{figures['load_s']:.1f} s, compile {figures['compile_s']:.1f} s"),
            _row(
                "prefill",
                f"{figures['prefill_rate']:.1f} tokens/s ({figures['prefill_tokens']} tokens)",
            ),
            _row(
                "decode",
                f"{figures['decode_rate']:.1f} tokens/s ({figures['decode_tokens']} tokens)",
            ),
        ]
    if "peak_memory" in report:
        lines.append(_row("peak memory", report["peak_memory"]))
    counts = f"{report['pass']} passed, {report['fail']} failed, {report['skipped']} skipped"
    return join_lines([*lines, "", _row("result", counts)])


def _row(label: str, text: str) -> str:
    return f"{label:<{LABEL}}{text}"


def _check_lines(check: dict[str, Any]) -> list[str]:
    head = f"{check['status']:<8} {check['name']:<12} "
    if check["status"] == "skipped":
        return [head + check["note"]]
    if check["status"] == "pass":
        return [head + (check["got"] or check["expected"])]
    wanted = f", expected {check['expected']}" if check["expected"] else ""
    lines = [f"{head}got {check['got']}{wanted}"]
    return [*lines, f"{'':<21} {check['note']}"] if check["note"] else lines


if __name__ == "__main__":
    interrupt.run(main)
