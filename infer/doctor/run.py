"""What `python -m infer.doctor` does once its flags are parsed."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from convert.hub.find import find_model
from convert.loading.folder import open_folder
from glm2_jax.cli.messages import note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.tables import columns
from glm2_jax.escape import json_line
from glm2_jax.runtime.machine import probe
from infer.doctor.checkup import examine
from infer.doctor.forms import Model
from infer.doctor.report import WIDEST, as_json, render


@dataclass(frozen=True)
class Settings:
    """The flags of the command."""

    choice: ModelChoice
    json: bool


def run(settings: Settings) -> int:
    """Look at this machine and print the report; returns the exit code."""
    model = open_model(settings.choice)
    if sys.stderr.isatty():
        note("looking at this machine; starting jax can take a minute ...")
    machine = probe()
    report = examine(machine, model)
    if settings.json:
        print(json_line(as_json(machine, model, report)))
    else:
        print(render(model, report, min(columns(WIDEST), WIDEST)))
    return report.exit_code


def open_model(choice: ModelChoice) -> Model:
    """Return the model of the flags; its weights are not read.

    Raises:
        CheckpointError: the folder cannot be opened.
    """
    if choice.path is None:
        return Model()
    found = open_folder(find_model(choice.path), **choice.form)
    return Model(found.config, choice.path, None if found.scheme is None else found.scheme.name)
