"""Measures a model form by form: its limits first, and the peer in turns with it.

What is measured of each form is up to the command: `infer.bench` or `train.bench`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, NamedTuple

from jax.sharding import Mesh

from glm2_jax import GLMConfig
from glm2_jax.cli import interrupt
from glm2_jax.cli.main import EXIT_DEVICE, is_out_of_memory
from glm2_jax.cli.messages import human_size, note
from glm2_jax.cli.tables import columns
from glm2_jax.escape import json_line
from glm2_jax.runtime.devices import faster_layers, find_device, find_mesh
from infer.bench.ceilings import Ceilings, measure_ceilings
from infer.bench.host import load_text
from infer.bench.options import Settings
from infer.bench.peer import Peer, PeerError, missing
from infer.bench.report import Report, Result, as_json, render
from infer.bench.subject import Subject, Variant
from infer.memory.peak import peak_bytes, reset_peak
from infer.memory.shares import device_params, sizes_of, total_bytes


class Task(NamedTuple):
    """One thing to measure of a model in memory."""

    result: Result  # to be filled
    # Compiles it; returns what does it once and returns its seconds, and the seconds of compiling.
    build: Callable[[], tuple[Callable[[], float], float]]


Tasks = Callable[[GLMConfig, Any, Variant, Report], Iterable[Task]]  # of parameters in a form
# "list" or "stacked" for a dtype and a quantization of the flags
Layouts = Callable[[Subject, str, str | None], str]


def run(
    settings: Settings,
    tasks: Tasks,
    *,
    layouts: Layouts | None = None,
    unmeasured: str = "",
    show: Callable[[Report, int], str] = render,
) -> tuple[Report, int]:
    """Measure, unless `unmeasured` says why not, and print the report, also where a signal ends the
    process; returns it and the exit code. `show` writes it for people, in so many columns, and
    `layouts` are those of the layers where no flag names them."""
    choice = settings.choice
    mesh = find_mesh(choice.mesh, choice.device)
    device = find_device(choice.device) if mesh is None else mesh.devices.flat[0]
    subject = Subject(settings, device, mesh)
    sizes = None if mesh is None else dict(mesh.shape)
    report = Report(subject.about(), mesh=sizes, peer=settings.peer or "")
    printed = threading.Lock()

    def print_report() -> None:
        if printed.acquire(blocking=False):  # once
            text = json_line(as_json(report)) if settings.json else show(report, columns())
            print(text, flush=True)

    with interrupt.always(print_report):
        if unmeasured:
            report.unmeasured.append(unmeasured)
        else:
            _measure(settings, subject, tasks, layouts or _by_device, report)
        report.complete = True
    failed = any(not result.seconds for result in report.results)
    return report, EXIT_DEVICE if failed else 0


def _by_device(subject: Subject, dtype: str, quantize: str | None) -> str:
    return faster_layers(subject.device.platform, on_mesh=subject.mesh is not None)


def _measure(
    settings: Settings, subject: Subject, tasks: Tasks, layouts: Layouts, report: Report
) -> None:
    device, mesh = subject.device, subject.mesh
    if settings.ceilings:
        note(f"measuring the limits of {device.device_kind} ...")
        report.ceilings = ceilings_of(device, mesh)
    forms = [
        (*weights, layout)
        for weights in product(settings.dtypes, settings.quantize or (None,))
        for layout in settings.layout or (layouts(subject, *weights),)
    ]
    with contextlib.ExitStack() as stack:
        peer = None
        if settings.peer is not None and (problem := missing(settings.peer)):
            report.unmeasured.append(problem)
            note(problem)
        elif settings.peer is not None:
            peer = Peer(settings.peer, device.platform)
            stack.enter_context(interrupt.always(peer.close))
        # The smallest first: a GPU reports its peak memory since the start only.
        for form in sorted(forms, key=lambda form: _bits(*form[:2])):
            _measure_form(settings, subject, form, tasks, peer, report)
            gc.collect()  # before the next parameters are made
    if report.ceilings is not None:
        # Once more: more than 100 per cent would only mean that the machine was busy at first.
        report.ceilings = report.ceilings.better(ceilings_of(device, mesh))
    report.about["load average"] += f", {load_text()} at the end"


def ceilings_of(device: Any, mesh: Mesh | None) -> Ceilings:
    """Return the limits of all devices together: one's, times their number.

    Virtual devices of a CPU share its memory and its cores, and one of them alone uses all.
    """
    found = measure_ceilings(device)
    return found if mesh is None or device.platform == "cpu" else found.times(mesh.size)


def _bits(dtype: str, quantize: str | None) -> int:
    bits = 32 if dtype in ("float32", "fp32") else 16
    return {"int8": 8, "int4": 4}.get(quantize or "", bits)


def _measure_form(
    settings: Settings,
    subject: Subject,
    form: tuple[str, str | None, str],
    tasks: Tasks,
    peer: Peer | None,
    report: Report,
) -> None:
    variant, params = subject.open(*form)
    config, share = dataclasses.replace(subject.config, forms=variant.forms), ""
    if subject.mesh is not None:
        held = device_params(config, variant.precision, sizes_of(subject.mesh.shape))
        share = f", {human_size(total_bytes(held))} on each device"
    note(f"{variant.name}: {human_size(variant.weights)} of weights{share}")
    if peer is not None and variant.quantization != "none":  # it does not quantize
        peer = None
    if peer is not None:
        try:
            peer.open(config, variant.dtype)
            report.about["peer"] = f"{peer.versions}, {' and '.join(peer.modes)}"
        except PeerError as error:
            report.unmeasured.append(f"{variant.dtype} with {error}")
            peer = None
    devices = devices_of(params)
    for task in tasks(config, params, variant, report):
        result = task.result
        report.results.append(result)  # what a signal ends is printed as far as it was measured
        reset_peak()
        try:
            take_turns(task, settings.repeat, peer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            result.problem = "out of memory"
        peaks = [peak for peak in map(peak_bytes, devices) if peak is not None]
        result.peak = max(peaks, default=None)
        note(f"{result.what}: {f'{result.rate:.4g} tok/s' if result.seconds else result.problem}")


def take_turns(task: Task, repeats: int, peer: Peer | None) -> None:
    """Fill a result: our repetitions and the peer's take turns, so that noise affects both."""
    result = task.result
    run, result.compile_s = task.build()
    for mode in peer.modes if peer is not None else ():
        assert peer is not None
        try:
            peer.ask(do="prepare", mode=mode, **result.shape)
            for _ in range(repeats):
                result.seconds.append(run())
                seconds = peer.measure()
                result.peers.setdefault(mode, []).append(seconds)
        except PeerError as error:
            result.peers.pop(mode, None)
            result.problem = str(error)
    for _ in range(repeats - len(result.seconds)):
        result.seconds.append(run())


def devices_of(params: Any) -> list[Any]:
    """Return the devices that hold parameters."""
    return sorted(params["final_norm"].devices(), key=lambda device: device.id)
