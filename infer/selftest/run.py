"""What `python -m infer.selftest` does once its flags are parsed.

The report names no user, no prompt, and of paths only the last part of the model's folder, so that
it can be pasted into a bug report as it is.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.files.shards import read_json
from convert.loading.folder import open_folder
from glm2_jax.cli.messages import note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.errors import CheckpointError, DeviceError, GLMError
from glm2_jax.escape import join_lines, json_line
from glm2_jax.runtime.machine import describe_device, describe_software
from infer import startup
from infer.console import peak_memory
from infer.engine.engine import Engine
from infer.engine.load import demo_folder
from infer.selftest import checks
from infer.selftest.checks import FAIL, PASS, SKIPPED, Check

_MODEL = {
    "architecture": "{family}, {parameters:,} parameters, {layers} layers, vocabulary "
    "{vocabulary:,}",
    "rope": "{rope}; template {template}",
    "layout": "{layout}, stored in {stored_dtype}, computed in {dtype}",
    "device": "{device}",
    "fingerprint": "{fingerprint:.16}",
}
_FIGURES = {
    "load": "{load_s:.1f} s, compile {compile_s:.1f} s",
    "prefill": "{prefill_rate:.1f} tokens/s ({prefill_tokens} tokens)",
    "decode": "{decode_rate:.1f} tokens/s ({decode_tokens} tokens)",
}


@dataclass(frozen=True)
class Settings:
    """The flags of the command."""

    choice: ModelChoice
    options: EngineOptions
    json: bool


def run(settings: Settings) -> int:
    """Check the model and print the report; returns the exit code."""
    report = examine(settings.choice, settings.options)
    print(json_line(report) if settings.json else render(report))
    codes = [check["exit_code"] for check in report["checks"] if check["status"] == FAIL]
    return max(codes, default=0)


def examine(choice: ModelChoice, options: EngineOptions) -> dict[str, Any]:
    """Load the model and run all checks; returns the report, ready for JSON.
    UsageError: flags that make no sense. CheckpointError: there is no such folder."""
    startup.note_demo_model(choice)
    report: dict[str, Any] = {"model": model_name(choice.path), "versions": describe_software()}
    choice = startup.find_choice(choice)
    folder = Path(choice.path or demo_folder())
    if not folder.is_dir():
        open_folder(folder)  # raises; there is nothing to report on
    found = [checks.check_files(folder)]
    try:
        engine = startup.open_engine(choice, options)
    except (CheckpointError, DeviceError) as error:
        found.append(checks.failure("opens", error))
    else:
        report |= _about(engine)
        name = read_json(folder / "config.json").get("_name_or_path")
        for check in checks.run_checks(engine, name=name):
            if sys.stderr.isatty():  # a large model takes minutes
                note(f"{check.status} {check.name}")
            found.append(check)
        try:
            report["figures"] = checks.measure(engine)
        except GLMError as error:
            found.append(checks.failure("speed", error))
        report["peak_memory"] = peak_memory()
    report["checks"] = [scrubbed(check, choice.path) for check in found]
    for status in (PASS, FAIL, SKIPPED):
        report[status.lower()] = sum(check.status == status for check in found)
    return report


def model_name(model: str | None) -> str:
    """Return the last part of a folder, or of a model's name on a hub."""
    if model is None:
        return "demo (bundled)"
    return Path(os.path.realpath(model) if os.path.isdir(model) else model).name


def _about(engine: Engine) -> dict[str, Any]:
    config, summary = engine.config, engine.checkpoint.summary
    return {
        "family": config.family,
        "parameters": config.num_params,
        "layers": config.num_layers,
        "vocabulary": config.vocab_size,
        "rope": config.rope_text,
        "template": engine.template,
        "layout": summary.layout,
        "stored_dtype": summary.stored_dtype,
        "dtype": summary.dtype,
        "device": describe_device(engine.device),
        "fingerprint": engine.checkpoint.fingerprint,
    }


def scrubbed(check: Check, folder: str | None) -> dict[str, Any]:
    """Return a check without the paths that errors name: of the folder only its last part stays."""
    values = dataclasses.asdict(check)
    names = {os.path.expanduser("~"): "~"}
    if folder is not None:
        path, real = Path(folder), Path(os.path.realpath(folder))
        spellings = {str(real), str(path.absolute()), str(path), folder.rstrip(os.sep)}
        names = dict.fromkeys(spellings - {"", "."}, real.name) | names
    for path in sorted(names, key=len, reverse=True):  # the longest first: it may hold others
        for key in ("expected", "got", "note") if len(path) > 1 else ():
            values[key] = values[key].replace(path, names[path])
    return values


def render(report: dict[str, Any]) -> str:
    """Write the report for people."""
    about = {"model": "{model}", **(_MODEL if "layout" in report else {}), "versions": "{versions}"}
    lines = ["glm2-jax selftest", *_rows(about, report), ""]
    for check in report["checks"]:
        head = f"{check['status']:<8} {check['name']:<12} "
        if check["status"] == SKIPPED:
            lines.append(head + check["note"])
        elif check["status"] == PASS:
            lines.append(head + (check["got"] or check["expected"]))
        else:
            expected = f", expected {check['expected']}" if check["expected"] else ""
            lines.append(f"{head}got {check['got']}{expected}")
            lines += [f"{'':<21} {check['note']}"] if check["note"] else []
    if "figures" in report:
        lines += ["", *_rows(_FIGURES, report["figures"])]
    if "peak_memory" in report:
        lines += _rows({"peak memory": "{peak_memory}"}, report)
    counts = {"result": "{pass} passed, {fail} failed, {skipped} skipped"}
    return join_lines([*lines, "", *_rows(counts, report)])


def _rows(rows: dict[str, str], values: dict[str, Any]) -> list[str]:
    return [f"{label:<13}{text.format_map(values)}" for label, text in rows.items()]
