"""What `python -m infer.bench` does: prefill and decode of a model, and the report of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

from glm2_jax import GLMConfig
from glm2_jax.cli import arguments
from glm2_jax.cli.files import require_file_place
from glm2_jax.errors import UsageError
from glm2_jax.mesh import mesh_of
from infer.bench import consumer, harness, plot
from infer.bench.harness import Task
from infer.bench.options import BenchSettings
from infer.bench.programs import Shape, Workload, work
from infer.bench.report import Report, Result, render
from infer.bench.subject import Variant
from infer.memory.shares import sizes_of


def run(settings: BenchSettings) -> int:
    """Measure what the flags name and print it; returns the exit code."""
    if settings.plot:
        arguments.check_plot(settings.plot)
        require_file_place(settings.plot)
    unmeasured, show = "", render
    if settings.preset:
        settings, show = consumer.apply(settings), consumer.render
        unmeasured = consumer.unmeasured(settings.choice.device)
    if settings.plot and unmeasured:
        raise UsageError(
            "--plot: nothing will be measured, so there is nothing to draw.",
            unmeasured,
            "Leave --plot out, or add --device cpu.",
        )
    tasks = partial(_tasks, settings)
    report, code = harness.run(settings, tasks, unmeasured=unmeasured, show=show)
    if settings.plot:
        plot.draw(report, settings.plot)
    return code


def _tasks(
    settings: BenchSettings, config: GLMConfig, params: Any, variant: Variant, report: Report
) -> Iterator[Task]:
    """Yield what the flags ask for, as far as the model goes."""
    wanted = [Shape(batch=1, prompt=length) for length in settings.prompts]
    wanted += [
        Shape(batch=batch, context=context, steps=settings.steps)
        for batch, context in product(settings.batches, settings.contexts)
    ]
    for shape in wanted:
        if shape.length <= config.seq_length:
            yield task_of(config, params, variant, shape)
            continue
        line = f"{shape.length} tokens, the model's context is {config.seq_length}"
        if line not in report.unmeasured:
            report.unmeasured.append(line)


def task_of(config: GLMConfig, params: Any, variant: Variant, shape: Shape) -> Task:
    """Return the measurement of a prefill or of decode steps."""
    (device, *_), mesh = harness.devices_of(params), mesh_of(params)
    sizes = None if mesh is None else sizes_of(mesh.shape)
    least = work(config, variant.precision, shape, device.platform, sizes, variant.kv)

    def build() -> tuple[Any, float]:
        load = Workload(config, params, variant.kv)
        run = load.prefill(shape) if shape.prompt else load.decode(shape)
        return run, load.programs.seconds

    return Task(Result(variant, shape.name, asdict(shape), shape.tokens, *least), build)
