"""What `python -m infer.doctor` does once its flags are parsed."""

import sys

from convert.hub.find import find_model
from convert.loading.folder import open_folder
from glm2_jax.cli.messages import note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.tables import columns
from glm2_jax.escape import json_line
from glm2_jax.runtime.machine import probe
from infer.doctor.checkup import Model
from infer.doctor.report import Report, as_json, render
from infer.tuning.kept import kept_lines


def run(choice: ModelChoice, *, json: bool) -> int:
    """Look at this machine and print the report; returns the exit code."""
    model = open_model(choice)
    if sys.stderr.isatty():
        note("looking at this machine; starting jax can take a minute ...")
    report = Report(probe(), model, kept_lines())
    widest = 100
    text = render(report, min(columns(widest), widest))
    print(json_line(as_json(report)) if json else text)
    return report.exit_code


def open_model(choice: ModelChoice) -> Model:
    """Return the model of the flags; its weights are not read. Raises CheckpointError where the
    folder cannot be opened."""
    if choice.path is None:
        return Model()
    found = open_folder(find_model(choice.path), **choice.form)
    return Model(found.config, choice.path, None if found.scheme is None else found.scheme.name)
