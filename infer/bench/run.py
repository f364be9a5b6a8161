"""What `python -m infer.bench` does: models one after another, and the report of them."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from jax.sharding import Mesh

from glm2_jax import GLMConfig
from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.files import real_path
from glm2_jax.cli.main import EXIT_DEVICE
from glm2_jax.cli.messages import human_size, note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.tables import columns
from glm2_jax.errors import UsageError
from glm2_jax.escape import json_line
from glm2_jax.runtime.devices import faster_layers, find_device, find_mesh
from infer.bench import consumer, plot
from infer.bench.ceilings import Ceilings, measure_ceilings
from infer.bench.measure import Result, Shape, Variant, measure_all
from infer.bench.peer import Peer, PeerError, missing
from infer.bench.report import Report, as_json, render, variant_name, what
from infer.bench.subject import Subject, load_average
from infer.memory.shares import sizes_of, weight_share

_BITS = {"float32": 32, "none": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Settings:
    """The flags of the command, and the command line as it was typed."""

    choice: ModelChoice
    random: str | None
    layers: int | None
    preset: str | None
    dtypes: tuple[str, ...]
    quantize: tuple[str, ...] | None
    layout: tuple[str, ...] | None
    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int
    repeat: int
    peer: str | None
    json: bool
    plot: str | None
    command: str


def run(settings: Settings) -> int:
    """Measure what the flags name and print it; returns the exit code.

    Raises:
        GLMError: the model, the device or a file is not what it should be.
    """
    if settings.plot:
        _check_plot(settings.plot)
    if settings.preset:
        settings = consumer.apply(settings)
    choice = settings.choice
    mesh = find_mesh(choice.mesh, choice.device)
    device = find_device(choice.device) if mesh is None else mesh.devices.flat[0]
    measuring = not settings.preset or consumer.wanted(choice.device, device.platform)
    if settings.plot and not measuring:
        raise UsageError(
            "--plot: nothing will be measured, so there is nothing to draw.",
            consumer.UNMEASURED,
            "Leave --plot out, or add --device cpu.",
        )
    subject = Subject(choice, device, mesh, random=settings.random, layers=settings.layers)
    subject.check_forms(settings.quantize or (None,))
    about = subject.about(settings.command, f"{settings.repeat}, of {settings.steps} steps")
    report = Report(about, mesh=None if mesh is None else dict(mesh.shape))
    printed = threading.Lock()

    def print_report() -> None:
        """Print it once, when everything is measured or a signal ends the process."""
        if not printed.acquire(blocking=False):
            return
        parts = (render, consumer.render) if settings.preset else (render,)
        text = "\n\n".join(part(report, columns()) for part in parts)
        print(json_line(as_json(report)) if settings.json else text, flush=True)

    with interrupt.always(print_report):
        if measuring:
            _measure(settings, subject, report)
        else:
            report.unmeasured.append(consumer.UNMEASURED)
        report.complete = True
    if settings.plot:
        plot.draw(report, settings.plot)
    return EXIT_DEVICE if any(not result.seconds for result in report.results) else 0


def _check_plot(path: str) -> None:
    arguments.check_plot(path)
    place = real_path(path)
    if not place.parent.is_dir():
        raise UsageError(f"--plot {path} cannot be written.", "Its folder does not exist.")
    if place.is_dir():
        raise UsageError(f"--plot {path} is a folder.", fix="Name a file in it.")


def _measure(settings: Settings, subject: Subject, report: Report) -> None:
    device, mesh = subject.device, subject.mesh
    note(f"measuring the limits of {device.device_kind} ...")
    report.ceilings = ceilings_of(device, mesh)
    with contextlib.ExitStack() as stack:
        peer = None
        if settings.peer is not None and (problem := missing(settings.peer)):
            report.unmeasured.append(problem)
            note(problem)
        elif settings.peer is not None:
            peer = Peer(settings.peer, device.platform)
            stack.enter_context(interrupt.always(peer.close))
        for result in _results(settings, subject, peer, report):
            report.results.append(result)
            rate = f"{result.rate:.4g} tok/s" if result.seconds else result.problem
            note(f"{what(result)}: {rate}")
    # Once more: more than 100 per cent would only mean that the machine was busy at first.
    report.ceilings = report.ceilings.better(ceilings_of(device, mesh))
    report.about["load average"] += f", {load_average()} at the end"


def ceilings_of(device: Any, mesh: Mesh | None) -> Ceilings:
    """Return the limits of all devices together: one's, times their number.

    Virtual devices of a CPU share its memory and its cores, and one of them alone uses all.
    """
    found = measure_ceilings(device)
    return found if mesh is None or device.platform == "cpu" else found.times(mesh.size)


def _results(
    settings: Settings, subject: Subject, peer: Peer | None, report: Report
) -> Iterator[Result]:
    mesh = subject.mesh
    by_device = (faster_layers(subject.device.platform, on_mesh=mesh is not None),)
    forms = product(settings.dtypes, settings.quantize or (None,), settings.layout or by_device)
    # The smallest first: a GPU reports its peak memory since the start only.
    for dtype, quantize, layers in sorted(forms, key=lambda form: _bits(*form[:2])):
        variant, params = subject.open(dtype, quantize, layers)
        config = subject.config
        assert config is not None
        share = ""
        if mesh is not None:
            size = weight_share(config, variant.precision, sizes_of(mesh.shape))
            share = f", {human_size(size)} on each device"
        note(f"{variant_name(variant)}: {human_size(variant.weights)} of weights{share}")
        opened = _open_in_peer(peer, config, variant, report)
        shapes = _shapes(settings, config, report)
        yield from measure_all(
            config, params, variant, shapes, repeats=settings.repeat, peer=opened
        )
        del params
        gc.collect()  # before the next one is made


def _bits(dtype: str, quantize: str | None) -> int:
    if quantize in ("int8", "int4"):
        return _BITS[quantize]
    return _BITS["float32" if dtype in ("float32", "fp32") else "none"]


def _shapes(settings: Settings, config: GLMConfig, report: Report) -> list[Shape]:
    """Return what the flags ask for, as far as the model goes."""
    wanted = [Shape(batch=1, prompt=length) for length in settings.prompts]
    wanted += [
        Shape(batch=batch, context=context, steps=settings.steps)
        for batch, context in product(settings.batches, settings.contexts)
    ]
    for shape in wanted:
        line = f"{shape.length} tokens, the model's context is {config.seq_length}"
        if shape.length > config.seq_length and line not in report.unmeasured:
            report.unmeasured.append(line)
    return [shape for shape in wanted if shape.length <= config.seq_length]


def _open_in_peer(
    peer: Peer | None, config: GLMConfig, variant: Variant, report: Report
) -> Peer | None:
    """Return the peer with the same shapes and dtype, None if it cannot; it does not quantize."""
    if peer is None or variant.quantization != "none":
        return None
    try:
        peer.open(config, variant.dtype)
    except PeerError as error:
        report.unmeasured.append(f"{variant.dtype} with {error}")
        return None
    report.about["peer"] = f"{peer.versions}, {' and '.join(peer.modes)}"
    return peer
