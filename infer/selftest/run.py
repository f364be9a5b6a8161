"""What `python -m infer.selftest` does once its flags are parsed."""

from __future__ import annotations

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
from glm2_jax.escape import json_line
from glm2_jax.runtime.machine import describe_device, describe_software
from infer import startup
from infer.console import peak_memory
from infer.engine.engine import Engine
from infer.engine.load import demo_folder
from infer.selftest import checks
from infer.selftest.report import render, scrubbed


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
    codes = [check["exit_code"] for check in report["checks"] if check["status"] == checks.FAIL]
    return max(codes, default=0)


def examine(choice: ModelChoice, options: EngineOptions) -> dict[str, Any]:
    """Load the model and run all checks; returns the report, ready for JSON.

    Raises:
        UsageError: flags that make no sense. CheckpointError: there is no such folder.
    """
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
    for status in (checks.PASS, checks.FAIL, checks.SKIPPED):
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
        "rope": f"{config.rope_kind}, ratio {config.rope_ratio:g}",
        "template": engine.template,
        "layout": summary.layout,
        "stored_dtype": summary.stored_dtype,
        "dtype": summary.dtype,
        "device": describe_device(engine.device),
        "fingerprint": engine.checkpoint.fingerprint,
    }
